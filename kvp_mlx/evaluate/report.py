"""The page of results, made from committed JSON documents alone."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arms.kinds import parse_arm
from ..errors import InputError
from ..files import read_json
from .document import Document, checked_document
from .task import Task
from .tasks import all_tasks

INTRODUCTION = """Made by `kvp eval report` from the JSON documents of `kvp eval suite` and `kvp eval TASK --out`; but
for notes below a table nothing here is written by hand, and what speaks against the method stands as well. Brackets
are 95 % bootstrap intervals over items (differences and shares: paired). TTFT is the median over the items as they
were measured, other arms in turn. A share behind `lazy`, `spec`, `static` or `random` was chosen beforehand, up to
0.95, so that its measured TTFT came closest to the predicted arm's at the task's median prompt length; how close it
came in the run is told with it, and those at most a tenth slower count as equally fast. "No work saved": so short are
the prompts that what is read exactly leaves nothing to predict, or too little. The full model gets next to nothing
right in some tasks (its own column says which): there, nothing can be learnt about prediction."""


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the documents of a folder that ``kvp eval TASK --out`` wrote, in the order of their names.

    Raises:
        InputError: none there, or a document of something else.
    """
    documents = []
    for path in sorted(folder.glob("*.json")):
        try:
            document = read_json(path)
        except OSError as error:
            raise InputError(f"{path} is not readable JSON ({error}).") from error
        documents.append(checked_document(document, str(path), Document) | {"file": path.name})
    if not documents:
        raise InputError(f"{folder} holds no JSON document of 'kvp eval TASK --out'.")
    return documents


def page(parts: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Return the page in Markdown: how it was measured, then of each bundle the summary and a section per document.

    Args:
        parts: documents of one bundle each; with several, each has a heading, and the first comes first.
    """
    lines = ["# What a sooner first token costs", "", INTRODUCTION, ""]
    level, names = "##" if len(parts) == 1 else "###", [models_of(documents) for documents in parts]
    for documents in parts:
        if len(parts) > 1:
            name = models_of(documents)
            lines += [f"## {name}, maps {maps_of(documents)}" if names.count(name) > 1 else f"## {name}", ""]
        lines += [*summary_lines(documents), "", *(line for each in documents for line in section(each, level))]
    return "\n".join(lines)


def models_of(documents: Sequence[dict[str, Any]]) -> str:
    """Return the names of what documents are about."""
    return ", ".join(dict.fromkeys(str(each["model"]) for each in documents))


def maps_of(documents: Sequence[dict[str, Any]]) -> str:
    """Return the hashes of the maps that were measured: they tell a bundle from what it was before."""
    hashes = [str(each["recipe"].get("predictor", "")) for each in documents if isinstance(each.get("recipe"), dict)]
    return " and ".join(dict.fromkeys(found.removeprefix("sha256:")[:12] for found in hashes if found))


def summary(documents: Sequence[dict[str, Any]]) -> str:
    """Return the README's table, a row per document: full, the predicted arms, the best pruning as fast as these."""
    return "\n".join(summary_lines(documents)) + "\n"


def summary_lines(documents: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of ``summary``, and the average differences of tasks with several documents."""
    order = [place.name for task in all_tasks().values() for place in task.places]
    ordered = sorted(documents, key=lambda each: order.index(title(each)) if title(each) in order else len(order))
    arms = (arm for each in ordered for arm in each["arms"] if arm not in each.get("dials", []))
    predicted = list(dict.fromkeys(arm for arm in arms if parse_arm(arm).kind.predicts))
    columns = [part for arm in predicted for part in (f"{arm} (of full)", f"best as fast as {arm}")]
    lines = ["| task | n | full | " + " | ".join(columns) + " | auxiliary alone |", "|---" * (4 + len(columns)) + "|"]
    for each in ordered:
        cells = [part for arm in predicted for part in (score_cell(each, arm), rival_cell(each, arm))]
        shown = [score_name(each), str(each["n"]), score_cell(each, "full"), *cells, score_cell(each, "auxiliary")]
        lines.append(f"| {' | '.join(shown)} |")
    return [*lines, *averages(ordered, predicted)]


def title(document: dict[str, Any]) -> str:
    """Return a document's own name, that of its file."""
    return str(document["file"]).removesuffix(".json")


def shown(score: float) -> str:
    """Return a score to three places; a perplexity of a model that knows nothing is short, too."""
    return f"{score:.3f}" if score < 1e5 else f"{score:.1e}"


def score_name(document: dict[str, Any]) -> str:
    """Return the name of a document's file and what its score is."""
    name, metric = title(document), metric_of(document)
    shown_name = name if name == metric else f"{name}, {metric}"
    task = task_of(document)
    if task is None or not task.less_is_better:
        return shown_name
    unit = f"; differences in {task.difference_unit}" if task.difference_unit else ""
    return f"{shown_name} (less is better{unit})"


def task_of(document: dict[str, Any]) -> Task | None:
    """Return a document's task, if we know it."""
    return all_tasks().get(document["task"])


def metric_of(document: dict[str, Any]) -> str:
    """Return what a document's score is."""
    task = task_of(document)
    return "score" if task is None else task.metric


def score_cell(document: dict[str, Any], arm: str) -> str:
    """Return an arm's score and, but for the full model, what share of the full model's that is."""
    found = document["arms"].get(arm)
    if found is None:
        return ""
    if parse_arm(arm).kind.predicts and not saves_work(document, arm):
        return f"{shown(found['score'])} (no work saved)"
    retention = found.get("retention")
    if retention is None or arm == "full":
        return shown(found["score"])
    low, high = retention["interval"]
    return f"{found['score']:.3f} ({retention['mean']:.0%}, {low:.0%} to {high:.0%})"


def rival_cell(document: dict[str, Any], arm: str) -> str:
    """Return the best token-pruning arm that is as fast as a predicted one, and how far that one is ahead of it."""
    rivals = [row for row in document.get("equal_ttft", []) if row["arm"] == arm and row["other"] in pruned(document)]
    if not rivals or not saves_work(document, arm):
        return ""
    task = task_of(document)
    sign = -1 if task is not None and task.less_is_better else 1
    best = max(rivals, key=lambda row: sign * document["arms"][row["other"]]["score"])
    low, high = best["difference"]["interval"]
    rival = f"{best['other']} {document['arms'][best['other']]['score']:.3f} at {best['ttft_ratio']:.2f} of its time"
    return f"{rival}; {arm} {best['difference']['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def saves_work(document: dict[str, Any], arm: str) -> bool:
    """Return whether an arm does less than full prefill: of short prompts nothing is predicted."""
    return bool(document["arms"][arm]["flops_ratio"] > 1)


def pruned(document: dict[str, Any]) -> set[str]:
    """Return the token-pruning arms of a document."""
    return {name for name in document["arms"] if parse_arm(name).kind.prunes}


def averages(documents: Sequence[dict[str, Any]], arms: Sequence[str]) -> list[str]:
    """Return a line for each task that has one, on the mean difference from the full model over its documents."""
    lines = []
    for task in all_tasks().values():
        own = [each for each in documents if each["task"] == task.name and "full" in each["arms"]]
        if task.average and (parts := average_parts(own, arms)):
            names = ", ".join(title(each) for each in own)
            lines += ["", f"{task.average}, mean difference from full over {names}: {'; '.join(parts)}."]
    return lines


def average_parts(documents: Sequence[dict[str, Any]], arms: Sequence[str]) -> list[str]:
    """Return the mean difference over several documents of each arm that all have, with its interval.

    The documents are independent, so the interval's half-width is the root of the sum of squares over their number.
    """
    parts = []
    for arm in arms if len(documents) > 1 else ():
        if not all(arm in each["arms"] and saves_work(each, arm) for each in documents):
            continue
        found = [each["arms"][arm]["difference"] for each in documents]
        mean = sum(one["mean"] for one in found) / len(found)
        half = math.hypot(*((one["interval"][1] - one["interval"][0]) / 2 for one in found)) / len(found)
        parts.append(f"{arm} {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]")
    return parts


def equal_ttft_lines(document: dict[str, Any]) -> list[str]:
    """Return the table of what is as fast as each predicted arm, and which pruning cannot be."""
    lines = []
    if rows := document.get("equal_ttft"):
        lines = [
            "| arm | as fast or faster | its TTFT over the arm's | score of the arm less its |",
            "|---|---|---|---|",
        ]
        for row in rows:
            low, high = row["difference"]["interval"]
            difference = f"{row['difference']['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
            lines.append(f"| {row['arm']} | {row['other']} | {row['ttft_ratio']:.2f} | {difference} |")
        lines.append("")
    slower = [row for row in document.get("matched", []) if row["arm"] is None]
    for row in slower:
        least = f"{row['ttft_ratio']:.2f} times as long at the least share tried"
        lines += [f"No share of the prompt makes {row['kind']} as fast as {row['target']}: {least}.", ""]
    return lines


def section(document: dict[str, Any], level: str = "##") -> list[str]:
    """Return one document's heading (of a level), recipe, table and grid."""
    recipe = document["recipe"]
    known = ", ".join(f"{name} {recipe[name][:19]}" for name in ("base", "predictor"))
    version = recipe.get("kvp_mlx", "0.1.0")
    data = ", ".join(f"{name} ({digest[:8]})" for name, digest in recipe["data"].items())
    task, score = task_of(document), metric_of(document)
    unit = f", {task.difference_unit}" if task is not None and task.difference_unit else ""
    lines = [
        f"{level} {title(document)}: {data}",
        "",
        f"`{document['file']}`: {document['model']}, n = {document['n']}, {document['prompt_tokens']} prompt tokens "
        f"(median), seed {recipe['seed']}; kvp-mlx {version}, {known}. {machine_line(document)}",
        "",
        f"| arm | {score} | 95 % interval | of full | less the full model's{unit} | TTFT | work of prefill |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arm in document["arms"].items():
        low, high = arm["interval"]
        gap = arm.get("difference")
        difference = f"{gap['mean']:+.3f} [{gap['interval'][0]:+.3f}, {gap['interval'][1]:+.3f}]" if gap else ""
        kept = arm.get("retention")
        share = f"{kept['mean']:.0%} [{kept['interval'][0]:.0%}, {kept['interval'][1]:.0%}]" if kept else ""
        lines.append(
            f"| {name} | {shown(arm['score'])} | {shown(low)} to {shown(high)} | {share} | {difference} | "
            f"{arm['ttft_ms']:.0f} ms | {1 / arm['flops_ratio']:.2f} |"
        )
    notes = [line for note in document.get("notes", []) for line in (note, "")]
    return [*lines, "", *notes, *equal_ttft_lines(document), *grid_lines(document.get("grid", []))]


def machine_line(document: dict[str, Any]) -> str:
    """Return what a document was measured on."""
    found = document.get("machine")
    if found is None:
        return ""
    return (
        f"{found['chip']}, {found['blas_threads']} BLAS thread(s) a process, mlx {found['mlx']}, "
        f"mlx-lm {found['mlx_lm']}, commit {found['commit']}."
    )


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
