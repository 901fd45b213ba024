"""Time to first token, measured as design.md section 8 says: arms interleaved, medians, nothing reused.

TTFT runs from token ids in hand to the first token's value on the host, on the clock of ``arms.clock``. All arms are
given the same ``prefill_step_size``, mlx-lm's own ``generate_step`` (the arm ``mlx-lm``) included.
"""

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit

from ..arms.arm import Arm, Engine
from ..arms.clock import first_token
from ..arms.work import full_work, predictor_work
from ..bundle.loading import KVPModel
from ..device.machine import copy_bytes_per_s, matmul_flops_per_s
from ..errors import InputError
from ..models.loading import compute_dtype
from .document import heading
from .precision import precision_name

Engines = dict[str, Engine]
"""Of the arms that have one of their own, opened: by the arm's name."""


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    Attributes:
        prompt_tokens: prompt lengths, each at least 2.
        batch_size: prompts at once.
        arms: as ``parse_arms`` reads them.
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


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at most, as measured."""

    matmul_flops_per_s: float
    copy_bytes_per_s: float


def measure_ttft(
    model: KVPModel,
    name: str,
    text_ids: list[int],
    sweep: Sweep,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    begun: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Run the benchmark and return its JSON document (design.md section 6).

    An interrupt ends it early: the document then holds the lengths that were finished and says ``interrupted``.

    Args:
        model: the bundle.
        name: how the user called it.
        text_ids: real text as token ids; each prompt is a fresh stretch of it, repeated where it is too short.
        sweep: what to measure.
        progress: called with (rounds done, rounds in all).
        begun: called with the document, whose rows come as lengths are finished.

    Raises:
        InputError: a prompt length that cannot be run, or an arm that cannot (at this batch size).
        KeyboardInterrupt, SystemExit: before any length was finished.
    """
    check_sweep(model, sweep)
    engines = open_engines(sweep)
    ceilings = Ceilings(matmul_flops_per_s(compute_dtype(model.base)), copy_bytes_per_s())
    measured_ceilings = {
        "matmul_gflops": ceilings.matmul_flops_per_s / 1e9,
        "copy_gb_per_s": ceilings.copy_bytes_per_s / 1e9,
    }
    document = heading(name, precision_name(model), **measured_ceilings) | {
        "rounds": sweep.rounds,
        "prefill_step_size": sweep.step_size,
        "hosts": model.hosts.size if model.hosts else 1,
        "interrupted": False,
        "rows": [],
    }
    begun(document)
    steps, total = itertools.count(1), len(sweep.prompt_tokens) * (sweep.rounds + 1)
    try:
        for length in sweep.prompt_tokens:
            samples = measure_length(model, text_ids, length, sweep, engines, lambda: progress(next(steps), total))
            document["rows"] += [arm_row(model, arm, length, sweep, samples, ceilings) for arm in sweep.arms]
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C or SIGTERM
        if not document["rows"]:
            raise
        document["interrupted"] = True
    return document


def check_sweep(model: KVPModel, sweep: Sweep) -> None:
    """Refuse what cannot be run (see ``measure_ttft``)."""
    if chosen := [arm.name for arm in sweep.arms if model.hosts and (arm.kind.prunes or arm.kind.is_foreign)]:
        raise InputError(f"{chosen[0]} runs on one host; leave out that arm.")
    limit = model.context_length or max(sweep.prompt_tokens)
    if bad := [length for length in sweep.prompt_tokens if not 2 <= length <= limit]:
        raise InputError(f"prompts of {bad[0]} tokens cannot be run; lengths go from 2 to {limit}.")
    for arm in sweep.arms:
        arm.check(model)
        if arm.kind.is_foreign and sweep.batch_size > 1:
            raise InputError(f"{arm.name} is measured with one prompt at a time; leave out --batch-size or that arm.")
        if arm.kind.predicts and arm.numbers and arm.numbers[0] + 2 > min(sweep.prompt_tokens):
            raise InputError(f"{arm.name} leaves nothing to predict at {min(sweep.prompt_tokens)} tokens.")


def open_engines(sweep: Sweep) -> Engines:
    """Open the engines of the arms that have one of their own, before any clock runs."""
    longest = max(sweep.prompt_tokens)
    return {arm.name: arm.kind.engine(longest) for arm in sweep.arms if arm.kind.engine is not None}


def measure_length(
    model: KVPModel,
    text_ids: list[int],
    length: int,
    sweep: Sweep,
    engines: Engines,
    progress: Callable[[], None],
) -> dict[str, Samples]:
    """Measure all arms at one prompt length, interleaved; the first round is discarded."""
    samples = {arm.name: Samples() for arm in sweep.arms}
    with wired_limit(model.base):  # as mlx-lm's stream_generate runs, for every arm alike
        for round_number in range(sweep.rounds + 1):
            for place, arm in enumerate(sweep.arms):
                ids = fresh_batch(text_ids, length, sweep.batch_size, round_number * len(sweep.arms) + place)
                kept = samples[arm.name] if round_number else Samples()
                measure_once(model, arm, ids, sweep.step_size, kept, engines.get(arm.name))
            progress()
    return samples


def measure_once(
    model: KVPModel, arm: Arm, ids: mx.array, step_size: int, samples: Samples, engine: Engine | None = None
) -> None:
    """Time one arm on a batch of prompts ``ids`` (B, N) and add what came out to ``samples``."""
    mx.eval(ids)
    mx.synchronize(generation_stream)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    first = first_token(model, arm, ids, step_size=step_size, engine=engine)
    mx.synchronize(generation_stream)  # mlx-lm has already started on the second token
    samples.ttft_ms.append(first.ttft_ms)
    samples.auxiliary_prefill_ms.append(first.times.auxiliary_prefill_ms)
    samples.predict_ms.append(first.times.predict_ms)
    samples.recompute_ms.append(first.times.recompute_ms)
    samples.first_step_ms.append(first.first_step_ms)
    peak = mx.get_peak_memory()
    samples.peak_memory_bytes = max(samples.peak_memory_bytes, peak)
    samples.above_weights_bytes = max(samples.above_weights_bytes, peak - before)


def fresh_batch(text_ids: list[int], length: int, batch_size: int, number: int) -> mx.array:
    """Return the ``number``-th batch of prompts ``(B, length)``, none of which any other batch holds."""
    first = number * batch_size
    return mx.array([fresh_prompt(text_ids, length, first + row) for row in range(batch_size)])


def fresh_prompt(text_ids: list[int], length: int, number: int) -> list[int]:
    """Return ``length`` tokens of the text; each ``number`` starts elsewhere (a prime stride apart)."""
    start = number * 97 % len(text_ids)
    return list(itertools.islice(itertools.cycle(text_ids), start, start + length))


def quartiles(values: list[float]) -> dict[str, Any]:
    """Return median, quartiles and the samples themselves."""
    median = statistics.median(values)
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [median] * 3
    return {"median": median, "q1": q1, "q3": q3, "samples": values}


def arm_row(
    model: KVPModel, arm: Arm, length: int, sweep: Sweep, samples: dict[str, Samples], ceilings: Ceilings
) -> dict[str, Any]:
    """Return one arm's row: times, their floor, and speed-up against FLOPs ratio where ``full`` was run too."""
    own, batch = samples[arm.name], sweep.batch_size
    work, is_kvp, is_foreign = arm.work(model, length, batch), arm.kind.predicts, arm.kind.is_foreign
    ttft_ms, predict_ms = quartiles(own.ttft_ms), statistics.median(own.predict_ms)
    floor_ms = 1e3 * (work.flops / ceilings.matmul_flops_per_s + work.weight_bytes / ceilings.copy_bytes_per_s)
    flops_ratio = full_work(model, length, batch).flops / work.flops
    speedup = statistics.median(samples["full"].ttft_ms) / ttft_ms["median"] if "full" in samples else None
    return {
        "arm": arm.name,
        "prompt_tokens": length,
        "batch_size": batch,
        "ttft_ms": ttft_ms,
        "auxiliary_prefill_ms": statistics.median(own.auxiliary_prefill_ms),
        "predict_ms": predict_ms,
        "recompute_ms": statistics.median(own.recompute_ms),
        "first_step_ms": statistics.median(own.first_step_ms) if is_kvp else None,
        "floor_ms": floor_ms,
        "share_of_floor": floor_ms / ttft_ms["median"],
        "predict_share": predict_ms / ttft_ms["median"] if is_kvp else None,
        "predict_flops_share": predictor_work(model, length - 1, batch).flops / work.flops if is_kvp else None,
        "peak_memory_bytes": None if is_foreign else own.peak_memory_bytes,
        "above_weights_bytes": None if is_foreign else own.above_weights_bytes,
        "speedup": speedup,
        "flops_ratio": flops_ratio,
        "summed_bytes_per_token": work.summed_values * compute_dtype(model.base).size / (batch * length),
        "realised": speedup / flops_ratio if speedup and not is_foreign else None,
    }
