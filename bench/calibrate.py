"""Finds the prompt length from which prediction pays, for ``prefill="auto"``."""

import statistics
from collections.abc import Callable
from typing import Any

from ..bundle.loading import KVPModel
from ..device.machine import describe_machine
from ..engine.calibration import store_auto_min
from ..engine.context import Context
from ..engine.dial import Dial, Path
from ..engine.reply import reply
from ..errors import InputError
from .ttft import fresh_prompt

LENGTHS = (8, 16, 32, 64, 128, 256)


def calibrate_auto(
    model: KVPModel,
    name: str,
    text_ids: list[int],
    *,
    exact_tail: int,
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Time both paths of ``stream_generate``, interleaved, and keep the shortest length from which ours wins.

    Args:
        model: the bundle.
        name: how the user called it.
        text_ids: real text as token ids.
        exact_tail: tokens that the base reads itself beside the predicted ones.
        rounds: measured rounds per length, one more is discarded.
        progress: called with (lengths done, lengths in all).

    Raises:
        InputError: the context window is shorter than the shortest prompt.
    """
    window = model.context_length
    lengths = [count for count in LENGTHS if window is None or count + exact_tail + 1 < window]
    if not lengths:
        raise InputError(f"an exact tail of {exact_tail} leaves no room in the context window, {window}; lower it.")
    rows = []
    for done, predicted in enumerate(lengths, 1):
        times: dict[Path, list[float]] = {"full": [], "kvp": []}
        for round_number in range(rounds + 1):
            for path, samples in times.items():
                ids = fresh_prompt(text_ids, predicted + exact_tail + 1, 2 * round_number + (path == "kvp"))
                answer = reply(Context(model), ids, Dial(path, 0, exact_tail), max_tokens=2)
                first = next(answer)
                if round_number:
                    samples.append(first.ttft_ms)
        medians = {f"{path}_ms": statistics.median(samples) for path, samples in times.items()}
        rows.append({"predicted_tokens": predicted, **medians})
        progress(done, len(lengths))
    pays_from = threshold(rows)
    return {
        "machine": describe_machine(),
        "model": name,
        "exact_tail": exact_tail,
        "rows": rows,
        "pays_from": pays_from,
        "stored": str(store_auto_min(model, pays_from)),
    }


def threshold(rows: list[dict[str, Any]]) -> int | None:
    """Return the fewest predicted tokens from which prediction is sooner at every length measured; None: at none."""
    pays_from = None
    for row in reversed(rows):
        if row["kvp_ms"] >= row["full_ms"]:
            break
        pays_from = row["predicted_tokens"]
    return pays_from
