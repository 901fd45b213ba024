"""Filling the base's cache with a prompt: by auxiliary prefill and prediction, or by the base's own full prefill.

``predict_base_cache`` and ``base_prefill`` return the same thing, a list of mlx-lm caches, so that everything after
the prompt is mlx-lm's own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..bundle.loading import KVPModel
from ..device.streams import chunks, default_step_size, parts, release_buffers, side_by_side
from ..errors import InputError
from ..models.entries import append_raw, held_positions, room_for
from ..models.families import Cache, fixed_kinds, is_listed
from ..models.sections import RawLayer, run_layers, section
from .dial import PREDICT, Dial
from .pace import Pace, Steps, finish, groups
from .recompute import repairing, spans, work_of

Progress = Callable[[int, int], None]
T = TypeVar("T")


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


@dataclass
class Tally:
    """Tells ``progress`` of work that is counted in tokens times layers how many of so many ``tokens`` that is."""

    progress: Progress | None
    tokens: int
    work: int
    done: int = 0

    def add(self, work: int) -> None:
        """Take note of more that is done."""
        self.done += work
        if self.progress:
            self.progress(self.tokens * self.done // self.work, self.tokens)


@dataclass
class AuxiliaryReading:
    """A part of a prompt on its way through the auxiliary: ``x`` is what the next layer takes."""

    x: mx.array
    captured: dict[int, RawLayer] = field(default_factory=dict)

    def run(self, model: KVPModel, cache: Cache, layers: slice) -> None:
        """Run some of the auxiliary's layers, listening to the predictor's sources; lazy."""
        numbers = [number for number in model.predictor.sources if layers.start <= number < layers.stop]
        view = section(model.auxiliary, layers.start, layers.stop)
        self.x, captured = run_layers(view, self.x, cache[layers], [number - layers.start for number in numbers])
        self.captured |= {number: captured[number - layers.start] for number in numbers}

    def inputs(self, model: KVPModel, cache: Cache) -> dict[str, mx.array]:
        """Return the predictor's inputs when all layers have run; an exact prefix listens to one layer more."""
        if model.has_exact_prefix:
            end = read_layers(model)
            _, last = run_layers(section(model.auxiliary, end, end + 1), self.x, cache[end:], [0])
            return model.predictor.inputs(self.captured | {end: last[0]})
        return model.predictor.inputs(self.captured)


def read_layers(model: KVPModel) -> int:
    """Return how many of the auxiliary's layers are run to their end."""
    return model.config.auxiliary.layers if model.has_exact_prefix else len(model.auxiliary.layers)


def auxiliary_prefill(model: KVPModel, ids: mx.array, cache: Cache) -> tuple[dict[str, mx.array], mx.array]:
    """Let the auxiliary read ``ids`` (B, T) on top of its ``cache``; lazy.

    Returns the predictor's inputs, and what the base goes on with where it reads a token itself: an exact prefix's
    residual stream (B, T, hidden), else the ids. No logits, final norm, last attention output or last FFN are
    computed.
    """
    reading = AuxiliaryReading(ids)
    reading.run(model, cache, slice(0, read_layers(model)))
    return reading.inputs(model, cache), reading.x if model.has_exact_prefix else ids


def write_predicted(model: KVPModel, inputs: dict[str, mx.array], cache: Cache, following: int | None = None) -> None:
    """Predict what feeds the base's ``cache`` and append what its layers make of it; lazy.

    ``following`` are the prompt's tokens after these (see ``Predictor``).
    """
    if inputs:
        tokens = next(iter(inputs.values())).shape[1]
        append_raw(model.base, model.predictor(inputs, following), cache, tokens)


def auxiliary_cache_for(model: KVPModel, cache: Cache) -> Cache:
    """Return the cache the auxiliary fills: the base's own first layers for a prefix, else a fresh one."""
    return cache[: len(model.auxiliary.layers)] if model.is_prefix else make_prompt_cache(model.auxiliary)


def predict_base_cache(
    model: KVPModel,
    ids: mx.array,
    cache: Cache | None = None,
    auxiliary_cache: Cache | None = None,
    **how: Any,
) -> Cache:
    """Fill the base's cache for ``ids``; the base itself reads only the exact tail and what is to be recomputed.

    Args:
        model: the bundle.
        ids: token ids ``(B, T)``, T >= 1, all of one length.
        cache: base cache to append to (default: a new one). Positions count on from its offset.
        auxiliary_cache: the auxiliary's own cache at the same offset (kinds ``model`` and ``pruned``; a prefix
            fills the base's). Only a new conversation may leave it out.
        how: see ``predicting``.

    Returns:
        One mlx-lm ``KVCache`` per base layer, evaluated, T positions longer.

    Raises:
        InputError: see ``predicting``.
    """
    cache = make_prompt_cache(model.base) if cache is None else cache
    auxiliary_cache = auxiliary_cache_for(model, cache) if auxiliary_cache is None else auxiliary_cache
    finish(predicting(model, ids, cache, auxiliary_cache, **how))
    return cache


def predicting(
    model: KVPModel,
    ids: mx.array,
    cache: Cache,
    auxiliary_cache: Cache,
    *,
    exact_tail: int = 0,
    recompute: float | None = None,
    prefill_step_size: int | None = None,
    times: PrefillTimes | None = None,
    progress: Progress | None = None,
    pace: Pace | None = None,
) -> Steps[None]:
    """Do what ``predict_base_cache`` does, with pauses.

    Args:
        model: the bundle.
        ids: token ids ``(B, T)``.
        cache: the base's cache, extended in place.
        auxiliary_cache: the auxiliary's, at the same offset.
        exact_tail: the base reads this many of the last tokens itself, on top of the prediction of the others.
        recompute: the share of the other tokens that it also reads itself (default: the bundle's).
        prefill_step_size: tokens per chunk (default: ``default_step_size()``); bounds the activations' memory.
        times: filled with what each part took.
        progress: called with (tokens done, tokens in all) after every chunk; what the base reads itself is part of it.
        pace: pause between groups of layers, too, and not only between chunks.

    Raises:
        InputError: the auxiliary has not read what the base's cache holds, a negative exact tail, a share that the
            bundle cannot recompute, or a quantised cache where the base is to read on top of the prediction.
    """
    times, dial, tokens = times or PrefillTimes(), Dial("kvp", 0, exact_tail, recompute), ids.shape[1]
    rest = ids[:, tokens:]
    if fixed := fixed_kinds(model.base):  # no entry can be replaced, so that the base goes on from what is predicted
        _check_fixed(fixed, recompute)
        dial, end = PREDICT, max(0, tokens - exact_tail)
        ids, rest = ids[:, :end], ids[:, end:]
    share = dial.share(model.config)
    is_repaired = bool(model.predictor.blocks) and (share > 0 or dial.exact_tail > 0)
    _check_caches(cache, auxiliary_cache, is_repaired)
    layers, tail = read_layers(model), min(dial.exact_tail, tokens)
    repair = work_of(spans(model, share, tokens, tail)) if is_repaired else 0
    tally = Tally(progress, tokens, tokens * layers + repair)
    below: list[mx.array] = []
    deviations: list[mx.array] = []
    with wired_limit(model.base), room_for(ids.shape[1], cache, auxiliary_cache):
        for chunk, done in chunks(ids, prefill_step_size):
            chunk_steps = predicting_chunk(
                model, chunk, ids.shape[1] - done, ids.size, cache, auxiliary_cache, times, share > 0, pace
            )
            outputs, estimates = yield from chunk_steps
            if is_repaired:
                below += outputs
                deviations += estimates
            release_buffers()
            tally.add(chunk.shape[1] * layers)
            yield
        if is_repaired:
            size = prefill_step_size or default_step_size()
            estimated = mx.concatenate(deviations, axis=1) if deviations else None
            x = mx.concatenate(below, axis=1)
            steps = repairing(model, x, estimated, cache, share, tail, size, pace, tally.add)
            times.recomputed_tokens += yield from _timed(steps, times, "recompute_ms")
    readers = [(model.base, cache)] + ([] if model.is_prefix else [(model.auxiliary, auxiliary_cache)])
    for reader, own in readers if rest.size else []:
        reading = reading_prompt(reader, rest, own, prefill_step_size=prefill_step_size, pace=pace)
        yield from _timed(reading, times, "recompute_ms")
    if rest.size:
        times.recomputed_tokens += rest.shape[1]
        tally.add(rest.shape[1] * layers)


def _check_fixed(kinds: list[str], recompute: float | None) -> None:
    """Refuse recomputation where layers of these kinds go on from their caches, and nothing else."""
    if recompute:
        raise InputError(
            f"layers of {' and '.join(kinds)} keep no entries that could be recomputed; leave out recomputation (an "
            "exact tail goes on from what was predicted)."
        )


def _timed(steps: Steps[T], times: PrefillTimes, part: str) -> Steps[T]:
    """Add what work takes, its pauses left out, to a part of the times."""
    while True:
        start = time.perf_counter()
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        finally:
            setattr(times, part, getattr(times, part) + 1e3 * (time.perf_counter() - start))
        yield


def _check_caches(cache: Cache, auxiliary_cache: Cache, is_repaired: bool) -> None:
    """Refuse caches that prediction cannot go on from (see ``predicting``)."""
    read, held = held_positions(auxiliary_cache), held_positions(cache)
    if read is not None and read != held:
        raise InputError(
            f"the auxiliary has read {read} positions, the base's cache holds {held}; "
            "pass the auxiliary_cache that belongs to it (catch_up_auxiliary brings it up to date)."
        )
    if is_repaired and not all(isinstance(layer, KVCache) for layer in cache):
        raise InputError(
            "a quantised cache takes predictions only; leave out kv_bits, or recomputation and exact tail."
        )


def predicting_chunk(
    model: KVPModel,
    chunk: mx.array,
    following: int,
    rows: int,
    cache: Cache,
    auxiliary_cache: Cache,
    times: PrefillTimes,
    is_estimated: bool,
    pace: Pace | None,
) -> Steps[tuple[list[mx.array], list[mx.array]]]:
    """Read a chunk (B, T), part by part, and append its prediction to the base's ``cache``, evaluated.

    Returns of each part what ``repairing`` takes: what the base goes on from, and with ``is_estimated`` the estimated
    deviations. ``following`` are the prompt's tokens after the chunk; ``rows`` are all that it has, for
    ``side_by_side``.
    """
    readings = yield from _timed(
        _reading_parts(model, chunk, rows, auxiliary_cache, pace), times, "auxiliary_prefill_ms"
    )
    start, deviations, following = time.perf_counter(), [], following + chunk.shape[1]
    with side_by_side(rows):
        for stream, reading, below in readings:
            following -= below.shape[1]
            with mx.stream(stream):
                write_predicted(model, reading, cache, following)
                if is_estimated and model.predictor.blocks:
                    deviations.append(model.predictor.deviations(reading))
        mx.eval(_state(cache), deviations)
    times.predict_ms += 1e3 * (time.perf_counter() - start)
    return [below for _, _, below in readings], deviations


def _reading_parts(
    model: KVPModel, chunk: mx.array, rows: int, cache: Cache, pace: Pace | None
) -> Steps[list[tuple[Any, dict[str, mx.array], mx.array]]]:
    """Let the auxiliary read a chunk; returns, evaluated, what ``predicting_chunk`` takes of each part.

    That is its stream, the predictor's inputs, and what the base goes on from.
    """
    layers = read_layers(model)
    started: list[tuple[Any, mx.array, AuxiliaryReading]] = []
    for group in groups(pace, layers, chunk.size):
        with side_by_side(rows) as streams:
            started = started or [(stream, part, AuxiliaryReading(part)) for stream, part in parts(chunk, streams)]
            for stream, _, reading in started:
                with mx.stream(stream):
                    reading.run(model, cache, group)
            if group.stop < layers:
                mx.eval(_state(cache[group]), [reading.x for _, _, reading in started])
        if group.stop < layers:
            yield
    readings = []
    with side_by_side(rows):
        for stream, part, reading in started:
            with mx.stream(stream):
                inputs = reading.inputs(model, cache)
            readings.append((stream, inputs, reading.x if model.has_exact_prefix else part))
        mx.eval(_state(cache), [reading[1:] for reading in readings])
    yield
    return readings


def catch_up_auxiliary(model: KVPModel, ids: mx.array, auxiliary_cache: Cache) -> None:
    """Let the auxiliary read ``ids`` (B, T) without predicting anything from it (a reply that the base wrote)."""
    finish(reading_prompt(model.auxiliary, ids, auxiliary_cache))


def base_prefill(
    model: KVPModel,
    ids: mx.array,
    cache: Cache | None = None,
    **how: Any,
) -> Cache:
    """Fill the base's cache for ``ids`` by running the base itself, as mlx-lm does; arguments as above."""
    cache = make_prompt_cache(model.base) if cache is None else cache
    finish(base_prefilling(model, ids, cache, **how))
    return cache


def base_prefilling(
    model: KVPModel, ids: mx.array, cache: Cache, *, times: PrefillTimes | None = None, **how: Any
) -> Steps[None]:
    """Do what ``base_prefill`` does, with pauses; ``how`` is ``prefill_step_size``, ``progress`` and ``pace``."""
    yield from _timed(reading_prompt(model.base, ids, cache, **how), times or PrefillTimes(), "base_prefill_ms")


def reading_prompt(
    model: nn.Module,
    ids: mx.array,
    cache: Cache,
    *,
    prefill_step_size: int | None = None,
    progress: Progress | None = None,
    pace: Pace | None = None,
) -> Steps[None]:
    """Let a model read ``ids`` (B, T) on top of its ``cache``, chunk by chunk, with pauses.

    A model that is not listed cannot be cut between layers, so that a pace cuts its chunks. All of its layers have read
    the same then, whenever it pauses.
    """
    rows = ids.size if is_listed(model) else 0  # what other architectures keep may not take two parts at once
    with wired_limit(model), room_for(ids.shape[1], cache):
        for chunk, done in chunks(ids, prefill_step_size):
            cuts = [slice(0, chunk.shape[1])] if is_listed(model) else groups(pace, chunk.shape[1], len(chunk))
            for cut in cuts:
                if is_listed(model):
                    yield from _reading_chunk(model, chunk, rows, cache, pace)
                else:
                    with mx.stream(generation_stream):
                        model(chunk[:, cut], cache=cache)
                    mx.eval(_state(cache))
                release_buffers()
                if progress:
                    progress(done - chunk.shape[1] + cut.stop, ids.shape[1])
                yield


def _reading_chunk(model: nn.Module, chunk: mx.array, rows: int, cache: Cache, pace: Pace | None) -> Steps[None]:
    """Let a listed model read a chunk, one group of layers after the other."""
    layers = len(model.layers)
    started: list[tuple[Any, mx.array]] = []  # stream, what the next layer takes
    for group in groups(pace, layers, chunk.size):
        view, is_last = section(model, group.start, group.stop), group.stop == layers
        with side_by_side(rows) as streams:
            started = started or parts(chunk, streams)
            outputs = []
            for stream, x in started:
                with mx.stream(stream):
                    outputs.append((stream, run_layers(view, x, cache[group])[0]))
            mx.eval(_state(cache[group]), [] if is_last else [x for _, x in outputs])
        started = outputs
        if not is_last:
            yield


def fill(
    model: KVPModel,
    ids: mx.array,
    cache: Cache,
    auxiliary_cache: Cache,
    dial: Dial,
    **report: Any,
) -> None:
    """Bring caches that hold the beginning of prompts up to the last token, as a settled dial says; see ``filling``."""
    finish(filling(model, ids, cache, auxiliary_cache, dial, **report))


def filling(
    model: KVPModel,
    ids: mx.array,
    cache: Cache,
    auxiliary_cache: Cache,
    dial: Dial,
    *,
    pace: Pace | None = None,
    progress: Progress | None = None,
    **report: Any,
) -> Steps[None]:
    """Do what ``fill`` does, with pauses.

    Args:
        model: the bundle.
        ids: the whole prompts ``(B, N)``.
        cache: the base's cache, extended in place to N-1 positions.
        auxiliary_cache: the auxiliary's; it may have read less than the base's cache holds.
        dial: its path is ``full`` or ``kvp``.
        pace: see ``predicting``.
        progress: see ``predicting``; of all that the caches do not hold yet.
        report: ``prefill_step_size`` and ``times``, as in ``predicting``.
    """
    end, held = ids.shape[1] - 1, held_positions(cache) or 0

    def since(start: int) -> Progress | None:
        return progress and (lambda done, _: progress(start - held + done, end - held))

    exact = max(held, min(dial.exact_head, end) if dial.path == "kvp" else end)
    if held < exact:
        yield from base_prefilling(model, ids[:, held:exact], cache, pace=pace, progress=since(held), **report)
    if exact < end:
        lag = held_positions(auxiliary_cache)
        if lag is not None and lag < exact:
            yield from reading_prompt(model.auxiliary, ids[:, lag:exact], auxiliary_cache, pace=pace)
        how: dict[str, Any] = {"exact_tail": min(dial.exact_tail, end - exact), "recompute": dial.recompute}
        how["progress"] = since(exact)
        yield from predicting(model, ids[:, exact:end], cache, auxiliary_cache, pace=pace, **how, **report)


def _state(cache: Cache) -> list[Any]:
    return [layer.state for layer in cache]
