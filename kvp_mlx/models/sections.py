"""Parts of a model as models of their own, run layer by layer, and listened to.

Every view shares the weights of the model it is cut from, and changes nothing in it: threads may share a model.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .families import Cache, Family, family_of, hidden_size, inner_model, kinds_of, mixer_of, text_model
from .kinds import Kind, RawOutputs, Target


@dataclass(frozen=True)
class RawLayer:
    """What the projections that feed one layer's cache read and returned.

    Attributes:
        hidden: their input ``(B, T, hidden)``, RMS-normalised where the architecture does so.
        raw: by target ``(B, T, width)``; of attention ``keys`` and ``values``, heads merged, before any norm and RoPE.
    """

    hidden: mx.array
    raw: RawOutputs


def section(model: nn.Module, first: int, last: int) -> nn.Module:
    """Return layers ``first`` to ``last - 1`` of a model as a model of their own, sharing all weights.

    A section that does not start at layer 0 takes the residual stream ``(B, T, hidden)`` in place of token ids,
    and one that stops before the last layer returns it in place of the normed output.
    """
    depth = len(inner_model(model).layers)
    return _cut(model, range(first, min(last, depth)), takes_ids=first == 0, is_normed=last >= depth)


def prefix_model(model: nn.Module, layers: int) -> nn.Module:
    """Return the section of a model's first ``layers`` layers and one more.

    The extra layer is there to be listened to: its projections see what the first ``layers`` layers made of
    the prompt, and its own keys and values come out exact. Its attention output and FFN are never evaluated.
    """
    return section(model, 0, layers + 1)


def run_layers(
    model: nn.Module, ids: mx.array, cache: Cache, listen: Iterable[int] = ()
) -> tuple[mx.array, dict[int, RawLayer]]:
    """Run a model over ``ids`` (B, T), extending ``cache``, and listen to some of its layers.

    Nothing is evaluated here: what neither the caller nor the cache asks for (final norm, the last layer's
    attention output and FFN) is never computed.

    Args:
        model: an mlx-lm model or a ``section`` of one.
        ids: token ids ``(B, T)``, or what the section takes, at the positions that follow the cache.
        cache: one KV cache per layer.
        listen: layers whose raw keys and values are wanted.

    Returns:
        The inner model's output ``(B, T, hidden)``, and what the projections of each layer in ``listen`` read and
        returned.
    """
    kinds, layers = kinds_of(model), inner_model(model).layers
    mixers = {layer: layers[layer][kinds[layer].mixer] for layer in listen}
    targets = {layer: kinds[layer].targets(mixer) for layer, mixer in mixers.items()}
    views = {layer: _listening(mixer, targets[layer]) for layer, mixer in mixers.items()}
    output = inner_model(with_mixers(model, views))(ids, cache)
    return output, {layer: _captured(view, targets[layer]) for layer, view in views.items()}


def run_streams(
    model: nn.Module, x: mx.array, cache: Cache, first: int = 0, *, listen: bool = False
) -> tuple[list[mx.array], dict[int, RawLayer]]:
    """Run a model from layer ``first`` to its end and return the residual stream between all layers.

    Args:
        model: an mlx-lm model.
        x: what layer ``first`` takes: the residual stream ``(B, T, hidden)``, or token ids ``(B, T)`` for layer 0.
        cache: the model's cache, of which the layers from ``first`` on are extended.
        first: layer to start with.
        listen: whether to listen to these layers.

    Returns:
        ``x``, what each layer but the last returned, and the inner model's normed output; and, with ``listen``, what
        each layer's projections read and returned.
    """
    streams, captured = [x], {}
    for layer in range(first, len(inner_model(model).layers)):
        alone = section(model, layer, layer + 1)
        x, raw = run_layers(alone, x, cache[layer : layer + 1], [0] if listen else [])
        streams.append(x)
        if listen:
            captured[layer] = raw[0]
    return streams, captured


def mixer_outputs(
    model: nn.Module, ids: mx.array, cache: Cache, streams: list[mx.array] | None = None
) -> tuple[list[mx.array], list[mx.array]]:
    """Run a model layer by layer and return the residual streams and what every mixer (attention block) returned.

    Args:
        model: an mlx-lm model.
        ids: token ids ``(B, T)`` at the positions that follow the cache, which is extended.
        cache: the model's cache.
        streams: what each layer is to take, in place of what the one below returned (from an earlier run).
    """
    outputs, taken, x = [], [], ids
    for number in range(len(inner_model(model).layers)):
        taken.append(x if streams is None else streams[number])
        listener = _Listener(mixer_of(model, number))
        alone = with_mixers(section(model, number, number + 1), {0: listener})
        x, _ = run_layers(alone, taken[-1], cache[number : number + 1])
        outputs.append(listener.output)
    return taken, outputs


def early_exit(model: nn.Module, layers: int) -> nn.Module:
    """Return a model's first layers with its own final norm, so that its head can be asked what they know."""
    return _cut(model, range(layers), takes_ids=True, is_normed=True)


def only_layers(model: nn.Module, layers: Sequence[int]) -> nn.Module:
    """Return a model of some of a model's layers, in their order, sharing all weights."""
    return _cut(model, layers, takes_ids=True, is_normed=True)


def is_cut(model: nn.Module) -> bool:
    """Return whether a model is some layers of another one, by any of the functions above."""
    return isinstance(inner_model(model), _Cut)


def output_head(model: nn.Module, hidden: mx.array) -> mx.array:
    """Return logits ``(B, T, vocab)`` of the inner model's output ``(B, T, hidden)``, by the model's own call."""
    result = _Result(inner_model(model), hidden)
    logits: mx.array = _with_inner(model, result)(None)
    return logits


def with_mixers(model: nn.Module, mixers: dict[int, nn.Module]) -> nn.Module:
    """Return a model with other mixers in some layers, sharing everything else."""
    if not mixers:
        return model
    kinds, inner = kinds_of(model), copy.copy(inner_model(model))
    inner.layers = list(inner.layers)
    for layer, module in mixers.items():
        inner.layers[layer] = copy.copy(inner.layers[layer])
        inner.layers[layer][kinds[layer].mixer] = module
    return _with_inner(model, inner)


def _with_inner(model: nn.Module, inner: nn.Module) -> nn.Module:
    """Return a model with another part between token ids and output head."""
    view = copy.copy(text_model(model))
    view[family_of(model).inner] = inner
    return view


def _cut(model: nn.Module, layers: Sequence[int], *, takes_ids: bool, is_normed: bool) -> nn.Module:
    """Return a model of some layers, with the embedding before them and the norm behind them only if asked for."""
    inner, kinds, family = inner_model(model), kinds_of(model), family_of(model)
    cut = _Cut(inner)
    cut.kinds = tuple(kinds[layer] for layer in layers)
    cut.width = hidden_size(model)
    cut.layers = [inner.layers[layer] for layer in layers]
    if not takes_ids:
        cut.start, cut[family.embedding] = _as_it_is, nn.Identity()
    elif not isinstance(inner, _Cut):
        cut.start = partial(_embedded, inner, family)
    if not is_normed:
        cut[family.norm] = nn.Identity()
    cut.norm_name = family.norm
    return _with_inner(model, cut)


class StandIn(nn.Module):
    """Takes over all that a module has, but not its call."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        dict.update(self, inner)
        self.__dict__.update(vars(inner))


class _Cut(StandIn):
    """Some layers, each called as its own kind wants it, and not by where the whole model expects which kind.

    Attributes:
        kinds: of its layers.
        width: of the residual stream.
        start: makes what the first layer takes, given the cut itself.
        norm_name: of the module that comes last.
    """

    kinds: tuple[Kind, ...]
    width: int
    start: Callable[["_Cut", mx.array], mx.array]
    norm_name: str

    def __call__(self, inputs: mx.array, cache: Cache | None = None, *_: Any, **__: Any) -> mx.array:
        x, masks = self.start(self, inputs), {}
        caches: list[Any] = [*cache] if cache else [None] * len(self.layers)
        for layer, kind, own in zip(self.layers, self.kinds, caches, strict=False):
            if kind not in masks:
                masks[kind] = kind.mask(x, own)
            x = layer(x, mask=masks[kind], cache=own)
            x = x[0] if isinstance(x, tuple) else x  # Gemma 4's layers also return what others may share
        output: mx.array = self[self.norm_name](x)
        return output

    @property
    def pipeline_layers(self) -> list[nn.Module]:
        """What mlx-lm calls the layers where a model can be spread over machines."""
        return list(self.layers)


def _as_it_is(_: _Cut, x: mx.array) -> mx.array:
    return x


def _embedded(inner: nn.Module, family: Family, cut: _Cut, ids: mx.array) -> mx.array:
    """Return what a cut's first layer takes: its model's own call without any layers, since some scale embeddings.

    The embedding is the cut's: it may have been dequantised or trained since.
    """
    bare = copy.copy(inner)
    bare.layers = []
    bare[family.norm], bare[family.embedding] = nn.Identity(), cut[family.embedding]
    x: mx.array = bare(ids, [_NoCache()] * len(inner.layers))
    return x


class _NoCache:
    """Stands where a model looks for a cache, whichever it makes its masks of."""

    offset = 0


class _Result(StandIn):
    """Stands in for an inner model that has run already."""

    def __init__(self, inner: nn.Module, output: mx.array):
        super().__init__(inner)
        self._output = output

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        output: mx.array = self._output
        return output


class _Listener(nn.Module):
    """Stands in for a module, calls it, and keeps its input and output."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __call__(self, x: mx.array, *rest: Any, **options: Any) -> Any:
        self.input, self.output = x, self.module(x, *rest, **options)
        return self.output


def _listening(mixer: nn.Module, targets: tuple[Target, ...]) -> nn.Module:
    """Return a mixer whose projections that feed its cache are listened to."""
    view = copy.copy(mixer)
    for target in targets:
        view[target.projection] = _Listener(mixer[target.projection])
    return view


def _captured(view: nn.Module, targets: tuple[Target, ...]) -> RawLayer:
    """Return what the projections of a mixer that was listened to read and returned."""
    raw = {target.name: target.of(view[target.projection].output) for target in targets}
    return RawLayer(view[targets[0].projection].input, raw)
