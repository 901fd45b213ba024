"""The loop that all tasks share: items by arms, into a log that a kill cannot spoil."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arms.arm import Arm
from ..bundle.loading import KVPModel
from ..engine.prefill import Progress
from ..errors import InputError
from ..files import parse_json
from .task import Item, Measure, Row

BATCH = 32
"""Rows that are asked for at once."""


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


def open_log(log: Path, recipe: dict[str, Any]) -> dict[tuple[str, str], Row]:
    """Begin a log, or return what a begun one holds; a last line that a kill cut short is taken off."""
    try:
        data = log.read_bytes() if log.exists() else b""
        begins = json_line({"recipe": recipe}).encode()
        if begins.startswith(data):  # nothing yet, or cut short in its first line
            log.write_bytes(begins)
            return {}
        whole = data[: data.rfind(b"\n") + 1] or data
        rows = _rows_of(log, whole, recipe)
        os.truncate(log, len(whole))  # now that it is known to be ours
    except OSError as error:
        raise InputError(f"{log} cannot be written ({error.strerror}); choose another --log.") from error
    return {(row["item"], row["arm"]): row for row in rows}


def _rows_of(log: Path, data: bytes, recipe: dict[str, Any]) -> list[Row]:
    try:
        lines = [parse_json(line, f"{log}, line {number}") for number, line in enumerate(data.splitlines(), 1)]
    except InputError as error:
        raise InputError(f"{log} is not a log of kvp eval ({error}); choose another --log.") from error
    if not isinstance(lines[0], dict) or json.dumps(lines[0].get("recipe")) != json.dumps(recipe):
        raise InputError(f"{log} was begun with other data, options, model, version or machine; choose another.")
    names = lines[1].get("metrics") if len(lines) > 1 and is_row(lines[1]) else {}
    rows = enumerate(lines[1:], 2)
    if damaged := [number for number, row in rows if not is_row(row) or row["metrics"].keys() != names.keys()]:
        raise InputError(f"{log}, line {damaged[0]} is no row of kvp eval; remove that line, or choose another --log.")
    return lines[1:]


def is_row(row: Any) -> bool:
    """Return whether a line of a log has what a summary needs of it."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("item", "arm")):
        return False
    metrics = row.get("metrics")
    numbers = [row.get(name) for name in ("score", "ttft_ms", "prompt_tokens")]
    numbers += metrics.values() if isinstance(metrics, dict) else [None]
    return all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)


def append_line(log: Path, row: Row) -> None:
    """Append one JSON line."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(json_line(row))


def json_line(row: Row) -> str:
    """Return a row as a line of a log."""
    return json.dumps(row, ensure_ascii=False) + "\n"
