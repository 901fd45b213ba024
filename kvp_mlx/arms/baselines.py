"""The paper's other ways to a sooner first token, and SpecPrefill's, as plain functions.

All take a whole prompt ``ids`` (B, N) and return caches for its first N-1 tokens, so that the answering model goes
on with the last one, as after ``predict_base_cache``; ``step_size`` is the number of tokens per chunk (default:
``default_step_size()``), whose parts run side by side on CPU as in prediction. Most leave tokens out. RoPE knows only
distances, so instead of leaving gaps, what is kept is moved up to the prompt's end: with d tokens dropped, token p
stands at p - d. All distances are those of the whole prompt, a cache's offset is its length, and mlx-lm decodes on it
as on any other. Sources: arXiv 2410.08391 section 4 (random and static pruning, layer pruning), 2407.14057
(LazyLLM), 2502.02789 (SpecPrefill).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache

from ..bundle.loading import KVPModel
from ..device.streams import chunks, parts, side_by_side
from ..engine.recompute import largest
from ..models.attention import last_attention
from ..models.entries import room_for
from ..models.families import Cache, LayerCache
from ..models.positions import at_positions
from ..models.pruning import retained_layers
from ..models.sections import early_exit, only_layers, run_layers, section

STATIC_DEPTH = 0.25
LAZY_DEPTHS = (0.3, 0.9)
SPEC_CHUNK_TOKENS = 8


def auxiliary_alone(model: KVPModel) -> nn.Module:
    """Return the auxiliary as a model that answers; for a prefix, its layers under the base's norm and head."""
    return early_exit(model.base, model.config.auxiliary.layers) if model.is_prefix else model.auxiliary


def layer_pruned(base: nn.Module, retention: float) -> nn.Module:
    """Return the base with only 0.75, 0.5 or 0.25 of its layers, the weights shared and not fine-tuned."""
    return only_layers(base, retained_layers(len(base.layers), retention))


def kept_count(tokens: int, retention: float) -> int:
    """Return how many of ``tokens`` a retention keeps, at least one."""
    return max(1, round(retention * tokens))


def random_prefill(
    model: nn.Module, ids: mx.array, retention: float, *, seed: int = 0, step_size: int | None = None
) -> Cache:
    """RP: the model reads a random part of the prompt."""
    tokens = ids.shape[1] - 1
    order = mx.random.permutation(tokens, key=mx.random.key(seed))
    kept = mx.sort(order[: kept_count(tokens, retention)])
    return read_kept(model, ids, mx.broadcast_to(kept, (ids.shape[0], kept.size)), step_size)


def static_prefill(model: nn.Module, ids: mx.array, retention: float, *, step_size: int | None = None) -> Cache:
    """SP: the first quarter of the layers reads all; the model then reads what that part's attention is on.

    A token's importance is the attention that the prompt's last token pays to it, a mean over heads and layers.
    """
    rows = last_token_attention(section(model, 0, static_layers(model)), ids, step_size)
    importance = mx.stack([row.mean(axis=1) for row in rows]).mean(axis=0)  # (B, query heads, N-1) -> (B, N-1)
    return read_kept(model, ids, largest(importance, kept_count(ids.shape[1] - 1, retention)), step_size)


def static_layers(model: nn.Module) -> int:
    """Return how many layers ``static_prefill`` runs to choose."""
    return max(1, round(STATIC_DEPTH * len(model.layers)))


def spec_prefill(
    model: KVPModel,
    ids: mx.array,
    retention: float,
    *,
    chunk_tokens: int = SPEC_CHUNK_TOKENS,
    step_size: int | None = None,
) -> Cache:
    """SpecPrefill without look-ahead: the base reads the stretches that the auxiliary's attention is on.

    Importance is the attention that the prompt's last token pays, the largest over heads and layers, a mean over
    each stretch of ``chunk_tokens``.
    """
    rows = last_token_attention(model.auxiliary, ids, step_size)
    importance = mx.stack([row.max(axis=1) for row in rows]).max(axis=0)  # (B, query heads, N-1) -> (B, N-1)
    kept = largest(chunk_means(importance, chunk_tokens), kept_count(ids.shape[1] - 1, retention))
    return read_kept(model.base, ids, kept, step_size)


def chunk_means(x: mx.array, size: int) -> mx.array:
    """Replace every ``size`` neighbours in ``x`` (B, T) by their mean; the last ones may be fewer."""
    tokens = x.shape[1]
    whole = mx.pad(x, [(0, 0), (0, -tokens % size)]).reshape(x.shape[0], -1, size)  # (B, T) -> (B, chunks, size)
    counts = mx.clip(tokens - size * mx.arange(whole.shape[1]), 1, size)
    means = whole.sum(axis=-1) / counts
    return mx.repeat(means, size, axis=1)[:, :tokens]


def lazy_prefill(model: nn.Module, ids: mx.array, first: float, last: float, *, step_size: int | None = None) -> Cache:
    """LazyLLM ``L first-last``: each layer passes on only the tokens that its last query pays most attention to.

    Retention falls in a line from ``first`` at 30 % of depth to ``last`` at 90 %. The layers' caches differ in
    length; dropped tokens stay dropped while decoding (LazyLLM would revive some).
    """
    tokens, depth = ids.shape[1] - 1, len(model.layers)
    kept = mx.broadcast_to(mx.arange(tokens + 1), ids.shape)  # positions in the prompt, the last token's included
    cache, x = make_prompt_cache(model), ids
    with reading(model, ids, cache) as streams:
        for layer in range(depth):
            positions = kept - (tokens + 1 - kept.shape[1])
            count = kept_count(tokens, lazy_retention(layer + 1, depth, first, last)) if layer + 1 < depth else tokens
            x, row = read_layer(model, layer, x, cache[layer], positions, streams, step_size)
            if count < kept.shape[1] - 1:
                end = mx.full((ids.shape[0], 1), kept.shape[1] - 1)
                chosen = mx.concatenate([largest(row.mean(axis=1), count), end], axis=1)
                x = mx.take_along_axis(x, chosen[..., None], axis=1)
                kept = mx.take_along_axis(kept, chosen, axis=1)
        mx.eval([part.state for part in cache])
    for part in cache:
        part.trim(1)  # the last token, which the model reads again
    return cache


def lazy_retention(layer: int, depth: int, first: float, last: float) -> float:
    """Return the share of the prompt's tokens that a layer of LazyLLM reads."""
    start, end = LAZY_DEPTHS
    place = layer / depth
    if place < start:
        return 1.0
    return first + (last - first) * min(1.0, (place - start) / (end - start))


def read_layer(
    model: nn.Module,
    layer: int,
    x: mx.array,
    cache: LayerCache,
    positions: mx.array,
    streams: list[Any],
    step_size: int | None,
) -> tuple[mx.array, mx.array]:
    """Run one layer over ``x`` (B, T, hidden), or ids for layer 0, at ``positions`` (B, T); lazy.

    Returns the residual stream after it, and the last token's attention to the others (B, query heads, T-1).
    """
    alone, outputs = section(model, layer, layer + 1), []
    for chunk, end in chunks(x, step_size):
        for stream, part, place in placed_parts(chunk, end, streams):
            with mx.stream(stream):
                output, captured = run_layers(at_positions(alone, positions[:, place]), part, [cache], [0])
            outputs.append(output)
    return mx.concatenate(outputs, axis=1), to_others(alone, 0, captured[0].hidden, cache)


def read_kept(model: nn.Module, ids: mx.array, kept: mx.array, step_size: int | None = None) -> Cache:
    """Let a model read the tokens ``kept`` (B, K), rising positions in ``ids`` (B, N), and no others."""
    cache, dropped = make_prompt_cache(model), ids.shape[1] - 1 - kept.shape[1]
    tokens = mx.take_along_axis(ids, kept, axis=1)
    positions = kept.astype(mx.int32) - dropped  # sorting yields unsigned numbers, and these may fall below 0
    with reading(model, tokens, cache) as streams:
        for chunk, end in chunks(tokens, step_size):
            for stream, part, place in placed_parts(chunk, end, streams):
                with mx.stream(stream):
                    run_layers(at_positions(model, positions[:, place]), part, cache)
            mx.eval([layer.state for layer in cache])
    return cache


@contextmanager
def reading(model: nn.Module, ids: mx.array, cache: Cache) -> Iterator[list[Any]]:
    """Prepare for a model to read ``ids`` (B, T) into a cache; yields the streams for ``parts``."""
    with (
        wired_limit(model),
        room_for(ids.shape[1], cache),
        side_by_side(ids.size) as streams,
        mx.stream(generation_stream),
    ):
        yield streams


def placed_parts(chunk: mx.array, end: int, streams: list[Any]) -> Iterator[tuple[Any, mx.array, slice]]:
    """Cut a chunk (B, T) that ends before token ``end`` into ``parts``; yields with each where it stands."""
    start = end - chunk.shape[1]
    for stream, part in parts(chunk, streams):
        yield stream, part, slice(start, start := start + part.shape[1])


def last_token_attention(model: nn.Module, ids: mx.array, step_size: int | None = None) -> list[mx.array]:
    """Return, per layer, the last token's attention (B, query heads, N-1) to the tokens before it in ``ids`` (B, N).

    Of the last layer only the projections of keys and values and one query are computed.
    """
    cache, layers = make_prompt_cache(model), range(len(model.layers))
    with reading(model, ids, cache) as streams:
        for chunk, _ in chunks(ids, step_size):
            for stream, part in parts(chunk, streams):
                with mx.stream(stream):
                    _, captured = run_layers(model, part, cache, layers)  # lazy: only the last part's are computed
            mx.eval([layer.state for layer in cache])
        rows = [to_others(model, layer, captured[layer].hidden, cache[layer]) for layer in layers]
        mx.eval(rows)
    return rows


def to_others(model: nn.Module, layer: int, hidden: mx.array, cache: LayerCache) -> mx.array:
    """Return the attention (B, query heads, S-1) that the newest token pays to all others in a layer's cache."""
    return last_attention(model, layer, hidden, cache)[:, :, 0, :-1]
