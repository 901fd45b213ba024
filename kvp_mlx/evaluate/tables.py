"""Writes the tables of README.md and docs/*.md from committed results (``make readme``), checked by tests.

A table stands between two marks: ``<!-- ttft|decode|drafts|memory FILE -->`` (of the bench) and ``<!-- end -->``,
``<!-- evaluation FOLDER -->`` and ``<!-- end evaluation -->``, ``<!-- headline FILE FOLDER -->`` and
``<!-- end headline -->`` (time and quality beside each other).
"""

import re
import sys
from pathlib import Path
from typing import Any

from ..bench.document import read_result
from ..bench.report import DECODE, DRAFTS, MEMORY, TTFT, Columns, markdown, number
from .report import read_results, summary

ROOT = Path(__file__).parents[2]
TABLES: dict[str, Columns] = {"ttft": TTFT, "decode": DECODE, "drafts": DRAFTS, "memory": MEMORY}
BLOCK = re.compile(r"(<!-- (\w+) (bench/results/\S+\.json) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
EVALUATION = re.compile(r"(<!-- evaluation (\S+) -->\n)(.*?)(<!-- end evaluation -->)", re.DOTALL)
HEADLINE = re.compile(r"(<!-- headline (\S+\.json) (\S+) -->\n)(.*?)(<!-- end headline -->)", re.DOTALL)
NOT_YET = "Not measured yet on this default: `make evaluate DATA=folder`, then `make readme`.\n"
HEADLINE_TABLE: Columns = {
    "prompt tokens": number("prompt_tokens"),
    "mlx-lm": number("mlx-lm", ".2f", 1e-3, " s"),
    "full": number("full", ".2f", 1e-3, " s"),
    "kvp": number("kvp", ".2f", 1e-3, " s"),
    "sooner than full": lambda row: f"{row['full'] / row['kvp']:.2f}x",
    "quality kept": lambda row: row["kept"],
}


def pages(root: Path = ROOT) -> list[Path]:
    """Return the files that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def render(text: str, root: Path = ROOT) -> str:
    """Return a page with all its tables made from the results as they are now."""

    def block(match: re.Match[str]) -> str:
        command = match[2]
        rows = read_result(root / match[3], command)["rows"]
        made = ttft_table(rows) if command == "ttft" else markdown(TABLES[command], rows)
        return f"{match[1]}{made}{match[5]}"

    def evaluation(match: re.Match[str]) -> str:
        folder = root / match[2]
        return f"{match[1]}{summary(read_results(folder)) if any(folder.glob('*.json')) else NOT_YET}{match[4]}"

    def headline(match: re.Match[str]) -> str:
        rows = headline_rows(read_result(root / match[2])["rows"], read_results(root / match[3]))
        return f"{match[1]}{markdown(HEADLINE_TABLE, rows)}{match[5]}"

    return HEADLINE.sub(headline, EVALUATION.sub(evaluation, BLOCK.sub(block, text)))


def ttft_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of ``kvp bench ttft``; where ``full`` was not timed, beside mlx-lm's own prefill."""
    mlx_lm = medians(rows, "mlx-lm")
    if not mlx_lm or medians(rows, "full"):
        return markdown(TTFT, rows)
    beside = [row | {"over_mlx_lm": mlx_lm[_size(row)] / row["ttft_ms"]["median"]} for row in rows]
    return markdown(TTFT | {"sooner than mlx-lm": number("over_mlx_lm", ".2f", unit="x")}, beside)


def medians(rows: list[dict[str, Any]], arm: str) -> dict[tuple[int, int], float]:
    """Return an arm's median TTFT in ms by prompt length and batch size."""
    return {_size(row): row["ttft_ms"]["median"] for row in rows if row["arm"] == arm}


def headline_rows(timed: list[dict[str, Any]], evaluated: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return times and quality kept of ``kvp``: of SQuAD as it was timed there, then of the bench, beside needles."""
    documents = {document["task"]: document for document in evaluated}
    rows = []
    if squad := documents.get("squad"):
        arms = squad["arms"]
        times = {name: arms[name]["ttft_ms"] for name in ("full", "kvp")}
        kept = f"{arms['kvp']['retention']['mean']:.0%} (SQuAD)"
        rows.append({"prompt_tokens": squad["prompt_tokens"], "mlx-lm": None, **times, "kept": kept})
    found = needles_found(documents["needle"]) if "needle" in documents else {}
    of_arm = {arm: medians(timed, arm) for arm in ("mlx-lm", "full", "kvp")}
    for size, full_ms in of_arm["full"].items():
        times = {"mlx-lm": of_arm["mlx-lm"].get(size), "full": full_ms, "kvp": of_arm["kvp"][size]}
        full, kvp = found.get(("full", size[0])), found.get(("kvp", size[0]))
        kept = f"{kvp / full:.0%} (needles)" if full and kvp is not None else ""
        rows.append({"prompt_tokens": size[0], **times, "kept": kept})
    return rows


def needles_found(document: dict[str, Any]) -> dict[tuple[str, int], float]:
    """Return the mean score by arm and prompt length, over all depths."""
    scores: dict[tuple[str, int], list[float]] = {}
    for cell in document.get("grid", []):
        scores.setdefault((cell["arm"], cell["prompt_tokens"]), []).append(cell["score"])
    return {key: sum(values) / len(values) for key, values in scores.items()}


def _size(row: dict[str, Any]) -> tuple[int, int]:
    return row["prompt_tokens"], row["batch_size"]


def main() -> None:
    """Rewrite the tables in the checkout."""
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if (made := render(text)) != text:
            path.write_text(made, encoding="utf-8")
        print(f"{path} is current", file=sys.stderr)  # noqa: T201 - a script


if __name__ == "__main__":
    main()
