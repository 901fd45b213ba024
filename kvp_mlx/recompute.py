"""Selective recomputation: the base itself reads those prompt tokens whose predicted entries will be worst.

Prediction fails on few tokens, and badly (names, figures, rare words). CacheBlend (arXiv 2405.16444) repairs a cache
that it reused by computing the entries anew of those tokens that deviate most; the share of them is its "recompute
ratio". Here the predictor itself tells, from what it is given, by how much it will be wrong.
"""

from typing import Any

import mlx.core as mx

from .bundle import KVPModel
from .families import Cache, LayerCache, run_layers, section
from .positions import rope_at
from .streams import parts


def worst_tokens(deviations: mx.array, ratio: float) -> mx.array:
    """Return the positions (B, n), rising, of the share ``ratio`` of tokens with the largest deviations (B, T)."""
    count = round(ratio * deviations.shape[1])
    return mx.sort(mx.argsort(-deviations, axis=1)[:, :count], axis=1).astype(mx.int32)


def first_layer(model: KVPModel) -> int:
    """Return the base's layer at which recomputation begins: where an exact prefix ends, else its first."""
    return model.config.auxiliary.layers if model.has_exact_prefix else 0


class RewrittenCache:
    """Stands in for one layer's cache: what the layer writes takes the place of entries that are there."""

    def __init__(self, cache: LayerCache, positions: mx.array):
        self.cache = cache
        self.positions = positions
        self.offset = cache.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Replace the entries at the positions; returns all keys and values (B, H, S, D)."""
        held: Any = self.cache
        places = self.positions[:, None, :, None]
        held.keys = mx.put_along_axis(held.keys, mx.broadcast_to(places, keys.shape), keys, axis=2)
        held.values = mx.put_along_axis(held.values, mx.broadcast_to(places, values.shape), values, axis=2)
        return held.keys[..., : self.offset, :], held.values[..., : self.offset, :]

    def make_mask(self, length: int, **_: Any) -> mx.array:
        """Return which entries each token sees ``(B, 1, n, S)``: those up to its own position."""
        return (mx.arange(self.offset) <= self.positions[..., None])[:, None]


def recompute(
    model: KVPModel, x: mx.array, positions: mx.array, cache: Cache, *, step_size: int, streams: list[Any]
) -> None:
    """Let the base read some of the tokens that its cache holds, and replace their entries.

    Args:
        model: the bundle.
        x: what ``first_layer`` takes: the residual stream ``(B, n, hidden)``, or token ids ``(B, n)`` for layer 0.
        positions: the tokens' positions ``(B, n)`` in the cache, rising.
        cache: the base's cache, evaluated afterwards.
        step_size: tokens per chunk.
        streams: what to spread a chunk over, see ``streams``.
    """
    start = first_layer(model)
    above = section(model.base, start, len(model.base.layers))
    for begin in range(0, positions.shape[1], step_size):
        done = begin
        for stream, part in parts(x[:, begin : begin + step_size], streams):
            these = positions[:, done : done + part.shape[1]]
            done += part.shape[1]
            with mx.stream(stream), rope_at(above, these):
                rewritten: Any = [RewrittenCache(layer, these) for layer in cache[start:]]
                run_layers(above, part, rewritten)
        mx.eval([layer.state for layer in cache])
