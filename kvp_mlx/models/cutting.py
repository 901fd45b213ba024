"""Caches cut to fewer tokens; what cannot be cut is kept as it was."""

import copy
from typing import NamedTuple

from mlx_lm.models.cache import ConcatenateKVCache, KVCache, QuantizedKVCache

from .families import Cache, LayerCache

TRIMMABLE = KVCache | QuantizedKVCache | ConcatenateKVCache
"""Caches of all keys and values; the others (windows, states) cannot go back, or only for a while."""


class Frozen(NamedTuple):
    """What cannot be trimmed of a cache, by layer, as it was when it held ``length`` tokens."""

    length: int
    layers: dict[int, LayerCache]


Snapshot = list[Frozen]
"""Of the base's cache, and of the auxiliary's where it has its own."""


def frozen(cache: Cache, length: int) -> Frozen:
    """Return what cannot be trimmed of a cache of so many tokens; it shares the numbers until the cache changes."""
    return Frozen(length, {n: copy.deepcopy(one) for n, one in enumerate(cache) if not isinstance(one, TRIMMABLE)})


def thaw(cache: Cache, kept: Frozen) -> None:
    """Bring a cache back to what it was."""
    for number, layer in enumerate(cache):
        if number in kept.layers:
            cache[number] = copy.deepcopy(kept.layers[number])
        else:
            layer.trim(max(0, layer.offset - kept.length))


def trim_to(cache: Cache, length: int) -> int:
    """Trim every layer to ``length`` tokens or to what the shortest one holds; returns what is left."""
    length = min(length, *(layer.offset for layer in cache))
    for layer in cache:
        layer.trim(layer.offset - length)
    return length


def first_entries(cache: Cache, length: int) -> Cache:
    """Return a cache of the first ``length`` entries, or of all; layers of other kinds than mlx-lm's plain one whole.

    It shares the numbers until one of the two caches changes, and leaves out mlx-lm's room for more.
    """
    return [_first_of_layer(layer, length) for layer in cache]


def _first_of_layer(layer: LayerCache, length: int) -> LayerCache:
    if not isinstance(layer, KVCache):
        return copy.deepcopy(layer)
    if not (length := min(length, layer.offset)):
        return KVCache()
    keys, values = layer.keys_and_values()
    return KVCache.from_state((keys[..., :length, :], values[..., :length, :], length))
