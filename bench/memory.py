"""Peak memory of each arm, held against what it is made of."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..bundle.loading import KVPModel
from ..device.machine import describe_machine
from .capacity import activation_bytes, cache_bytes
from .precision import precision_name
from .ttft import Samples, Sweep, check_sweep, fresh_prompt, measure_once


def measure_memory(
    model: KVPModel,
    name: str,
    text_ids: list[int],
    sweep: Sweep,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run each arm once per length and return its peak, weights of other arms left out.

    ``total_bytes`` is the weights that the arm needs and the most that it held beside them. ``bound_bytes`` is those
    weights, the final caches and one chunk's activations.

    Args:
        model: the bundle.
        name: how the user called it.
        text_ids: real text as token ids.
        sweep: lengths, batch size, arms and chunk size.
        progress: called with (runs done, runs in all).
    """
    check_sweep(model, sweep)
    rows: list[dict[str, Any]] = []
    total = len(sweep.prompt_tokens) * len(sweep.arms)
    base, extra = _bytes(model.base), _bytes(model.predictor) + (0 if model.is_prefix else _bytes(model.auxiliary))
    for length in sweep.prompt_tokens:
        for arm in sweep.arms:
            prompts = [fresh_prompt(text_ids, length, number) for number in range(sweep.batch_size)]
            samples = Samples()
            measure_once(model, arm, mx.array(prompts), sweep.step_size, samples)
            uses_predictor = arm.kind == "kvp"
            weights = base + (extra if uses_predictor else 0)
            caches = cache_bytes(model.base, length, sweep.batch_size)
            if uses_predictor and not model.is_prefix:
                caches += cache_bytes(model.auxiliary, length, sweep.batch_size)
            reader = model.auxiliary if uses_predictor and not model.is_prefix else model.base
            chunk = activation_bytes(reader, min(sweep.step_size, length), length, sweep.batch_size)
            rows.append(
                {
                    "arm": arm.name,
                    "prompt_tokens": length,
                    "batch_size": sweep.batch_size,
                    "weight_bytes": weights,
                    "cache_bytes": caches,
                    "above_weights_bytes": samples.above_weights_bytes,
                    "total_bytes": weights + samples.above_weights_bytes,
                    "bound_bytes": weights + caches + chunk,
                }
            )
            progress(len(rows), total)
    return {
        "machine": describe_machine(),
        "model": name,
        "precision": precision_name(model),
        "prefill_step_size": sweep.step_size,
        "predictor_and_auxiliary_bytes": extra,
        "rows": rows,
    }


def _bytes(module: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))
