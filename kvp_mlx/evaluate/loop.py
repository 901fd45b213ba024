"""The loop that all tasks share: items by arms, a log that a kill cannot spoil, means with their intervals."""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..arms.arm import Arm
from ..arms.work import arm_work
from ..bundle.loading import KVPModel
from ..engine.prefill import Progress
from ..errors import InputError
from .scores import bootstrap, bootstrap_ratio
from .tasks import Item

Row = dict[str, Any]
Asked = tuple[Arm, Item]
Measure = Callable[[KVPModel, Sequence[Asked]], Iterable[Row]]
"""What arms do with items, a row for each in order; generated answers come in batches."""
BATCH = 32
"""Rows that are asked for at once."""
EQUAL_TTFT = 1.1
"""A token-pruning arm up to this much slower still counts as equally fast: the measurement's spread, at our expense."""


def run_items(
    model: KVPModel,
    arms: Sequence[Arm],
    items: Sequence[Item],
    measure: Measure,
    *,
    recipe: dict[str, Any],
    log: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Row]:
    """Measure every item under every arm, going on with a log that was begun.

    Args:
        model: the bundle.
        arms: ways to the first token; of one item they follow one another, so that a slow hour hits all alike.
        items: what is asked.
        measure: see ``Measure``.
        recipe: what the rows depend on besides; a log of another recipe is refused.
        log: JSONL, the recipe first, then a row per item and arm as soon as it is known, at most ``BATCH`` at once.
        progress: called with (rows done, rows in all).

    Returns:
        The rows of these arms and items, in order.

    Raises:
        InputError: the log is of another recipe or no log.
    """
    done = open_log(log, recipe) if log else {}
    asked = [(arm, item) for item in items for arm in arms]
    missing = [(arm, item) for arm, item in asked if (item.id, arm.name) not in done]
    known = len(asked) - len(missing)
    progress(known, len(asked))
    for start in range(0, len(missing), BATCH):
        batch = missing[start : start + BATCH]
        for number, ((arm, item), found) in enumerate(zip(batch, measure(model, batch), strict=True), 1):
            row = {"item": item.id, "arm": arm.name} | found
            if log:
                append_line(log, row)
            done[item.id, arm.name] = json.loads(json.dumps(row))
            progress(known + start + number, len(asked))
    return [done[item.id, arm.name] for arm, item in asked]


def one_by_one(measure: Callable[[KVPModel, Arm, Item], Row]) -> Measure:
    """Return how many are measured, given how one is."""

    def measure_all(model: KVPModel, asked: Sequence[Asked]) -> Iterator[Row]:
        for arm, item in asked:
            yield measure(model, arm, item)

    return measure_all


def open_log(log: Path, recipe: dict[str, Any]) -> dict[tuple[str, str], Row]:
    """Begin a log, or return what a begun one holds; a last line that a kill cut short is taken off."""
    try:
        if not log.exists() or not log.read_bytes():
            log.write_text("")
            append_line(log, {"recipe": recipe})
            return {}
        data = log.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        if whole != data:
            log.write_bytes(whole)
    except OSError as error:
        raise InputError(f"{log} cannot be written ({error.strerror}); choose another --log.") from error
    except ValueError as error:
        raise InputError(f"{log} is not a log of kvp eval; choose another --log.") from error
    if not lines:
        append_line(log, {"recipe": recipe})
        return {}
    if not isinstance(lines[0], dict) or lines[0].get("recipe") != json.loads(json.dumps(recipe)):
        raise InputError(f"{log} was begun with other data, options, model, version or machine; choose another.")
    return {(row["item"], row["arm"]): row for row in lines[1:]}


def append_line(log: Path, row: Row) -> None:
    """Append one JSON line."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


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
    intervals; ``flops_ratio`` is full prefill's work over the arm's at the median prompt length; ``metrics`` are means
    of the row's other scores. ``equal_ttft`` is as ``compare_at_equal_ttft`` returns it.
    """
    result: dict[str, Any] = {}
    of = {arm.name: [row for row in rows if row["arm"] == arm.name] for arm in arms}
    prompt_tokens = int(statistics.median(row["prompt_tokens"] for row in rows))
    for arm in arms:
        scores = [row["score"] for row in of[arm.name]]
        result[arm.name] = {
            "score": float(statistic(np.array(scores))),
            "interval": bootstrap(scores, statistic),
            "ttft_ms": statistics.median(row["ttft_ms"] for row in of[arm.name]),
            "flops_ratio": arm_work(model, Arm("full", "full"), prompt_tokens).flops
            / arm_work(model, arm, prompt_tokens).flops,
            "metrics": {
                name: float(np.mean([row["metrics"][name] for row in of[arm.name]]))
                for name in of[arm.name][0]["metrics"]
            },
        }
        if "full" in of:
            apart = [row["score"] - other["score"] for row, other in zip(of[arm.name], of["full"], strict=True)]
            result[arm.name]["difference"] = {"mean": float(np.mean(apart)), "interval": bootstrap(apart)}
            whole = [row["score"] for row in of["full"]]
            if statistic is np.mean and any(whole):
                ratio = float(np.mean(scores) / np.mean(whole))
                result[arm.name]["retention"] = {"mean": ratio, "interval": bootstrap_ratio(scores, whole)}
    document = {"task": task, "n": len(rows) // len(arms), "prompt_tokens": prompt_tokens, "arms": result}
    return document | {"equal_ttft": compare_at_equal_ttft(arms, of)}


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
    for arm in (arm for arm in arms if arm.kind == "kvp"):
        for other in (other for other in arms if other.kind not in ("kvp", "full")):
            ratio = ttft_ms[other.name] / ttft_ms[arm.name]
            if ratio > EQUAL_TTFT:
                continue
            pairs = zip(of[arm.name], of[other.name], strict=True)
            apart = [row["score"] - against["score"] for row, against in pairs]
            difference = {"mean": float(np.mean(apart)), "interval": bootstrap(apart)}
            found.append({"arm": arm.name, "other": other.name, "ttft_ratio": ratio, "difference": difference})
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
