"""Parts of a model as models of their own, run layer by layer, and listened to."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .families import Cache, Family, family_of, kv_shape


@dataclass(frozen=True)
class RawLayer:
    """What one layer's K and V projections read and returned.

    Attributes:
        hidden: their input ``(B, T, hidden)``, RMS-normalised where the architecture does so.
        keys: raw keys ``(B, T, H*D)``.
        values: raw values ``(B, T, H*D)``.
    """

    hidden: mx.array
    keys: mx.array
    values: mx.array


def section(model: nn.Module, first: int, last: int) -> nn.Module:
    """Return layers ``first`` to ``last - 1`` of a model as a model of their own, sharing all weights.

    A section that does not start at layer 0 takes the residual stream ``(B, T, hidden)`` in place of token ids,
    and one that stops before the last layer returns it in place of the normed output.
    """
    family = family_of(model)
    view, inner = copy.copy(model), copy.copy(model[family.inner])
    if first > 0:
        inner[family.embedding] = nn.Identity()
    if last < len(inner.layers):
        inner.norm = nn.Identity()
    inner.layers = inner.layers[first:last]
    view[family.inner] = inner
    return view


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
        The inner model's output ``(B, T, hidden)``, and what each layer in ``listen`` said.
    """
    family = family_of(model)
    with contextlib.ExitStack() as stack:
        heard = {
            layer: stack.enter_context(_listening(model.layers[layer][family.attention], family)) for layer in listen
        }
        output = model[family.inner](ids, cache)
    return output, {layer: read() for layer, read in heard.items()}


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
        ``x``, what each layer but the last returned, and the inner model's normed output; and what each layer said.
    """
    streams, heard = [x], {}
    for layer in range(first, len(model.layers)):
        alone = section(model, layer, layer + 1)
        x, said = run_layers(alone, x, cache[layer : layer + 1], [0] if listen else [])
        streams.append(x)
        if listen:
            heard[layer] = said[0]
    return streams, heard


def attention_outputs(
    model: nn.Module, ids: mx.array, cache: Cache, streams: list[mx.array] | None = None
) -> tuple[list[mx.array], list[mx.array]]:
    """Run a model layer by layer and return the residual streams and what every attention block returned.

    Args:
        model: an mlx-lm model.
        ids: token ids ``(B, T)`` at the positions that follow the cache, which is extended.
        cache: the model's cache.
        streams: what each layer is to take, in place of what the one below returned (from an earlier run).
    """
    family = family_of(model)
    outputs, taken, x = [], [], ids
    for number, layer in enumerate(model.layers):
        taken.append(x if streams is None else streams[number])
        listener = layer[family.attention] = _Listener(layer[family.attention])
        try:
            x, _ = run_layers(section(model, number, number + 1), taken[-1], cache[number : number + 1])
        finally:
            layer[family.attention] = listener.projection
        outputs.append(listener.heard[1])
    return taken, outputs


def early_exit(model: nn.Module, layers: int) -> nn.Module:
    """Return a model's first layers with its own final norm, so that its head can be asked what they know."""
    view = section(model, 0, layers)
    family = family_of(model)
    view[family.inner].norm = model[family.inner].norm
    return view


def only_layers(model: nn.Module, layers: Sequence[int]) -> nn.Module:
    """Return a model of some of a model's layers, in their order, sharing all weights."""
    family = family_of(model)
    view, inner = copy.copy(model), copy.copy(model[family.inner])
    inner.layers = [inner.layers[layer] for layer in layers]
    view[family.inner] = inner
    return view


def output_head(model: nn.Module, hidden: mx.array) -> mx.array:
    """Return logits ``(B, T, vocab)`` of the inner model's output ``(B, T, hidden)``."""
    if "lm_head" in model:
        return model.lm_head(hidden)
    family = family_of(model)
    return model[family.inner][family.embedding].as_linear(hidden)


class _Listener(nn.Module):
    """Stands in for a module, calls it, and keeps what went in and came out."""

    def __init__(self, projection: nn.Module):
        super().__init__()
        self.projection = projection

    def __call__(self, x: mx.array, *rest: Any) -> mx.array:
        self.heard = (x, self.projection(x, *rest))
        return self.heard[1]


@contextlib.contextmanager
def _listening(attention: nn.Module, family: Family) -> Iterator[Callable[[], RawLayer]]:
    """Listen to one layer's projections while the block runs; the yielded function tells what they said."""
    names = [family.qkv_proj] if family.qkv_proj else [family.k_proj, family.v_proj]
    listeners = [_Listener(attention[name]) for name in names]

    def read() -> RawLayer:
        hidden, output = listeners[0].heard
        if not family.qkv_proj:
            return RawLayer(hidden, output, listeners[1].heard[1])
        width = kv_shape(attention, family).width
        _, keys, values = mx.split(output, [output.shape[-1] - 2 * width, output.shape[-1] - width], axis=-1)
        return RawLayer(hidden, keys, values)

    for name, listener in zip(names, listeners, strict=True):
        attention[name] = listener
    try:
        yield read
    finally:
        for name, listener in zip(names, listeners, strict=True):
            attention[name] = listener.projection
