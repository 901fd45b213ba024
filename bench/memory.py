"""Peak memory of each arm, held against what it is made of."""

from collections.abc import Callable
from typing import Any

from ..arms.arm import Arm
from ..bundle.loading import KVPModel
from ..errors import InputError
from .capacity import activation_bytes, cache_bytes, weight_bytes
from .document import heading
from .precision import precision_name
from .ttft import Samples, Sweep, check_sweep, fresh_batch, measure_once, open_engines


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
    weights, the caches that it fills and one chunk's activations.

    Args:
        model: the bundle.
        name: how the user called it.
        text_ids: real text as token ids.
        sweep: lengths, batch size, arms and chunk size.
        progress: called with (runs done, runs in all).

    Raises:
        InputError: see ``measure_ttft``; or an arm whose memory is not MLX's.
    """
    check_sweep(model, sweep)
    if foreign := [arm.name for arm in sweep.arms if arm.kind.is_foreign]:
        raise InputError(f"{foreign[0]} does not run in MLX, so its memory is not counted here; leave out that arm.")
    engines = open_engines(sweep)
    rows: list[dict[str, Any]] = []
    total = len(sweep.prompt_tokens) * len(sweep.arms)
    for length in sweep.prompt_tokens:
        for arm in sweep.arms:
            ids, samples = fresh_batch(text_ids, length, sweep.batch_size, 0), Samples()
            measure_once(model, arm, ids, sweep.step_size, samples, engines.get(arm.name))
            rows.append(memory_row(model, arm, length, sweep, samples.above_weights_bytes))
            progress(len(rows), total)
    base = weight_bytes([model.base])
    return heading(name, precision_name(model)) | {
        "prefill_step_size": sweep.step_size,
        "predictor_and_auxiliary_bytes": weight_bytes([model.base, model.auxiliary, model.predictor]) - base,
        "rows": rows,
    }


def memory_row(model: KVPModel, arm: Arm, length: int, sweep: Sweep, above_weights_bytes: int) -> dict[str, Any]:
    """Return one arm's row: what it held beside its weights, and what that is made of."""
    weights, networks, batch = weight_bytes(arm.weights(model)), arm.networks(model), sweep.batch_size
    caches = sum(cache_bytes(network, length, batch) for network in networks)
    chunk = min(sweep.step_size, length)
    return {
        "arm": arm.name,
        "prompt_tokens": length,
        "batch_size": batch,
        "weight_bytes": weights,
        "cache_bytes": caches,
        "above_weights_bytes": above_weights_bytes,
        "total_bytes": weights + above_weights_bytes,
        "bound_bytes": weights + caches + max(activation_bytes(network, chunk, length, batch) for network in networks),
    }
