"""Writing cache entries as the layers themselves would."""

import contextlib
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from .families import Cache, hidden_size, inner_model, kinds_of, mixer_of, targets_of
from .kinds import Kind, Layer, RawOutputs
from .loading import compute_dtype

ROOM = 64
"""Positions that ``room_for`` rounds up to."""


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


def open_caches(model: nn.Module) -> Cache:
    """Return empty caches, one a layer, that gradients flow through."""
    return [kind.open_cache() for kind in kinds_of(model)]


def one_token_cache(model: nn.Module) -> Cache:
    """Return a model's cache of one token, of which nobody evaluates more than kinds, shapes and types."""
    cache, dtype = make_prompt_cache(model), compute_dtype(model)
    layers = enumerate(targets_of(model))
    append_raw(model, {n: {t.name: mx.zeros((1, 1, t.width), dtype) for t in targets} for n, targets in layers}, cache)
    return cache


def held_positions(cache: Cache) -> int | None:
    """Return how many positions a model's cache holds, by the first layer that counts them; None where none does."""
    return next((layer.offset for layer in cache if hasattr(layer, "offset")), None)


def append_raw(model: nn.Module, raw: dict[int, RawOutputs], cache: Cache, tokens: int | None = None) -> None:
    """Append to a cache what the layers themselves would, had their projections returned this.

    Args:
        model: the mlx-lm model that the cache belongs to.
        raw: layer index to what its projections returned, by target ``(B, T, width)``; of the last positions alone
            where a layer needs no others.
        cache: the model's cache; positions count on from the offset, which these layers share.
        tokens: T (default: that of the longest array).
    """
    kinds, layers = kinds_of(model), inner_model(model).layers
    groups: dict[type[Kind], list[Layer]] = {}
    for number, outputs in raw.items():
        kind = kinds[number]
        layer = Layer(kind, layers[number][kind.mixer], outputs, cache[number])
        groups.setdefault(type(kind), []).append(layer)
    arrays = [array for outputs in raw.values() for array in outputs.values()]
    for group, members in groups.items():
        group.write_all(members, _anything(model, arrays, tokens))


def compared(model: nn.Module, layer: int, raw: RawOutputs) -> list[mx.array]:
    """Return arrays (B, T, features) by whose distance predictions of a layer are compared (see ``Kind.compared``)."""
    kind, mixer = kinds_of(model)[layer], mixer_of(model, layer)
    return kind.compared(mixer, raw, _anything(model, list(raw.values())))


def _anything(model: nn.Module, arrays: list[mx.array], tokens: int | None = None) -> mx.array:
    """Return something of the shape (B, T, hidden) that a layer reads; nobody ever evaluates it."""
    length = max(array.shape[1] for array in arrays) if tokens is None else tokens
    return mx.zeros((arrays[0].shape[0], length, hidden_size(model)), arrays[0].dtype)
