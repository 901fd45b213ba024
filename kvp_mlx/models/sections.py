"""Parts of a model as models of their own, run layer by layer, and listened to.

Every view shares the weights of the model it is cut from, and changes nothing in it: threads may share a model.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .families import Cache, Family, attention_of, family_of


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
        The inner model's output ``(B, T, hidden)``, and what the projections of each layer in ``listen`` read and
        returned.
    """
    family, listen = family_of(model), list(listen)
    view = with_attention(model, {layer: _listening(model.layers[layer][family.attention], family) for layer in listen})
    output = view[family.inner](ids, cache)
    return output, {layer: _captured(view.layers[layer][family.attention], family) for layer in listen}


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
    for layer in range(first, len(model.layers)):
        alone = section(model, layer, layer + 1)
        x, raw = run_layers(alone, x, cache[layer : layer + 1], [0] if listen else [])
        streams.append(x)
        if listen:
            captured[layer] = raw[0]
    return streams, captured


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
    outputs, taken, x = [], [], ids
    for number in range(len(model.layers)):
        taken.append(x if streams is None else streams[number])
        listener = _Listener(attention_of(model, number))
        alone = section(with_attention(model, {number: listener}), number, number + 1)
        x, _ = run_layers(alone, taken[-1], cache[number : number + 1])
        outputs.append(listener.output)
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


def with_attention(model: nn.Module, attention: dict[int, nn.Module]) -> nn.Module:
    """Return a model with other attention modules in some layers, sharing everything else."""
    if not attention:
        return model
    family = family_of(model)
    view, inner = copy.copy(model), copy.copy(model[family.inner])
    inner.layers = list(inner.layers)
    for layer, module in attention.items():
        inner.layers[layer] = copy.copy(inner.layers[layer])
        inner.layers[layer][family.attention] = module
    view[family.inner] = inner
    return view


class _Listener(nn.Module):
    """Stands in for a module, calls it, and keeps its input and output."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __call__(self, x: mx.array, *rest: Any) -> mx.array:
        self.input, self.output = x, self.module(x, *rest)
        return self.output


def _listening(attention: nn.Module, family: Family) -> nn.Module:
    """Return an attention module whose K and V projections are listened to."""
    view = copy.copy(attention)
    for name in family.kv_projections:
        view[name] = _Listener(attention[name])
    return view


def _captured(attention: nn.Module, family: Family) -> RawLayer:
    """Return what the projections of a module that was listened to read and returned."""
    listeners = [attention[name] for name in family.kv_projections]
    hidden, output = listeners[0].input, listeners[0].output
    if not family.qkv_proj:
        return RawLayer(hidden, output, listeners[1].output)
    rows, heads = output.shape[-1], attention.n_kv_heads
    width = rows // (attention.n_heads + 2 * heads) * heads
    _, keys, values = mx.split(output, [rows - 2 * width, rows - width], axis=-1)
    return RawLayer(hidden, keys, values)
