"""Refinement in idle time: what was predicted is read exactly, from the front, until nothing else is left."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import ConcatenateKVCache, KVCache

from ..errors import InputError
from ..models.entries import held_positions
from ..models.families import Cache
from ..models.sections import run_layers, section
from .context import Context, Pair
from .dial import FULL
from .pace import Pace
from .prefill import catch_up_auxiliary

REFINE_CHUNK_TOKENS = 32
"""1,024 tokens of the default base, two CPU cores: 6.8 s and 7 ms a layer; in chunks of 64 5.3 s and 11 ms."""

CATCH_UP_CHUNK_TOKENS = 16


def idle_work(context: Context) -> Iterator[None]:
    """Do what the next turn gains from: let the auxiliary catch up, then refine. As ``refining``."""
    if context.own_auxiliary_cache is not None:
        yield from _catching_up(context, context.own_auxiliary_cache)
    yield from refining(context)


def refining(context: Context, chunk_tokens: int = REFINE_CHUNK_TOKENS) -> Iterator[None]:
    """Recompute exactly, from the front, whatever is not exact: in place, or beside it and then swapped.

    Yields after every layer of every chunk. Closing the iterator there drops the chunk begun and leaves caches
    that are exact up to ``exact_tokens`` and beyond it as they were. Nothing else may use the context before.

    Raises:
        InputError: the cache was quantised.
    """
    if context.exact_tokens < len(context.tokens) and context.is_quantised:
        raise InputError("a quantised cache cannot be refined; leave out kv_bits.")
    is_rewritable = all(isinstance(layer, KVCache) for layer in context.cache)
    yield from _refining_in_place(context, chunk_tokens) if is_rewritable else _refining_beside(context, chunk_tokens)


def _refining_beside(context: Context, chunk_tokens: int) -> Iterator[None]:
    """Read in a second context what is not exact here, and take over its caches at the end."""
    while context.exact_tokens < len(context.tokens):
        exact = context.beginning()
        context.take_over(exact)  # for whoever closes this meanwhile
        start = len(exact.tokens)
        end = min(start + chunk_tokens, len(context.tokens), *(turn for turn in context.turns if turn > start))
        yield from exact.reading([*context.tokens[:end], 0], FULL, pace=Pace(0.0))  # a pause after every layer
        if end in context.turns:
            exact.remember()
        context.take_over(exact)
        yield


def _refining_in_place(context: Context, chunk_tokens: int) -> Iterator[None]:
    while context.exact_tokens < len(context.tokens):
        start = context.exact_tokens
        end, layers = min(start + chunk_tokens, len(context.tokens)), 0
        x = mx.array([context.tokens[start:end]])
        if (stream := context.prefix_stream) and stream.first <= start < stream.end:
            layers, x = stream.layers, stream.of(start, end)
        exact: list[Pair] = []
        for number in range(layers, len(context.cache)):
            x, pair = _layer_on_exact(context, number, x)
            exact.append(pair)
            yield
        context.overwrite(start, exact)
        yield


def _layer_on_exact(context: Context, number: int, x: mx.array) -> tuple[mx.array, Pair]:
    """Run one layer on ``x``, seeing exact entries only; returns what it makes of it, and its keys and values."""
    start = context.exact_tokens
    seen = ConcatenateKVCache()
    with mx.stream(generation_stream):
        if start:
            seen.update_and_fetch(*(entries[..., :start, :] for entries in context.cache[number].keys_and_values()))
        x, _ = run_layers(section(context.model.base, number, number + 1), x, [seen])
        keys, values = (mx.contiguous(entries[..., start:, :]) for entries in seen.keys_and_values())
        mx.eval(keys, values, [] if number + 1 == len(context.cache) else x)
    return x, (keys, values)


def _catching_up(context: Context, auxiliary_cache: Cache) -> Iterator[None]:
    while (lag := held_positions(auxiliary_cache)) is not None and lag < len(context.tokens):
        catch_up_auxiliary(
            context.model, mx.array([context.tokens[lag : lag + CATCH_UP_CHUNK_TOKENS]]), auxiliary_cache
        )
        yield


def refine(context: Context, **options: Any) -> None:
    """Refine a context to its end."""
    for _ in refining(context, **options):
        pass
