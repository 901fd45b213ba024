"""Where each mlx-lm architecture keeps its raw keys and values. The one place that knows.

A raw key stands straight after the K projection: before k_norm, before RoPE, heads merged ``(B, T, H*D)``.
A raw value likewise. mlx-lm's own modules do all the computing; this module listens to their projections and
cuts a prefix off a model, so nothing here changes when mlx-lm improves one.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ConcatenateKVCache, KVCache, make_prompt_cache

from .errors import UnsupportedModelError

LayerCache = KVCache | ConcatenateKVCache
Cache = list[LayerCache]
ROOM = 64
"""Positions that ``room_for`` rounds up to."""
RawPair = dict[str, mx.array]
"""Raw ``keys`` and ``values`` of one layer."""


@dataclass(frozen=True)
class Family:
    """Attribute names of one architecture.

    ``qkv_proj`` is set where one projection yields query heads, key heads and value heads in that order;
    otherwise ``q_proj``, ``k_proj`` and ``v_proj`` stand alone. ``n_heads``, ``n_kv_heads``, ``scale``, ``rope`` and,
    where there are any, ``q_norm`` and ``k_norm`` are attributes of the attention module everywhere.
    """

    inner: str = "model"
    embedding: str = "embed_tokens"
    attention: str = "self_attn"
    q_proj: str = "q_proj"
    k_proj: str = "k_proj"
    v_proj: str = "v_proj"
    qkv_proj: str | None = None


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "olmo2": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "smollm3": Family(),
    "phi3": Family(qkv_proj="qkv_proj"),
    "openelm": Family(inner="transformer", embedding="token_embeddings", attention="attn", qkv_proj="qkv_proj"),
}


@dataclass(frozen=True)
class KVShape:
    """Key/value heads of one layer."""

    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Features of one raw key or value, ``H*D``."""
        return self.heads * self.head_dim


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


def check_architecture(model_type: str) -> None:
    """Refuse an architecture that has no row.

    Raises:
        UnsupportedModelError: always for an unknown ``model_type``.
    """
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"architecture '{model_type}' is not supported; supported: {', '.join(sorted(FAMILIES))}."
        )


def check_cache(model: nn.Module) -> None:
    """Refuse a model whose cache is not a plain KV cache in every layer.

    Raises:
        UnsupportedModelError: a sliding-window, recurrent or latent cache.
    """
    odd = {type(cache).__name__ for cache in make_prompt_cache(model)} - {"KVCache"}
    if odd:
        raise UnsupportedModelError(
            f"this {model.model_type} model uses {', '.join(sorted(odd))} (a sliding-window, recurrent or latent "
            "cache), which cannot be predicted; choose a model with full attention in every layer."
        )


def family_of(model: nn.Module) -> Family:
    """Return the row of an mlx-lm model.

    Raises:
        UnsupportedModelError: an unknown architecture.
    """
    check_architecture(model.model_type)
    return FAMILIES[model.model_type]


def inner_model(model: nn.Module) -> nn.Module:
    """Return the part between token ids and the final norm, without the output head."""
    return model[family_of(model).inner]


def hidden_size(model: nn.Module) -> int:
    """Return the width of the residual stream."""
    return inner_model(model).norm.weight.shape[0]


def linear_size(module: nn.Module) -> int:
    """Return the number of weights in a module's linear maps, quantised ones as if they were not."""
    size = 0
    for part in module.modules():
        if isinstance(part, nn.QuantizedLinear):
            size += part.weight.size * 32 // part.bits
        elif isinstance(part, nn.Linear):
            size += part.weight.size
    return size


def kv_shapes(model: nn.Module) -> list[KVShape]:
    """Return the key/value shape of every layer (they differ from layer to layer in OpenELM)."""
    family = family_of(model)
    return [_kv_shape(layer[family.attention], family) for layer in model.layers]


def _kv_shape(attention: nn.Module, family: Family) -> KVShape:
    heads = attention.n_kv_heads
    if family.qkv_proj:
        return KVShape(heads, _rows(attention[family.qkv_proj]) // (attention.n_heads + 2 * heads))
    return KVShape(heads, _rows(attention[family.k_proj]) // heads)


def _rows(projection: nn.Module) -> int:
    """Return a projection's output features, be it plain, quantised or with a low-rank update around it."""
    return projection.get("linear", projection).weight.shape[0]


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


def output_head(model: nn.Module, hidden: mx.array) -> mx.array:
    """Return logits ``(B, T, vocab)`` of the inner model's output ``(B, T, hidden)``."""
    if "lm_head" in model:
        return model.lm_head(hidden)
    family = family_of(model)
    return model[family.inner][family.embedding].as_linear(hidden)


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
        width = _kv_shape(attention, family).width
        _, keys, values = mx.split(output, [output.shape[-1] - 2 * width, output.shape[-1] - width], axis=-1)
        return RawLayer(hidden, keys, values)

    for name, listener in zip(names, listeners, strict=True):
        attention[name] = listener
    try:
        yield read
    finally:
        for name, listener in zip(names, listeners, strict=True):
            attention[name] = listener.projection


@contextlib.contextmanager
def room_for(tokens: int, *caches: Cache) -> Iterator[None]:
    """Let caches grow once, by what ``tokens`` more positions and a first step need, while the block runs.

    mlx-lm's own cache grows in steps of 256 and copies all it holds each time; a short batch pays for all 256.
    """
    layers = {id(layer): layer for cache in caches for layer in cache if isinstance(layer, KVCache)}
    for layer in layers.values():
        layer.step = -(-(tokens + 1) // ROOM) * ROOM  # of this cache only
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.step  # the class's again


def append_raw(model: nn.Module, raw: dict[int, RawPair], cache: Cache) -> None:
    """Append raw pairs to a cache as the layers themselves would: k_norm, then RoPE, then the write.

    Layers with the same RoPE are rotated in one call, since most of its cost is the same for all of them.

    Args:
        model: the mlx-lm model that the cache belongs to.
        raw: layer index to its raw ``keys`` and ``values``, each ``(B, T, H*D)``.
        cache: the model's cache; positions count on from the offset, which these layers share.
    """
    family = family_of(model)
    groups: dict[Any, list[int]] = {}
    for layer in raw:
        groups.setdefault(_rope_key(model.layers[layer][family.attention].rope), []).append(layer)
    for layers in groups.values():
        attentions = [model.layers[layer][family.attention] for layer in layers]
        shapes = [_kv_shape(attention, family) for attention in attentions]
        keys = [
            _split_heads(normed_keys(attention, raw[layer]["keys"]), shape)
            for layer, attention, shape in zip(layers, attentions, shapes, strict=True)
        ]
        together = attentions[0].rope(
            mx.concatenate(keys, axis=1), offset=cache[layers[0]].offset
        )  # (B, sum of H, T, D)
        start = 0
        for layer, shape in zip(layers, shapes, strict=True):
            rotated = together[:, start : start + shape.heads]
            cache[layer].update_and_fetch(rotated, _split_heads(raw[layer]["values"], shape))
            start += shape.heads


def _rope_key(rope: nn.Module) -> Any:
    """Return what two RoPE modules must agree in to be called as one; other kinds stand for themselves alone."""
    if type(rope) is nn.RoPE:
        return rope.dims, rope.traditional, rope.base, rope.scale
    return id(rope)


def normed_keys(attention: nn.Module, keys: mx.array) -> mx.array:
    """Apply a layer's k_norm, if it has one, to raw keys ``(B, T, H*D)``."""
    return _normed(attention.get("k_norm"), keys)


def _normed(norm: nn.Module | None, x: mx.array) -> mx.array:
    """Apply a norm, if there is one, to merged heads; it spans one head or all, told by the size of its weight."""
    if norm is None:
        return x
    heads = x.reshape(*x.shape[:2], -1, norm.weight.size)  # (B, T, H*D) -> (B, T, H or 1, D or H*D)
    return norm(heads).reshape(x.shape)


def query_heads(model: nn.Module, layer: int, hidden: mx.array, offset: int) -> mx.array:
    """Return a layer's queries ``(B, query heads, T, D)``, normed and rotated, from what its projections read.

    Args:
        model: the mlx-lm model.
        layer: one of its layers.
        hidden: the projections' input ``(B, T, hidden)``.
        offset: position of the first of these tokens.
    """
    family, attention = family_of(model), attention_of(model, layer)
    shape = KVShape(attention.n_heads, _kv_shape(attention, family).head_dim)
    projected = attention[family.qkv_proj or family.q_proj](hidden)[..., : shape.width]
    return attention.rope(_split_heads(_normed(attention.get("q_norm"), projected), shape), offset=offset)


def attention_of(model: nn.Module, layer: int) -> nn.Module:
    """Return a layer's attention module."""
    return model.layers[layer][family_of(model).attention]


def _split_heads(x: mx.array, shape: KVShape) -> mx.array:
    batch, length, _ = x.shape
    return x.reshape(batch, length, shape.heads, shape.head_dim).transpose(0, 2, 1, 3)  # (B, T, H*D) -> (B, H, T, D)
