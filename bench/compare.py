"""Two results of ``kvp bench ttft``, row by row: the ratio of medians, with a bootstrap interval."""

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .document import other_file, read_result

RESAMPLES = 10_000
INTERVAL = (2.5, 97.5)


def compare_results(before: Path, after: Path, fail_above: float | None) -> dict[str, Any]:
    """Return the ratio after/before of each row that both have, most slowed first.

    A row fails where its ratio is above ``fail_above`` and its whole interval above 1: slower by more than is
    allowed, and not by chance.

    Raises:
        InputError: a file that is no such result, or no row in common.
    """
    old, new = read_rows(before), read_rows(after)
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for key in sorted(old.keys() & new.keys()):  # in one order, for the seed's sake
        ratio, low, high = ratio_of_medians(old[key], new[key], rng)
        failed = fail_above is not None and ratio > fail_above and low > 1
        arm, tokens, batch = key
        rows.append(
            {
                "arm": arm,
                "prompt_tokens": tokens,
                "batch_size": batch,
                "ratio": ratio,
                "interval": [low, high],
                "failed": failed,
            }
        )
    if not rows:
        raise InputError(f"{before} and {after} have no arm, prompt length and batch size in common.")
    rows.sort(key=lambda row: -row["ratio"])
    return {"before": str(before), "after": str(after), "fail_above": fail_above, "rows": rows}


def read_rows(path: Path) -> dict[tuple[str, int, int], np.ndarray]:
    """Return the samples of each row of a result file.

    Raises:
        InputError: not a result of ``kvp bench ttft``.
    """
    try:
        found = {
            (row["arm"], row["prompt_tokens"], row["batch_size"]): np.asarray(row["ttft_ms"]["samples"], float)
            for row in read_result(path)["rows"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise other_file(path) from error
    if not all(isinstance(number, int) and number > 0 for _, *numbers in found for number in numbers):
        raise other_file(path)
    if not all(
        samples.ndim == 1 and samples.size and 0 < samples.min() <= samples.max() < np.inf for samples in found.values()
    ):
        raise InputError(f"{path} has rows without samples; measure again.")
    return found


def ratio_of_medians(old: np.ndarray, new: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    """Return the ratio of the medians new/old and its 95 % percentile-bootstrap interval."""
    medians = [np.median(rng.choice(samples, (RESAMPLES, samples.size)), axis=1) for samples in (new, old)]
    low, high = np.percentile(medians[0] / medians[1], INTERVAL)
    return float(np.median(new) / np.median(old)), float(low), float(high)
