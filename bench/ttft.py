"""Time to first token, measured as design.md section 8 says: arms interleaved, medians, nothing reused.

TTFT runs from token ids in hand to the first token's value on the host. The ``full`` arm is mlx-lm's own
``generate_step`` on the whole prompt, given the same ``prefill_step_size`` as the other arms; ``full-ours`` is full
prefill as our own pipeline runs it, and all other arms are those of ``arms``.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache

from ..arms.arm import FORMS, Arm, arm_prefill, parse_arm
from ..arms.work import arm_work, full_work, kvp_work, predictor_work
from ..bundle.loading import KVPModel
from ..device.machine import copy_bytes_per_s, describe_machine, matmul_flops_per_s
from ..engine.decode import first_logits
from ..engine.prefill import PrefillTimes, base_prefill, predict_base_cache
from ..errors import InputError
from ..models.families import Cache
from ..models.loading import compute_dtype
from .precision import precision_name

OWN_ARMS = ("full-ours", "llama.cpp")
OtherEngine = Callable[[list[int]], object]


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    Attributes:
        prompt_tokens: prompt lengths, each at least 2.
        batch_size: prompts at once.
        arms: as ``parse_bench_arms`` reads them.
        rounds: measured rounds per length; one more is run first and discarded.
        step_size: prompt tokens per chunk, for every arm.
    """

    prompt_tokens: list[int]
    batch_size: int
    arms: list[Arm]
    rounds: int
    step_size: int


@dataclass
class Samples:
    """One arm's measurements at one prompt length and batch size."""

    ttft_ms: list[float] = field(default_factory=list)
    auxiliary_prefill_ms: list[float] = field(default_factory=list)
    predict_ms: list[float] = field(default_factory=list)
    recompute_ms: list[float] = field(default_factory=list)
    first_step_ms: list[float] = field(default_factory=list)
    peak_memory_bytes: int = 0
    above_weights_bytes: int = 0


def parse_bench_arms(names: str) -> list[Arm]:
    """Read comma-separated arms, those of ``arms`` and the bench's own.

    Raises:
        InputError: no such arm.
    """
    arms = []
    for name in dict.fromkeys(part.strip() for part in names.split(",")):
        try:
            arms.append(Arm(name, name) if name in OWN_ARMS else parse_arm(name))
        except InputError as error:
            raise InputError(f"{str(error).replace(FORMS, FORMS + ', ' + ', '.join(OWN_ARMS))}") from error
    return arms


def run_arm(model: KVPModel, arm: Arm, ids: mx.array, step_size: int, times: PrefillTimes) -> None:
    """Get the first token of a batch of prompts, and its value on the host, by one arm."""
    if arm.kind == "full" and ids.shape[0] == 1:
        cache = make_prompt_cache(model.base)
        next(generate_step(ids[0], model.base, prompt_cache=cache, prefill_step_size=step_size, max_tokens=1))
        return
    answering: nn.Module = model.base
    match arm.kind:
        case "full":
            cache = _plain_prefill(model.base, ids, step_size)
        case "full-ours":
            cache = base_prefill(model, ids[:, :-1], prefill_step_size=step_size, times=times)
        case "kvp" if not arm.numbers:
            cache = predict_base_cache(model, ids[:, :-1], prefill_step_size=step_size, times=times)
        case _:
            answering, cache = arm_prefill(model, arm, ids, step_size=step_size)
    logits = first_logits(answering, ids[:, -1:], cache, step_size)
    with mx.stream(generation_stream):
        mx.argmax(logits[:, -1], axis=-1).tolist()


def _plain_prefill(base: nn.Module, ids: mx.array, step_size: int) -> Cache:
    """Fill a cache from a batch, all but its last token, just as ``generate_step`` does from one prompt."""
    cache, read = make_prompt_cache(base), ids.shape[1] - 1
    with mx.stream(generation_stream):
        for start in range(0, read, step_size):
            base(ids[:, start : min(start + step_size, read)], cache=cache)
            mx.eval([layer.state for layer in cache])
            mx.clear_cache()
    return cache


def measure_ttft(
    model: KVPModel,
    name: str,
    text_ids: list[int],
    sweep: Sweep,
    *,
    other_engine: OtherEngine | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run the benchmark and return its JSON document (design.md section 6).

    An interrupt ends it early: the document then holds the lengths that were finished and says ``interrupted``.

    Args:
        model: the bundle.
        name: how the user called it.
        text_ids: real text as token ids; each prompt is a fresh stretch of it, repeated where it is too short.
        sweep: what to measure.
        other_engine: runs one prompt to its first token, for the arm ``llama.cpp``.
        progress: called with (rounds done, rounds in all).

    Raises:
        InputError: a prompt length that cannot be run, or an arm that cannot at this batch size.
        KeyboardInterrupt, SystemExit: before any length was finished.
    """
    check_sweep(model, sweep)
    rate, bandwidth = matmul_flops_per_s(compute_dtype(model.base)), copy_bytes_per_s()
    document: dict[str, Any] = {
        "machine": describe_machine() | {"matmul_gflops": rate / 1e9, "copy_gb_per_s": bandwidth / 1e9},
        "model": name,
        "precision": precision_name(model),
        "rounds": sweep.rounds,
        "prefill_step_size": sweep.step_size,
        "interrupted": False,
        "rows": [],
    }
    steps, total = itertools.count(1), len(sweep.prompt_tokens) * (sweep.rounds + 1)
    try:
        for length in sweep.prompt_tokens:
            samples = measure_length(model, text_ids, length, sweep, other_engine, lambda: progress(next(steps), total))
            document["rows"] += [row(model, arm, length, sweep, samples, rate, bandwidth) for arm in sweep.arms]
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C or SIGTERM
        if not document["rows"]:
            raise
        document["interrupted"] = True
    return document


def check_sweep(model: KVPModel, sweep: Sweep) -> None:
    """Refuse what cannot be run (see ``measure_ttft``)."""
    limit = model.context_length or max(sweep.prompt_tokens)
    if bad := [length for length in sweep.prompt_tokens if not 2 <= length <= limit]:
        raise InputError(f"prompts of {bad[0]} tokens cannot be run; lengths go from 2 to {limit}.")
    for arm in sweep.arms:
        if arm.kind == "llama.cpp" and sweep.batch_size > 1:
            raise InputError("llama.cpp is measured with one prompt at a time; leave out --batch-size or that arm.")
        if arm.kind == "kvp" and arm.numbers and arm.numbers[0] + 2 > min(sweep.prompt_tokens):
            raise InputError(f"{arm.name} leaves nothing to predict at {min(sweep.prompt_tokens)} tokens.")


def measure_length(
    model: KVPModel,
    text_ids: list[int],
    length: int,
    sweep: Sweep,
    other_engine: OtherEngine | None,
    progress: Callable[[], None],
) -> dict[str, Samples]:
    """Measure all arms at one prompt length, interleaved; the first round is discarded."""
    samples = {arm.name: Samples() for arm in sweep.arms}
    with wired_limit(model.base):  # as mlx-lm's stream_generate runs, for every arm alike
        for round_number in range(sweep.rounds + 1):
            for place, arm in enumerate(sweep.arms):
                first = (round_number * len(sweep.arms) + place) * sweep.batch_size
                prompts = [fresh_prompt(text_ids, length, first + row) for row in range(sweep.batch_size)]
                kept = samples[arm.name] if round_number else Samples()
                if arm.kind == "llama.cpp" and other_engine is not None:
                    start = time.perf_counter()
                    other_engine(prompts[0])
                    kept.ttft_ms.append(1e3 * (time.perf_counter() - start))
                else:
                    measure_once(model, arm, mx.array(prompts), sweep.step_size, kept)
            progress()
    return samples


def measure_once(model: KVPModel, arm: Arm, ids: mx.array, step_size: int, samples: Samples) -> None:
    """Time one arm on one batch of prompts and add what came out to ``samples``."""
    mx.eval(ids)
    mx.synchronize(generation_stream)
    mx.clear_cache()
    mx.reset_peak_memory()
    before, times = mx.get_active_memory(), PrefillTimes()
    start = time.perf_counter()
    run_arm(model, arm, ids, step_size, times)
    ttft_ms = 1e3 * (time.perf_counter() - start)
    mx.synchronize(generation_stream)  # mlx-lm has already started on the second token
    samples.auxiliary_prefill_ms.append(times.auxiliary_prefill_ms)
    samples.predict_ms.append(times.predict_ms)
    samples.recompute_ms.append(times.recompute_ms)
    samples.first_step_ms.append(ttft_ms - times.auxiliary_prefill_ms - times.predict_ms - times.recompute_ms)
    samples.ttft_ms.append(ttft_ms)
    peak = mx.get_peak_memory()
    samples.peak_memory_bytes = max(samples.peak_memory_bytes, peak)
    samples.above_weights_bytes = max(samples.above_weights_bytes, peak - before)


def fresh_prompt(text_ids: list[int], length: int, number: int) -> list[int]:
    """Return ``length`` tokens of the text; each ``number`` starts elsewhere (a prime stride apart)."""
    start = number * 97 % len(text_ids)
    return list(itertools.islice(itertools.cycle(text_ids), start, start + length))


def spread(values: list[float]) -> dict[str, Any]:
    """Return median, quartiles and the samples themselves."""
    median = statistics.median(values)
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [median] * 3
    return {"median": median, "q1": q1, "q3": q3, "samples": values}


def row(
    model: KVPModel,
    arm: Arm,
    length: int,
    sweep: Sweep,
    samples: dict[str, Samples],
    rate: float,
    bandwidth: float,
) -> dict[str, Any]:
    """Return one arm's row: times, their floor, and speed-up against FLOPs ratio where ``full`` was run too."""
    own, batch = samples[arm.name], sweep.batch_size
    work, is_kvp = arm_work(model, arm, length, batch), arm.name == "kvp"
    ttft_ms = spread(own.ttft_ms)
    floor_ms = 1e3 * (work.flops / rate + work.weight_bytes / bandwidth)
    flops_ratio = full_work(model, length, batch).flops / work.flops
    speedup = statistics.median(samples["full"].ttft_ms) / ttft_ms["median"] if "full" in samples else None
    predict_ms, is_other = statistics.median(own.predict_ms or [0.0]), arm.kind == "llama.cpp"
    share = predictor_work(model, length - 1, batch).flops / kvp_work(model, length, batch).flops
    return {
        "arm": arm.name,
        "prompt_tokens": length,
        "batch_size": batch,
        "ttft_ms": ttft_ms,
        "auxiliary_prefill_ms": statistics.median(own.auxiliary_prefill_ms or [0.0]),
        "predict_ms": predict_ms,
        "recompute_ms": statistics.median(own.recompute_ms or [0.0]),
        "first_step_ms": statistics.median(own.first_step_ms) if is_kvp else None,
        "floor_ms": floor_ms,
        "share_of_floor": floor_ms / ttft_ms["median"],
        "predict_share": predict_ms / ttft_ms["median"] if is_kvp else None,
        "predict_flops_share": share if is_kvp else None,
        "peak_memory_bytes": None if is_other else own.peak_memory_bytes,
        "above_weights_bytes": None if is_other else own.above_weights_bytes,
        "speedup": speedup,
        "flops_ratio": flops_ratio,
        "realised": speedup / flops_ratio if speedup and not is_other else None,
    }
