"""Refinement while decoding: beside each new token the base reads some of what was predicted, exactly.

A step of decoding reads all of the base's weights for one token, so that a few dozen tokens more cost little where
memory is what it waits for. They are taken from the front: what stands before them is exact, and so are they then. An
answer of some length thus rests on full prefill's entries but for its beginning, which comes as soon as without.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..bundle.loading import KVPModel
from ..models.families import Cache, LayerCache, fixed_kinds
from ..models.positions import at_positions
from ..models.sections import output_head, run_layers
from .context import Context


def can_refine(model: KVPModel, cache: Cache) -> bool:
    """Return whether a base can replace the entries of a cache one by one, while it decodes."""
    is_plain = all(type(layer) is KVCache for layer in cache)
    return model.hosts is None and model.config.has_predictor and is_plain and not fixed_kinds(model.base)


def refining_network(context: Context, ids: list[int], refine_tokens: int) -> "RefiningNetwork | None":
    """Return what decodes behind a prompt that a context holds, and refines it; None where it cannot or need not."""
    is_exact = context.exact_tokens >= len(context.tokens)
    if not refine_tokens or is_exact or not can_refine(context.model, context.cache):
        return None
    return RefiningNetwork(context.model.base, ids, context.exact_tokens, refine_tokens)


class RefiningNetwork(nn.Module):
    """Stands in for the base where mlx-lm decodes one sequence.

    Attributes:
        exact_tokens: how many of the first tokens in the cache have the entries that full prefill would give.

    Args:
        network: the base; see ``can_refine``.
        ids: the tokens that its cache holds, all of them.
        exact_tokens: see above, to begin with.
        refine_tokens: how many are read beside those of each call.
    """

    def __init__(self, network: nn.Module, ids: Sequence[int], exact_tokens: int, refine_tokens: int):
        super().__init__()
        self.network, self.exact_tokens = network, exact_tokens
        self._refine_tokens, self._ids = refine_tokens, mx.array([ids], dtype=mx.int32)

    def __call__(self, ids: mx.array, cache: Cache) -> mx.array:
        """Return the base's logits ``(1, T, vocab)`` for ``ids`` (1, T) on top of its cache; lazy."""
        held: int = cache[0].offset
        end = held + ids.shape[1]
        first, last = self.exact_tokens, min(self.exact_tokens + self._refine_tokens, held)
        if first == held:
            logits: mx.array = self.network(ids, cache=cache)
        else:
            self._ids = mx.concatenate([self._ids, ids.astype(mx.int32)], axis=1)
            logits = self._refined(first, last, held, end, cache)
        self.exact_tokens = end if last == held else last
        return logits

    def _refined(self, first: int, last: int, held: int, end: int, cache: Cache) -> mx.array:
        """Read tokens ``first`` to ``last`` again and ``held`` to ``end`` anew; returns the logits of the latter."""
        positions = mx.concatenate([mx.arange(first, last), mx.arange(held, end)])[None]
        refined: Any = [_RefinedCache(layer, first, last, positions) for layer in cache]
        x = mx.take_along_axis(self._ids, positions, axis=1)
        output, _ = run_layers(at_positions(self.network, positions), x, refined)
        return output_head(self.network, output[:, last - first :])


class _RefinedCache:
    """Stands in for one layer's cache: some of what the layer writes takes the place of entries ``first`` to ``last``.

    Attributes:
        offset: entries that are seen.
    """

    def __init__(self, cache: LayerCache, first: int, last: int, positions: mx.array):
        self.offset = cache.offset + positions.shape[1] - (last - first)
        self._cache, self._first, self._last, self._positions = cache, first, last, positions

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take entries (1, H, T, D), those to replace and then new ones; returns all (1, H, S, D)."""
        held: Any = self._cache
        first, last = self._first, self._last
        held.keys[..., first:last, :] = keys[..., : last - first, :]
        held.values[..., first:last, :] = values[..., : last - first, :]
        seen: tuple[mx.array, mx.array] = held.update_and_fetch(
            keys[..., last - first :, :], values[..., last - first :, :]
        )
        return seen

    def make_mask(self, length: int, **_: Any) -> mx.array:
        """Return which entries each token sees ``(1, 1, T, S)``: those up to its own position."""
        return (mx.arange(self.offset) <= self._positions[..., None])[:, None]
