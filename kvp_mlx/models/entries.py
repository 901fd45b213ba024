"""Writing cache entries as the layers themselves would: k_norm, then RoPE, then the cache's own write."""

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from .families import Cache, KVShape, attention_of, family_of, kv_shape

ROOM = 64
"""Positions that ``room_for`` rounds up to."""
RawPair = dict[str, mx.array]
"""Raw ``keys`` and ``values`` of one layer."""


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
        shapes = [kv_shape(attention, family) for attention in attentions]
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
    shape = KVShape(attention.n_heads, kv_shape(attention, family).head_dim)
    projected = attention[family.qkv_proj or family.q_proj](hidden)[..., : shape.width]
    return attention.rope(_split_heads(_normed(attention.get("q_norm"), projected), shape), offset=offset)


def _split_heads(x: mx.array, shape: KVShape) -> mx.array:
    batch, length, _ = x.shape
    return x.reshape(batch, length, shape.heads, shape.head_dim).transpose(0, 2, 1, 3)  # (B, T, H*D) -> (B, H, T, D)
