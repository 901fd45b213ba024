"""Time to first token, measured as design.md section 8 says: arms interleaved, medians, nothing reused.

TTFT runs from token ids in hand to the first token's value on the host. The ``full`` arm is mlx-lm's own
``generate_step`` on the whole prompt, given the same ``prefill_step_size`` as the other arm.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache

from ..bundle import KVPModel
from ..errors import InputError
from ..families import Cache
from ..models import compute_dtype
from ..pipeline import PrefillTimes, base_prefill, predict_base_cache
from .cost import Work, full_work, kvp_work
from .machine import copy_bytes_per_s, describe_machine, matmul_flops_per_s


@dataclass
class Samples:
    """One arm's measurements at one prompt length and batch size."""

    ttft_ms: list[float] = field(default_factory=list)
    auxiliary_prefill_ms: list[float] = field(default_factory=list)
    predict_ms: list[float] = field(default_factory=list)
    first_step_ms: list[float] = field(default_factory=list)
    peak_memory_bytes: int = 0


def run_full(model: KVPModel, ids: mx.array, step_size: int, times: PrefillTimes) -> None:
    """First token by the base alone; a batch goes through our own loop, which mlx-lm's does not take."""
    if ids.shape[0] == 1:
        first_token(model, ids, make_prompt_cache(model.base), step_size)
        return
    cache = base_prefill(model, ids[:, :-1], prefill_step_size=step_size, times=times)
    first_token(model, ids[:, -1:], cache, step_size)


def run_kvp(model: KVPModel, ids: mx.array, step_size: int, times: PrefillTimes) -> None:
    """First token from the predicted cache."""
    cache = predict_base_cache(model, ids[:, :-1], prefill_step_size=step_size, times=times)
    first_token(model, ids[:, -1:], cache, step_size)


def first_token(model: KVPModel, ids: mx.array, cache: Cache, step_size: int) -> None:
    """Run the base over what the cache lacks and wait for the greedy token's value on the host."""
    if ids.shape[0] == 1:
        next(generate_step(ids[0], model.base, prompt_cache=cache, prefill_step_size=step_size, max_tokens=1))
    else:
        mx.argmax(model.base(ids, cache=cache)[:, -1], axis=-1).tolist()


def auxiliary_alone(model: KVPModel) -> KVPModel:
    """Return a bundle whose base is the auxiliary, for the arm that answers with it alone.

    Raises:
        InputError: a prefix, which is no model of its own.
    """
    if model.is_prefix:
        raise InputError("a prefix auxiliary is a part of the base and cannot answer alone; leave out that arm.")
    return replace(model, base=model.auxiliary)


def run_auxiliary(model: KVPModel, ids: mx.array, step_size: int, times: PrefillTimes) -> None:
    """First token by the auxiliary alone."""
    run_full(auxiliary_alone(model), ids, step_size, times)


def auxiliary_work(model: KVPModel, prompt_tokens: int, batch: int) -> Work:
    """Return the work of the auxiliary alone."""
    return full_work(auxiliary_alone(model), prompt_tokens, batch)


ARMS: dict[str, Callable[[KVPModel, mx.array, int, PrefillTimes], None]] = {
    "full": run_full,
    "kvp": run_kvp,
    "auxiliary": run_auxiliary,
}
WORK = {"full": full_work, "kvp": kvp_work, "auxiliary": auxiliary_work}


def measure_ttft(
    model: KVPModel,
    name: str,
    text_ids: list[int],
    *,
    prompt_tokens: list[int],
    batch_size: int,
    arms: list[str],
    rounds: int,
    step_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run the benchmark and return its JSON document (design.md section 6).

    Args:
        model: the bundle.
        name: how the user called it.
        text_ids: real text as token ids; each prompt is a fresh stretch of it, repeated where it is too short.
        prompt_tokens: prompt lengths, each at least 2.
        batch_size: prompts at once.
        arms: of ``ARMS``.
        rounds: measured rounds per length; one more is run first and discarded.
        step_size: prompt tokens per chunk, for every arm.
        progress: called with (rounds done, rounds in all).

    Raises:
        InputError: an unknown arm or a prompt length that cannot be run.
    """
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise InputError(f"unknown arm '{unknown[0]}'; known: {', '.join(ARMS)}.")
    limit = model.context_length or max(prompt_tokens) + 1
    if bad := [length for length in prompt_tokens if not 2 <= length < limit]:
        raise InputError(f"prompts of {bad[0]} tokens cannot be run; lengths go from 2 to {limit - 1}.")
    if "auxiliary" in arms:
        auxiliary_alone(model)  # refuses a prefix before anything is measured
    rate, bandwidth = matmul_flops_per_s(compute_dtype(model.base)), copy_bytes_per_s()
    rows: list[dict[str, Any]] = []
    steps, total = itertools.count(1), len(prompt_tokens) * (rounds + 1)
    for length in prompt_tokens:
        samples = {arm: Samples() for arm in arms}
        with wired_limit(model.base):  # as mlx-lm's stream_generate runs, for every arm alike
            for round_number in range(rounds + 1):
                for place, arm in enumerate(arms):
                    first = (round_number * len(arms) + place) * batch_size
                    ids = mx.array([fresh_prompt(text_ids, length, first + row) for row in range(batch_size)])
                    measure_once(model, arm, ids, step_size, samples[arm] if round_number else Samples())
                progress(next(steps), total)
        rows += [row(model, arm, length, batch_size, samples, rate, bandwidth) for arm in arms]
    machine = describe_machine() | {"matmul_gflops": round(rate / 1e9, 1), "copy_gb_per_s": round(bandwidth / 1e9, 2)}
    return {"machine": machine, "model": name, "rounds": rounds, "prefill_step_size": step_size, "rows": rows}


def measure_once(model: KVPModel, arm: str, ids: mx.array, step_size: int, samples: Samples) -> None:
    """Time one arm on one batch of prompts and add what came out to ``samples``."""
    mx.eval(ids)
    mx.synchronize(generation_stream)
    mx.clear_cache()
    mx.reset_peak_memory()
    times = PrefillTimes()
    start = time.perf_counter()
    ARMS[arm](model, ids, step_size, times)
    ttft_ms = 1e3 * (time.perf_counter() - start)
    mx.synchronize(generation_stream)  # mlx-lm has already started on the second token
    samples.auxiliary_prefill_ms.append(times.auxiliary_prefill_ms)
    samples.predict_ms.append(times.predict_ms)
    samples.first_step_ms.append(ttft_ms - times.auxiliary_prefill_ms - times.predict_ms)
    samples.ttft_ms.append(ttft_ms)
    samples.peak_memory_bytes = max(samples.peak_memory_bytes, mx.get_peak_memory())


def fresh_prompt(text_ids: list[int], length: int, number: int) -> list[int]:
    """Return ``length`` tokens of the text; each ``number`` starts elsewhere (a prime stride apart)."""
    start = number * 97 % len(text_ids)
    return list(itertools.islice(itertools.cycle(text_ids), start, start + length))


def row(
    model: KVPModel, arm: str, length: int, batch: int, samples: dict[str, Samples], rate: float, bandwidth: float
) -> dict[str, Any]:
    """Return one arm's row: times, their floor, and speed-up against FLOPs ratio where ``full`` was run too."""
    own, work = samples[arm], WORK[arm](model, length, batch)
    median = statistics.median(own.ttft_ms)
    q1, _, q3 = statistics.quantiles(own.ttft_ms, n=4, method="inclusive") if len(own.ttft_ms) > 1 else [median] * 3
    flops_ratio = full_work(model, length, batch).flops / work.flops
    speedup = statistics.median(samples["full"].ttft_ms) / median if "full" in samples else None
    return {
        "arm": arm,
        "prompt_tokens": length,
        "batch_size": batch,
        "ttft_ms": {"median": median, "q1": q1, "q3": q3, "samples": own.ttft_ms},
        "auxiliary_prefill_ms": statistics.median(own.auxiliary_prefill_ms),
        "predict_ms": statistics.median(own.predict_ms),
        "first_step_ms": statistics.median(own.first_step_ms) if arm == "kvp" else None,
        "floor_ms": 1e3 * (work.flops / rate + work.weight_bytes / bandwidth),
        "peak_memory_bytes": own.peak_memory_bytes,
        "speedup": speedup,
        "flops_ratio": flops_ratio,
        "realised": speedup / flops_ratio if speedup else None,
    }
