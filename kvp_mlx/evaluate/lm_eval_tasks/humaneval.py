"""What kvp_humaneval.yaml refers to; lm-eval loads this file by its place."""

from typing import Any

from kvp_mlx.evaluate.sandbox import passes
from kvp_mlx.evaluate.task import Item
from kvp_mlx.evaluate.tasks.humaneval import program


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether the completion passes the problem's tests."""
    return {"pass@1": float(passes(program(Item(doc["task_id"], doc["prompt"], extra=doc), results[0])))}
