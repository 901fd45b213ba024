"""Prompts of several contexts read as one batch."""

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..models.families import Cache, LayerCache
from .context import Context, Pair
from .pace import Pace, Steps
from .prefill import Progress, base_prefilling


def reading_together(
    contexts: Sequence[Context], prompts: Sequence[list[int]], *, progress: Progress | None = None, pace: Pace
) -> Steps[None]:
    """Read several prompts in full up to their last tokens, as one batch padded at its end.

    Args:
        contexts: one for each prompt; plain, and of as many tokens each. They stay as they are until all is read.
        prompts: token ids that begin with what their contexts hold.
        progress: called with (tokens done, tokens to do), of the longest.
        pace: how often to pause between two groups of layers.
    """
    held, longest = len(contexts[0].tokens), max(map(len, prompts)) - 1
    ids = mx.array([[*ids[held:-1], *[0] * (longest - len(ids) + 1)] for ids in prompts])
    cache: Cache = make_prompt_cache(contexts[0].model.base)
    if held:
        rows = zip(*(context.cache for context in contexts), strict=True)
        cache = [_stacked([layer.keys_and_values() for layer in layers]) for layers in rows]
    yield from base_prefilling(contexts[0].model, ids, cache, progress=progress, pace=pace)
    for row, (context, prompt) in enumerate(zip(contexts, prompts, strict=True)):
        end, exact = len(prompt) - 1, context.exact_tokens
        own: Cache = [_row_of(layer, row, end) for layer in cache]
        context.replace(prompt[:-1], own, end if exact == held else exact)


def _stacked(pairs: list[Pair]) -> KVCache:
    keys, values = (mx.concatenate(list(entries)) for entries in zip(*pairs, strict=True))
    return KVCache.from_state((keys, values, keys.shape[2]))


def _row_of(layer: LayerCache, row: int, length: int) -> KVCache:
    keys, values = (mx.contiguous(entries[row : row + 1, :, :length]) for entries in layer.keys_and_values())
    return KVCache.from_state((keys, values, length))
