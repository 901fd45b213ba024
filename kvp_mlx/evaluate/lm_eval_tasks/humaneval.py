"""What kvp_humaneval.yaml refers to; lm-eval loads this file by its place."""

from typing import Any

from ..sandbox import passes
from ..tasks import Item, humaneval_program


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether the completion passes the problem's tests."""
    return {"pass@1": float(passes(humaneval_program(Item(doc["task_id"], doc["prompt"], extra=doc), results[0])))}
