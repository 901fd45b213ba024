"""Filling the base's cache with a prompt: by auxiliary prefill and prediction, or by the base's own full prefill.

``predict_base_cache`` and ``base_prefill`` return the same thing, a list of mlx-lm caches, so that everything after
the prompt is mlx-lm's own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..bundle.loading import KVPModel
from ..device.streams import chunks, default_step_size, parts, release_buffers, side_by_side
from ..errors import InputError
from ..models.entries import append_raw, room_for
from ..models.families import Cache, is_listed
from ..models.sections import run_layers, section
from .dial import Dial
from .recompute import repair

Progress = Callable[[int, int], None]


@dataclass
class PrefillTimes:
    """Where the time before the first base step went, in milliseconds.

    ``recompute_ms`` and ``recomputed_tokens`` (of each sequence) are the base's own reading after prediction, the
    exact tail included.
    """

    auxiliary_prefill_ms: float = 0.0
    predict_ms: float = 0.0
    recompute_ms: float = 0.0
    base_prefill_ms: float = 0.0
    recomputed_tokens: int = 0


def auxiliary_prefill(model: KVPModel, ids: mx.array, cache: Cache) -> tuple[dict[str, mx.array], mx.array]:
    """Let the auxiliary read ``ids`` (B, T) on top of its ``cache``; lazy.

    Returns the predictor's inputs, and what the base goes on with where it reads a token itself: an exact prefix's
    residual stream (B, T, hidden), else the ids. No logits, final norm, last attention output or last FFN are
    computed.
    """
    sources = model.predictor.sources
    if not model.has_exact_prefix:
        _, captured = run_layers(model.auxiliary, ids, cache, sources)
        return model.predictor.inputs(captured), ids
    end = model.config.auxiliary.layers
    below, captured = run_layers(section(model.auxiliary, 0, end), ids, cache[:end], [s for s in sources if s < end])
    _, last = run_layers(section(model.auxiliary, end, end + 1), below, cache[end:], [0])
    return model.predictor.inputs(captured | {end: last[0]}), below


def write_predicted(model: KVPModel, inputs: dict[str, mx.array], cache: Cache) -> None:
    """Predict raw keys and values and append them, normed and rotated, to the base's ``cache``; lazy."""
    append_raw(model.base, model.predictor(inputs), cache)


def auxiliary_cache_for(model: KVPModel, cache: Cache) -> Cache:
    """Return the cache the auxiliary fills: the base's own first layers for a prefix, else a fresh one."""
    return cache[: len(model.auxiliary.layers)] if model.is_prefix else make_prompt_cache(model.auxiliary)


def predict_base_cache(
    model: KVPModel,
    ids: mx.array,
    cache: Cache | None = None,
    auxiliary_cache: Cache | None = None,
    *,
    exact_tail: int = 0,
    recompute: float | None = None,
    prefill_step_size: int | None = None,
    times: PrefillTimes | None = None,
    progress: Progress | None = None,
) -> Cache:
    """Fill the base's cache for ``ids``; the base itself reads only the exact tail and what is to be recomputed.

    Args:
        model: the bundle.
        ids: token ids ``(B, T)``, T >= 1, all of one length.
        cache: base cache to append to (default: a new one). Positions count on from its offset.
        auxiliary_cache: the auxiliary's own cache at the same offset (kinds ``model`` and ``pruned``; a prefix
            fills the base's). Only a new conversation may leave it out.
        exact_tail: the base reads this many of the last tokens itself, on top of the prediction of the others.
        recompute: the share of the other tokens that it also reads itself (default: the bundle's).
        prefill_step_size: tokens per chunk (default: ``default_step_size()``); bounds the activations' memory.
        times: filled with what each part took.
        progress: called with (tokens done, tokens in all) after every chunk.

    Returns:
        One mlx-lm ``KVCache`` per base layer, evaluated, T positions longer.

    Raises:
        InputError: the auxiliary has not read what the base's cache holds, a negative exact tail, a share that the
            bundle cannot recompute, or a quantised cache where the base is to read on top of the prediction.
    """
    cache = make_prompt_cache(model.base) if cache is None else cache
    auxiliary_cache = auxiliary_cache_for(model, cache) if auxiliary_cache is None else auxiliary_cache
    times = PrefillTimes() if times is None else times
    share = Dial("kvp", 0, exact_tail, recompute).share(model.config)
    is_repaired = bool(model.predictor.blocks) and (share > 0 or exact_tail > 0)
    _check_caches(cache, auxiliary_cache, is_repaired)
    below: list[mx.array] = []
    deviations: list[mx.array] = []
    with wired_limit(model.base), room_for(ids.shape[1], cache, auxiliary_cache):
        with side_by_side(ids.size) as streams:
            for chunk, done in chunks(ids, prefill_step_size):
                outputs, estimates = predict_chunk(model, chunk, streams, cache, auxiliary_cache, times, share > 0)
                if is_repaired:
                    below += outputs
                    deviations += estimates
                release_buffers()
                if progress:
                    progress(done, ids.shape[1])
        if is_repaired:
            start, size = time.perf_counter(), prefill_step_size or default_step_size()
            estimated = mx.concatenate(deviations, axis=1) if deviations else None
            x, tail = mx.concatenate(below, axis=1), min(exact_tail, ids.shape[1])
            times.recomputed_tokens += repair(model, x, estimated, cache, share, tail, size)
            times.recompute_ms += 1e3 * (time.perf_counter() - start)
    return cache


def _check_caches(cache: Cache, auxiliary_cache: Cache, is_repaired: bool) -> None:
    """Refuse caches that prediction cannot go on from (see ``predict_base_cache``)."""
    if auxiliary_cache[0].offset != cache[0].offset:
        raise InputError(
            f"the auxiliary has read {auxiliary_cache[0].offset} positions, the base's cache holds {cache[0].offset}; "
            "pass the auxiliary_cache that belongs to it (catch_up_auxiliary brings it up to date)."
        )
    if is_repaired and not all(isinstance(layer, KVCache) for layer in cache):
        raise InputError(
            "a quantised cache takes predictions only; leave out kv_bits, or recomputation and exact tail."
        )


def predict_chunk(
    model: KVPModel,
    chunk: mx.array,
    streams: list[Any],
    cache: Cache,
    auxiliary_cache: Cache,
    times: PrefillTimes,
    is_estimated: bool,
) -> tuple[list[mx.array], list[mx.array]]:
    """Read a chunk (B, T), part by part, and append its prediction to the base's ``cache``, evaluated.

    Returns of each part what ``repair`` takes: what the base goes on from, and with ``is_estimated`` the estimated
    deviations.
    """
    start = time.perf_counter()
    readings = []
    for stream, part in parts(chunk, streams):
        with mx.stream(stream):
            readings.append((stream, *auxiliary_prefill(model, part, auxiliary_cache)))
    mx.eval(_state(auxiliary_cache), [reading[1:] for reading in readings])
    done_reading = time.perf_counter()
    deviations = []
    for stream, inputs, _ in readings:
        with mx.stream(stream):
            write_predicted(model, inputs, cache)
            if is_estimated and model.predictor.blocks:
                deviations.append(model.predictor.deviations(inputs))
    mx.eval(_state(cache), deviations)
    times.auxiliary_prefill_ms += 1e3 * (done_reading - start)
    times.predict_ms += 1e3 * (time.perf_counter() - done_reading)
    return [below for _, _, below in readings], deviations


def catch_up_auxiliary(model: KVPModel, ids: mx.array, auxiliary_cache: Cache) -> None:
    """Let the auxiliary read ``ids`` (B, T) without predicting anything from it (a reply that the base wrote)."""
    read_prompt(model.auxiliary, ids, auxiliary_cache)


def base_prefill(
    model: KVPModel,
    ids: mx.array,
    cache: Cache | None = None,
    *,
    prefill_step_size: int | None = None,
    times: PrefillTimes | None = None,
    progress: Progress | None = None,
) -> Cache:
    """Fill the base's cache for ``ids`` by running the base itself, as mlx-lm does; arguments as above."""
    cache = make_prompt_cache(model.base) if cache is None else cache
    start = time.perf_counter()
    read_prompt(model.base, ids, cache, prefill_step_size, progress)
    if times is not None:
        times.base_prefill_ms += 1e3 * (time.perf_counter() - start)
    return cache


def read_prompt(
    model: nn.Module,
    ids: mx.array,
    cache: Cache,
    prefill_step_size: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Let a model read ``ids`` (B, T) on top of its ``cache``, chunk by chunk."""
    rows = ids.size if is_listed(model) else 0  # what other architectures keep may not take two parts at once
    with wired_limit(model), side_by_side(rows) as streams, room_for(ids.shape[1], cache):
        for chunk, done in chunks(ids, prefill_step_size):
            for stream, part in parts(chunk, streams):
                with mx.stream(stream):
                    if is_listed(model):
                        run_layers(model, part, cache)
                    else:
                        model(part, cache=cache)
            mx.eval(_state(cache))
            release_buffers()
            if progress:
                progress(done, ids.shape[1])


def fill(
    model: KVPModel,
    ids: mx.array,
    cache: Cache,
    auxiliary_cache: Cache,
    dial: Dial,
    **report: Any,
) -> None:
    """Bring caches that hold the beginning of prompts up to the last token, as a settled dial says.

    Args:
        model: the bundle.
        ids: the whole prompts ``(B, N)``.
        cache: the base's cache, extended in place to N-1 positions.
        auxiliary_cache: the auxiliary's; it may have read less than the base's cache holds.
        dial: its path is ``full`` or ``kvp``.
        report: ``prefill_step_size``, ``times`` and ``progress``, as in ``predict_base_cache``.
    """
    end, held = ids.shape[1] - 1, cache[0].offset
    exact = max(held, min(dial.exact_head, end) if dial.path == "kvp" else end)
    if held < exact:
        base_prefill(model, ids[:, held:exact], cache, **report)
    if exact < end:
        if (lag := auxiliary_cache[0].offset) < exact:
            catch_up_auxiliary(model, ids[:, lag:exact], auxiliary_cache)
        how: dict[str, Any] = {"exact_tail": min(dial.exact_tail, end - exact), "recompute": dial.recompute}
        predict_base_cache(model, ids[:, exact:end], cache, auxiliary_cache, **how, **report)


def _state(cache: Cache) -> list[Any]:
    return [layer.state for layer in cache]
