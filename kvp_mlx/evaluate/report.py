"""The page of results, made from committed JSON documents alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

NEEDED = {"task", "n", "prompt_tokens", "arms", "model", "recipe"}
METRICS = {"mcq": "accuracy", "squad": "F1", "needle": "found", "quote": "verbatim", "humaneval": "pass@1"}


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the documents of a folder that ``kvp eval TASK --out`` wrote, in the order of their names.

    Raises:
        InputError: none there, or a document of something else.
    """
    documents = []
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not readable JSON ({error}).") from error
        if not isinstance(document, dict) or not document.keys() >= NEEDED:
            raise InputError(f"{path} was not written by 'kvp eval TASK --out'; keep such documents elsewhere.")
        documents.append(document | {"file": path.name})
    if not documents:
        raise InputError(f"{folder} holds no JSON document of 'kvp eval TASK --out'.")
    return documents


def page(documents: Sequence[dict[str, Any]]) -> str:
    """Return the page in Markdown: a table per document, whatever it says."""
    return "\n".join(["# What a sooner first token costs", "", *(line for each in documents for line in section(each))])


def section(document: dict[str, Any]) -> list[str]:
    """Return one document's heading, recipe, table and grid."""
    recipe = document["recipe"]
    known = ", ".join(f"{name} {recipe[name][:19]}" for name in ("base", "predictor"))
    data = ", ".join(f"{name} ({digest[:8]})" for name, digest in recipe["data"].items())
    score = METRICS.get(document["task"], document["task"] if document["task"] == "perplexity" else "score")
    unit = ", nats per token" if score == "perplexity" else ""
    lines = [
        f"## {document['task']}: {data}",
        "",
        f"`{document['file']}`: {document['model']}, n = {document['n']}, {document['prompt_tokens']} prompt tokens "
        f"(median), seed {recipe['seed']}; {known}.",
        "",
        f"| arm | {score} | 95 % interval | less the full model's{unit} | TTFT | work of prefill |",
        "|---|---|---|---|---|---|",
    ]
    for name, arm in document["arms"].items():
        low, high = arm["interval"]
        apart = arm.get("difference")
        difference = f"{apart['mean']:+.3f} [{apart['interval'][0]:+.3f}, {apart['interval'][1]:+.3f}]" if apart else ""
        lines.append(
            f"| {name} | {arm['score']:.3f} | {low:.3f} to {high:.3f} | {difference} | {arm['ttft_ms']:.0f} ms | "
            f"{1 / arm['flops_ratio']:.2f} |"
        )
    return [*lines, "", *grid_lines(document.get("grid", []))]


def grid_lines(grid: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table of arms and prompt lengths by depth."""
    if not grid:
        return []
    depths = sorted({cell["depth"] for cell in grid})
    cells = {(cell["arm"], cell["prompt_tokens"], cell["depth"]): cell["score"] for cell in grid}
    rows = list(dict.fromkeys((cell["arm"], cell["prompt_tokens"]) for cell in grid))
    lines = [f"| arm, prompt tokens | {' | '.join(f'depth {depth:g}' for depth in depths)} |"]
    lines.append("|---" * (1 + len(depths)) + "|")
    for arm, length in rows:
        scores = [cells.get((arm, length, depth)) for depth in depths]
        shown = " | ".join("" if score is None else f"{score:.2f}" for score in scores)
        lines.append(f"| {arm}, {length} | {shown} |")
    return [*lines, ""]
