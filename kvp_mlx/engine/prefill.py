"""Filling the base's cache with a prompt: by auxiliary prefill and prediction, or by the base's own full prefill.

``predict_base_cache`` and ``base_prefill`` return the same thing, a list of mlx-lm caches, so that everything after
the prompt is mlx-lm's own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..bundle.loading import KVPModel
from ..device.streams import chunks, default_step_size, parts, release_buffers, side_by_side
from ..errors import InputError
from ..models.entries import held_positions, room_for
from ..models.families import Cache, fixed_kinds, is_listed
from ..models.sections import run_layers, section
from .auxiliary import ReadPart, auxiliary_cache_for, read_layers, reading_parts, state_of, write_predicted
from .dial import PREDICT, Dial
from .pace import Pace, Steps, finish, groups
from .recompute import attention_of_prefix, repairing, settings_of, spans, work_of

MOST_JOINED_TOKENS = 64
"""Of an exact head, that are read with what is recomputed; a longer one is read ahead, and kept when cut short."""

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


class Filled(NamedTuple):
    """What filling a cache left besides.

    Attributes:
        output: what the base's last layer makes of the newest token ``(B, 1, hidden)``, normed and lazy, where the
            base read it on top of the prediction.
        below: what an exact prefix made of the tokens that it read ``(B, T, hidden)``; None where it read none.
    """

    output: mx.array | None = None
    below: mx.array | None = None


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
    exact_head: int = 0,
    exact_tail: int = 0,
    recompute: float | None = None,
    prefill_step_size: int | None = None,
    times: PrefillTimes | None = None,
    progress: Progress | None = None,
    pace: Pace | None = None,
) -> Steps[Filled]:
    """Do what ``predict_base_cache`` does, with pauses.

    Args:
        model: the bundle.
        ids: token ids ``(B, T)``.
        cache: the base's cache, extended in place.
        auxiliary_cache: the auxiliary's, at the same offset.
        exact_head: the base reads this many of the first tokens itself; only where it reads on top of a prediction
            (``reads_on_top``).
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
    is_repaired = reads_on_top(model, share, dial.exact_tail)
    _check_caches(cache, auxiliary_cache, is_repaired)
    layers, tail = read_layers(model), min(dial.exact_tail, tokens - exact_head)
    repair = work_of(spans(model, share, tokens, tail, exact_head)) if is_repaired else 0
    tally = Tally(progress, tokens, tokens * layers + repair)
    asks_prefix = is_repaired and share > 0 and settings_of(model).asks == "prefix"
    streams: list[mx.array] = []
    hidden: list[mx.array] = []
    deviations: list[mx.array] = []
    output = before = None
    with wired_limit(model.base), room_for(ids.shape[1], cache, auxiliary_cache):
        for chunk, done in chunks(ids, prefill_step_size):
            chunk_steps = predicting_chunk(
                model, chunk, ids.shape[1] - done, ids.size, cache, auxiliary_cache, times, share > 0, pace, before
            )
            chunk_parts, estimates = yield from chunk_steps
            before = chunk_parts[-1].inputs
            streams += [part.below for part in chunk_parts]
            hidden += [part.hidden for part in chunk_parts if asks_prefix and part.hidden is not None]
            deviations += estimates
            release_buffers()
            tally.add(chunk.shape[1] * layers)
            yield
        below = mx.concatenate(streams, axis=1) if streams else None
        if is_repaired and below is not None:
            size = prefill_step_size or default_step_size()
            estimated = mx.concatenate(deviations, axis=1) if deviations else None
            attention = attention_of_prefix(model, mx.concatenate(hidden, axis=1), cache) if hidden else None
            steps = repairing(model, below, estimated, cache, share, tail, size, pace, tally.add, exact_head, attention)
            recomputed, outputs = yield from _timed(steps, times, "recompute_ms")
            times.recomputed_tokens += recomputed - exact_head
            output = None if outputs is None else outputs[:, -1:]
    readers = [(model.base, cache)] + ([] if model.is_prefix else [(model.auxiliary, auxiliary_cache)])
    for reader, own in readers if rest.size else []:
        reading = reading_prompt(reader, rest, own, prefill_step_size=prefill_step_size, pace=pace)
        yield from _timed(reading, times, "recompute_ms")
    if rest.size:
        times.recomputed_tokens += rest.shape[1]
        tally.add(rest.shape[1] * layers)
    return Filled(output, below if model.has_exact_prefix else None)


def reads_on_top(model: KVPModel, share: float, exact_tail: int) -> bool:
    """Return whether the base replaces predicted entries by its own, given a share to recompute and an exact tail."""
    return bool(model.predictor.blocks) and not fixed_kinds(model.base) and (share > 0 or exact_tail > 0)


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
    before: dict[str, mx.array] | None,
) -> Steps[tuple[list[ReadPart], list[mx.array]]]:
    """Read a chunk (B, T), part by part, and append its prediction to the base's ``cache``, evaluated.

    Returns its parts, and with ``is_estimated`` the estimated deviations of each. ``following`` are the prompt's tokens
    after the chunk; ``rows`` are all that it has, for ``side_by_side``; ``before`` are the predictor's inputs of the
    chunk before.
    """
    reading = reading_parts(model, chunk, rows, auxiliary_cache, pace, before)
    read = yield from _timed(reading, times, "auxiliary_prefill_ms")
    start, deviations, following = time.perf_counter(), [], following + chunk.shape[1]
    with side_by_side(rows):
        for part in read:
            following -= part.below.shape[1]
            with mx.stream(part.stream):
                write_predicted(model, part.inputs, cache, following)
                if is_estimated and model.predictor.blocks:
                    deviations.append(model.predictor.deviations(part.inputs))
        mx.eval(state_of(cache), deviations)
    times.predict_ms += 1e3 * (time.perf_counter() - start)
    return read, deviations


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
                    mx.eval(state_of(cache))
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
            mx.eval(state_of(cache[group]), [] if is_last else [x for _, x in outputs])
        started = outputs
        if not is_last:
            yield


def fill(
    model: KVPModel,
    ids: mx.array,
    cache: Cache,
    auxiliary_cache: Cache,
    dial: Dial,
    **how: Any,
) -> Filled:
    """Bring caches that hold the beginning of prompts up to the last token, as a settled dial says; see ``filling``."""
    return finish(filling(model, ids, cache, auxiliary_cache, dial, **how))


def exact_end(dial: Dial, held: int, end: int) -> int:
    """Return up to where a prompt of ``end`` tokens, of which ``held`` are known, is read exactly, the tail aside."""
    return max(held, min(dial.exact_head, end) if dial.path == "kvp" else end)


def read_ahead(model: KVPModel, dial: Dial, held: int, end: int) -> int:
    """Return up to where the base reads a prompt before anything is predicted: the exact head, if that is long.

    A short one is read with what is recomputed, which saves a pass over the base's weights.
    """
    exact = exact_end(dial, held, end)
    is_joined = dial.exact_head <= MOST_JOINED_TOKENS and exact < end
    return held if is_joined and reads_on_top(model, dial.share(model.config), dial.exact_tail) else exact


def filling(
    model: KVPModel,
    ids: mx.array,
    cache: Cache,
    auxiliary_cache: Cache,
    dial: Dial,
    *,
    with_last: bool = False,
    pace: Pace | None = None,
    progress: Progress | None = None,
    times: PrefillTimes | None = None,
    prefill_step_size: int | None = None,
) -> Steps[Filled]:
    """Do what ``fill`` does, with pauses.

    Args:
        model: the bundle.
        ids: the whole prompts ``(B, N)``.
        cache: the base's cache, extended in place to N-1 positions.
        auxiliary_cache: the auxiliary's; it may have read less than the base's cache holds.
        dial: its path is ``full`` or ``kvp``.
        with_last: where the base reads on top of a prediction, let it read the last token with the exact tail, which
            saves a pass over its weights; the caches then hold N positions.
        pace: see ``predicting``.
        progress: see ``predicting``; of all that the caches do not hold yet.
        times: see ``predicting``.
        prefill_step_size: see ``predicting``.
    """
    end, held = ids.shape[1] - 1, held_positions(cache) or 0
    times = times or PrefillTimes()
    report: dict[str, Any] = {"pace": pace, "times": times, "prefill_step_size": prefill_step_size}

    def since(start: int) -> Progress | None:
        return progress and (lambda done, _: progress(min(start + done, end) - held, end - held))

    exact = exact_end(dial, held, end)
    ahead = read_ahead(model, dial, held, end)
    if held < ahead:
        yield from base_prefilling(model, ids[:, held:ahead], cache, progress=since(held), **report)
    if ahead == end:
        return Filled()
    lag = held_positions(auxiliary_cache)
    if lag is not None and lag < ahead:
        behind = reading_prompt(model.auxiliary, ids[:, lag:ahead], auxiliary_cache, pace=pace)
        yield from _timed(behind, times, "auxiliary_prefill_ms")
    tail = min(dial.exact_tail, end - exact)
    last = int(with_last and reads_on_top(model, dial.share(model.config), tail))
    predicting_steps = predicting(
        model,
        ids[:, ahead : end + last],
        cache,
        auxiliary_cache,
        exact_head=exact - ahead,
        exact_tail=tail + last,
        recompute=dial.recompute,
        progress=since(ahead),
        **report,
    )
    filled = yield from predicting_steps
    times.recomputed_tokens -= last
    return filled if last else filled._replace(output=None)
