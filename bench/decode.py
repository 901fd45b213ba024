"""Decoding speed after a predicted and after a true cache: tokens per second by mlx-lm's own loop."""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, generation_stream, wired_limit

from ..arms.arm import Reading
from ..bundle.loading import KVPModel
from ..errors import InputError
from ..models.families import Cache
from .document import heading
from .precision import precision_name
from .ttft import Sweep, fresh_prompt, quartiles


def measure_decode(
    model: KVPModel,
    name: str,
    text_ids: list[int],
    sweep: Sweep,
    *,
    new_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Time ``new_tokens`` after each arm's cache, arms interleaved; the first token does not count.

    Args:
        model: the bundle.
        name: how the user called it.
        text_ids: real text as token ids.
        sweep: lengths, arms and rounds (one prompt at a time).
        new_tokens: tokens to time.
        progress: called with (rounds done, rounds in all).

    Raises:
        InputError: prompt and new tokens do not fit the context window, or an arm that can only be timed.
    """
    limit = model.context_length
    if limit is not None and max(sweep.prompt_tokens) + new_tokens + 1 > limit:
        raise InputError(f"{max(sweep.prompt_tokens)} and {new_tokens} new tokens exceed the context window, {limit}.")
    steps, total = itertools.count(1), len(sweep.prompt_tokens) * (sweep.rounds + 1)
    rows: list[dict[str, Any]] = []
    for length in sweep.prompt_tokens:
        tps: dict[str, list[float]] = {arm.name: [] for arm in sweep.arms}
        for round_number in range(sweep.rounds + 1):
            ids = mx.array([fresh_prompt(text_ids, length, round_number)])
            for arm in sweep.arms:
                network, cache = arm.read(model, ids, Reading(step_size=sweep.step_size))
                seconds = decoding_seconds(network, cache, ids[0, -1:], new_tokens)
                if round_number:
                    tps[arm.name].append(new_tokens / seconds)
            progress(next(steps), total)
        full = statistics.median(tps["full"]) if "full" in tps else None
        rows += [
            {
                "arm": arm,
                "prompt_tokens": length,
                "new_tokens": new_tokens,
                "tps": quartiles(values),
                "ratio": statistics.median(values) / full if full else None,
            }
            for arm, values in tps.items()
        ]
    return heading(name, precision_name(model)) | {
        "rounds": sweep.rounds,
        "rows": rows,
    }


def decoding_seconds(network: nn.Module, cache: Cache, last: mx.array, new_tokens: int) -> float:
    """Time ``new_tokens`` by mlx-lm's own loop, after the first one.

    Args:
        network: the model that decodes.
        cache: its cache of the prompt but for the last token; extended.
        last: that token ``(1,)``.
        new_tokens: tokens to time.
    """
    with wired_limit(network):
        tokens = generate_step(last, network, prompt_cache=cache, max_tokens=new_tokens + 1)
        next(tokens)
        start = time.perf_counter()
        for _ in tokens:
            pass
        seconds = time.perf_counter() - start
    mx.synchronize(generation_stream)
    return seconds
