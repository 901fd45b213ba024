"""From a prompt to streamed text: encode, auxiliary_prefill, predict_base_cache, decode, stream.

``predict_base_cache`` and ``base_prefill`` return the same thing, a list of mlx-lm caches, so everything after
the prompt is mlx-lm's own ``stream_generate`` on the last prompt token.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, wired_limit
from mlx_lm.generate import stream_generate as mlx_lm_stream_generate
from mlx_lm.models.cache import KVCache, make_prompt_cache

from .bundle import KVPModel
from .calibration import AUTO_MIN_PROMPT_TOKENS, auto_min_tokens
from .errors import InputError
from .families import Cache, append_raw, room_for, run_layers, section
from .first_token import stream_first_token_early
from .recompute import repair
from .streams import chunks, default_step_size, parts, release_buffers, side_by_side

Prefill = Literal["kvp", "full", "auto"]
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


@dataclass
class Response:
    """One piece of a streamed answer, with what is known so far.

    Attributes:
        text: the next piece of text (may be empty).
        token: the token id it came from.
        prompt_tokens: length of the prompt.
        prefill: the path that ran, ``kvp`` or ``full``.
        exact_tail: prompt tokens that the base read itself on top of the predicted cache.
        ttft_ms: from the call to the first token's value on the host, tokenising included.
        times: its parts; what remains is ``first_step_ms``.
        first_step_ms: the last prompt token and sampling.
        generation_tokens: tokens generated so far.
        generation_tps: as mlx-lm counts it, all generated tokens over the time since the first one.
        finish_reason: None while streaming, then ``stop`` or ``length``.
    """

    text: str
    token: int
    prompt_tokens: int
    prefill: str
    exact_tail: int
    ttft_ms: float
    times: PrefillTimes
    first_step_ms: float
    generation_tokens: int
    generation_tps: float
    finish_reason: str | None


def encode(model: KVPModel, prompt: str | list[int], *, raw: bool = False) -> list[int]:
    """Turn a prompt into token ids: through the chat template as a user's message, or as it stands.

    Args:
        model: the bundle.
        prompt: text, or token ids that are passed through.
        raw: skip the chat template (a base without one is always raw).

    Raises:
        InputError: nothing to encode, no tokeniser, or more tokens than the context window holds.
    """
    if isinstance(prompt, str):
        tokenizer = model.text_tokenizer
        check_text(prompt)
        if raw or tokenizer.chat_template is None:
            has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
            ids = tokenizer.encode(prompt, add_special_tokens=not has_bos)
        else:
            ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    else:
        ids = list(prompt)
    if not ids:
        raise InputError("the prompt is empty; give it at least one token.")
    check_context(model, len(ids))
    return ids


def check_text(text: str) -> None:
    """Refuse text that is not Unicode (a terminal's or file's stray bytes arrive as lone surrogates).

    Raises:
        InputError: it does not encode to UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is not UTF-8 text (character {error.start}); convert it first.") from error


def check_context(model: KVPModel, tokens: int, max_tokens: int = 1) -> None:
    """Refuse a prompt that leaves no room for an answer, and an answer of no tokens.

    Raises:
        InputError: the context window is full, or ``max_tokens`` is below one.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, not {max_tokens}.")
    if model.context_length is not None and tokens >= model.context_length:
        raise InputError(
            f"the prompt has {tokens} tokens, the model's context window {model.context_length}; shorten the prompt."
        )


def choose_prefill(
    prefill: Prefill,
    prompt_tokens: int,
    exact_tail: int,
    exact_head: int = 0,
    *,
    auto_min: int = AUTO_MIN_PROMPT_TOKENS,
) -> str:
    """Return the path to take: ``auto`` predicts only where at least ``auto_min`` tokens would be predicted.

    A prompt with nothing left to predict (a single token, or no more than is read exactly) goes the full path.

    Raises:
        InputError: an unknown path or a negative exact head or tail.
    """
    if prefill not in get_args(Prefill):
        raise InputError(f"prefill is one of {', '.join(get_args(Prefill))}, not '{prefill}'.")
    for name, tokens in (("exact_head", exact_head), ("exact_tail", exact_tail)):
        if tokens < 0:
            raise InputError(f"{name} counts tokens, so it cannot be {tokens}.")
    predictable = prompt_tokens - 1 - exact_tail - exact_head
    if prefill == "full" or predictable <= 0:
        return "full"
    return "kvp" if prefill == "kvp" or predictable >= auto_min else "full"


def auxiliary_prefill(model: KVPModel, ids: mx.array, cache: Cache) -> tuple[dict[str, mx.array], mx.array]:
    """Let the auxiliary read ``ids`` (B, T) on top of its ``cache``; lazy.

    Returns the predictor's inputs, and what the base goes on with where it reads a token itself: an exact prefix's
    residual stream (B, T, hidden), else the ids. No logits, final norm, last attention output or last FFN are
    computed.
    """
    sources = model.predictor.sources
    if not model.has_exact_prefix:
        _, heard = run_layers(model.auxiliary, ids, cache, sources)
        return model.predictor.inputs(heard), ids
    end = model.config.auxiliary.layers
    below, heard = run_layers(section(model.auxiliary, 0, end), ids, cache[:end], [s for s in sources if s < end])
    _, last = run_layers(section(model.auxiliary, end, end + 1), below, cache[end:], [0])
    return model.predictor.inputs(heard | {end: last[0]}), below


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
        prefill_step_size: tokens per chunk (default: ``default_step_size()``); bounds the activations' memory.
        times: filled with what each part took.
        progress: called with (tokens done, tokens in all) after every chunk.

    Returns:
        One mlx-lm ``KVCache`` per base layer, evaluated, T positions longer.

    Raises:
        InputError: the auxiliary has not read what the base's cache holds, a negative exact tail, or a quantised cache
            where the base is to read on top of the prediction.
    """
    cache = make_prompt_cache(model.base) if cache is None else cache
    auxiliary_cache = auxiliary_cache_for(model, cache) if auxiliary_cache is None else auxiliary_cache
    times = PrefillTimes() if times is None else times
    if exact_tail < 0:
        raise InputError(f"exact_tail counts tokens, so it cannot be {exact_tail}.")
    if auxiliary_cache[0].offset != cache[0].offset:
        raise InputError(
            f"the auxiliary has read {auxiliary_cache[0].offset} positions, the base's cache holds {cache[0].offset}; "
            "pass the auxiliary_cache that belongs to it (catch_up_auxiliary brings it up to date)."
        )
    is_repaired = bool(model.predictor.blocks) and (model.recompute > 0 or exact_tail > 0)
    if is_repaired and not all(isinstance(layer, KVCache) for layer in cache):
        raise InputError(
            "a quantised cache takes predictions only; leave out kv_bits, or recomputation and exact tail."
        )
    below: list[mx.array] = []
    deviations: list[mx.array] = []
    with wired_limit(model.base), room_for(ids.shape[1], cache, auxiliary_cache):
        with side_by_side(ids.size) as streams:
            for chunk, done in chunks(ids, prefill_step_size):
                stopped_at, deviating = predict_chunk(model, chunk, streams, cache, auxiliary_cache, times)
                if is_repaired:
                    below += stopped_at
                    deviations += deviating
                release_buffers()
                if progress:
                    progress(done, ids.shape[1])
        if is_repaired:
            start = time.perf_counter()
            told = mx.concatenate(deviations, axis=1) if deviations else None
            step_size, tail = prefill_step_size or default_step_size(), min(exact_tail, ids.shape[1])
            times.recomputed_tokens += repair(model, mx.concatenate(below, axis=1), told, cache, tail, step_size)
            times.recompute_ms += 1e3 * (time.perf_counter() - start)
    return cache


def predict_chunk(
    model: KVPModel, chunk: mx.array, streams: list[Any], cache: Cache, auxiliary_cache: Cache, times: PrefillTimes
) -> tuple[list[mx.array], list[mx.array]]:
    """Read a chunk (B, T), part by part, and append its prediction to the base's ``cache``, evaluated.

    Returns of each part what ``repair`` takes: where the base goes on from, and the estimated deviations (none where
    nothing is to be recomputed).
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
            if model.recompute and model.predictor.blocks:
                deviations.append(model.predictor.deviations(inputs))
    mx.eval(_state(cache), deviations)
    times.auxiliary_prefill_ms += 1e3 * (done_reading - start)
    times.predict_ms += 1e3 * (time.perf_counter() - done_reading)
    return [stopped_at for _, _, stopped_at in readings], deviations


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
    with wired_limit(model), side_by_side(ids.size) as streams, room_for(ids.shape[1], cache):
        for chunk, done in chunks(ids, prefill_step_size):
            for stream, part in parts(chunk, streams):
                with mx.stream(stream):
                    run_layers(model, part, cache)
            mx.eval(_state(cache))
            release_buffers()
            if progress:
                progress(done, ids.shape[1])


def fill_cache(
    model: KVPModel,
    ids: list[int],
    cache: Cache,
    auxiliary_cache: Cache,
    path: str,
    *,
    exact_head: int = 0,
    exact_tail: int = 0,
    **report: Any,
) -> None:
    """Bring caches that hold the beginning of a prompt up to its last token.

    Args:
        model: the bundle.
        ids: the whole prompt.
        cache: the base's cache, extended in place.
        auxiliary_cache: the auxiliary's; it may have read less than the base's cache holds.
        path: ``full`` or ``kvp``, as ``choose_prefill`` returns it.
        exact_head: predicting, the base itself reads this many of the first prompt tokens.
        exact_tail: predicting, the base itself reads this many prompt tokens before the last.
        report: ``prefill_step_size``, ``times`` and ``progress``, as in ``predict_base_cache``.
    """
    end = len(ids) - 1
    head = end if path == "full" else min(exact_head, end)
    if cache[0].offset < head:
        base_prefill(model, mx.array([ids[cache[0].offset : head]]), cache, **report)
    held, lag = cache[0].offset, auxiliary_cache[0].offset
    if path == "full" or held >= end:
        return
    if lag < held:
        catch_up_auxiliary(model, mx.array([ids[lag:held]]), auxiliary_cache)
    predict_base_cache(model, mx.array([ids[held:end]]), cache, auxiliary_cache, exact_tail=exact_tail, **report)


def _state(cache: Cache) -> list[Any]:
    return [layer.state for layer in cache]


def stream_generate(
    model: KVPModel,
    prompt: str | list[int],
    *,
    prefill: Prefill = "kvp",
    exact_head: int = 0,
    exact_tail: int = 0,
    max_tokens: int = 256,
    raw: bool = False,
    cache: Cache | None = None,
    prefill_step_size: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[Response]:
    """Answer a prompt, yielding text as it is generated.

    Args:
        model: the bundle; it needs a tokeniser.
        prompt: text, or token ids.
        prefill: ``kvp`` (predict), ``full`` (the base reads everything) or ``auto`` (predict long prompts).
        exact_head: predicting, the base itself reads this many of the first prompt tokens.
        exact_tail: predicting, it reads this many before the last, on top of the prediction.
        max_tokens: tokens to generate at most; the context window may allow fewer.
        raw: skip the chat template.
        cache: a base's cache that holds the beginning of the prompt (a saved one); extended in place.
        prefill_step_size: prompt tokens per chunk (default: ``default_step_size()``).
        progress: called with (prompt tokens done, prompt tokens to do) after every chunk.
        options: passed to mlx-lm's ``stream_generate`` (sampler, logits_processors, kv_bits, ...).

    Raises:
        InputError: see ``encode``.
    """
    with wired_limit(model.base):  # around prefill and decoding, so that nothing is unwired in between
        start = time.perf_counter()
        ids = encode(model, prompt, raw=raw)
        check_context(model, len(ids), max_tokens)
        cache, times = make_prompt_cache(model.base) if cache is None else cache, PrefillTimes()
        head = max(0, exact_head - cache[0].offset)
        path = choose_prefill(prefill, len(ids) - cache[0].offset, exact_tail, head, auto_min=auto_min_tokens(model))
        tail = exact_tail if path == "kvp" else 0
        fill_cache(
            model,
            ids,
            cache,
            auxiliary_cache_for(model, cache),
            path,
            exact_head=exact_head,
            exact_tail=tail,
            prefill_step_size=prefill_step_size,
            times=times,
            progress=progress,
        )
        options |= {"prefill_step_size": prefill_step_size or default_step_size()}
        decoded = decode(model, ids, cache, max_tokens=max_tokens, **options)
        first_step_start, ttft_ms, first_step_ms = time.perf_counter(), 0.0, 0.0
        for piece in decoded:
            if not ttft_ms:
                now = time.perf_counter()
                ttft_ms, first_step_ms = 1e3 * (now - start), 1e3 * (now - first_step_start)
            yield Response(
                text=piece.text,
                token=piece.token,
                prompt_tokens=len(ids),
                prefill=path,
                exact_tail=tail,
                ttft_ms=ttft_ms,
                times=times,
                first_step_ms=first_step_ms,
                generation_tokens=piece.generation_tokens,
                generation_tps=piece.generation_tps,
                finish_reason=piece.finish_reason,
            )


def decode(
    model: KVPModel, ids: list[int], cache: Cache, *, max_tokens: int = 256, **options: Any
) -> Iterator[GenerationResponse]:
    """Generate with mlx-lm from a cache that holds the beginning of ``ids``; the base reads the rest.

    Args:
        model: the bundle.
        ids: the whole prompt.
        cache: base cache holding fewer positions than ``ids``, predicted or not; extended in place.
        max_tokens: tokens to generate at most, cut down to what the context window leaves.
        options: passed to mlx-lm's ``stream_generate``.

    Raises:
        InputError: a ``draft_model``, whose own cache would lack the prompt.
    """
    if options.get("draft_model") is not None:
        raise InputError("a draft_model cannot follow a predicted prompt yet; leave it out.")
    if model.context_length is not None:
        max_tokens = min(max_tokens, model.context_length - len(ids))
    rest = mx.array(ids[cache[0].offset :])
    options.setdefault("prefill_step_size", default_step_size())
    is_early = mx.default_device().type == mx.DeviceType.cpu and options.keys() <= {"prefill_step_size", "sampler"}
    stream = stream_first_token_early if is_early else mlx_lm_stream_generate
    return stream(model.base, model.text_tokenizer, rest, max_tokens=max_tokens, prompt_cache=cache, **options)
