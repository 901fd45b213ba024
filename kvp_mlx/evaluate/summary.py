"""What rows add up to: means with their intervals, arms against the full model and at equal TTFT."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..arms.arm import Arm
from ..arms.kinds import parse_arm
from ..bundle.loading import KVPModel
from .intervals import bootstrap, bootstrap_ratio
from .task import Item, Row

EQUAL_TTFT = 1.1
"""An arm up to this much slower still counts as equally fast: what measurements differ by, at our expense."""


def summarise(
    task: str,
    model: KVPModel,
    arms: Sequence[Arm],
    rows: Sequence[Row],
    *,
    statistic: Callable[[np.ndarray], float] = np.mean,
) -> dict[str, Any]:
    """Return a task's JSON: task, n and, per arm, score, its 95 % interval, median TTFT in ms and more.

    ``difference`` is the mean over items of the row's score less the arm ``full``'s (of perplexity: in nats per
    token), ``retention`` the mean score over ``full``'s (absent where that is 0, and of perplexity), both with their
    intervals; ``flops_ratio`` is full prefill's work over the arm's, of all prompts together; ``metrics`` are means of
    the row's other scores. ``equal_ttft`` is as ``compare_at_equal_ttft`` returns it.
    """
    of = {arm.name: [row for row in rows if row["arm"] == arm.name] for arm in arms}
    prompt_tokens = int(statistics.median(row["prompt_tokens"] for row in rows))
    full = parse_arm("full")
    result: dict[str, Any] = {}
    for arm in arms:
        own = of[arm.name]
        scores = [row["score"] for row in own]
        result[arm.name] = {
            "score": float(statistic(np.array(scores))),
            "interval": bootstrap(scores, statistic),
            "ttft_ms": statistics.median(row["ttft_ms"] for row in own),
            "flops_ratio": work_of(full, model, own) / work_of(arm, model, own),
            "metrics": {name: float(np.mean([row["metrics"][name] for row in own])) for name in own[0]["metrics"]},
        }
        if "full" in of:
            result[arm.name]["difference"] = difference(own, of["full"])
            whole = [row["score"] for row in of["full"]]
            if statistic is np.mean and any(whole):
                result[arm.name]["retention"] = retention(scores, whole)
    document = {"task": task, "n": len(rows) // len(arms), "prompt_tokens": prompt_tokens, "arms": result}
    return document | {"equal_ttft": compare_at_equal_ttft(arms, of)}


def work_of(arm: Arm, model: KVPModel, rows: Sequence[Row]) -> float:
    """Return the FLOPs of an arm's prefill of all rows' prompts: some arms read them as their lengths ask for."""
    lengths = Counter(row["prompt_tokens"] for row in rows)
    return float(sum(count * arm.work(model, tokens).flops for tokens, count in lengths.items()))


def retention(scores: Sequence[float], whole: Sequence[float]) -> dict[str, Any]:
    """Return what share of ``whole`` scores an arm keeps on the same items, with its interval."""
    return {"mean": float(np.mean(scores) / np.mean(whole)), "interval": bootstrap_ratio(scores, whole)}


def difference(rows: Sequence[Row], others: Sequence[Row]) -> dict[str, Any]:
    """Return the mean difference in score between two arms on the same items, with its interval."""
    differences = [row["score"] - other["score"] for row, other in zip(rows, others, strict=True)]
    return {"mean": float(np.mean(differences)), "interval": bootstrap(differences)}


def compare_at_equal_ttft(arms: Sequence[Arm], of: dict[str, list[Row]]) -> list[Row]:
    """Compare every arm of prediction with all others, ``full`` aside, whose first token comes as soon.

    As soon: its median TTFT is at most ``EQUAL_TTFT`` of the predicted arm's; faster ones count too.

    Args:
        arms: all that were measured.
        of: the rows of each, in the same order of items.

    Returns:
        ``arm``, ``other``, ``ttft_ratio`` (the other's over the arm's) and the arm's ``difference`` in score from it.
    """
    ttft_ms = {name: statistics.median(row["ttft_ms"] for row in rows) for name, rows in of.items()}
    found = []
    for arm in (arm for arm in arms if arm.kind.predicts):
        for other in (other for other in arms if not other.kind.predicts and other.name != "full"):
            ratio = ttft_ms[other.name] / ttft_ms[arm.name]
            if ratio <= EQUAL_TTFT:
                gained = difference(of[arm.name], of[other.name])
                found.append({"arm": arm.name, "other": other.name, "ttft_ratio": ratio, "difference": gained})
    return found


def grid(items: Sequence[Item], rows: Sequence[Row]) -> list[Row]:
    """Return the mean score per arm, prompt length and depth, of tasks that have these."""
    cells: dict[tuple[str, int, float], list[float]] = {}
    extras = {item.id: item.extra for item in items}
    for row in rows:
        extra = extras[row["item"]]
        cells.setdefault((row["arm"], extra["length"], extra["depth"]), []).append(row["score"])
    return [
        {"arm": arm, "prompt_tokens": length, "depth": depth, "n": len(scores), "score": float(np.mean(scores))}
        for (arm, length, depth), scores in cells.items()
    ]
