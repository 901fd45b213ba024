"""Score against time to first token and against prefill work, over all arms and dials: the figure of the paper."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..arms.kinds import parse_arm
from ..errors import InputError
from ..files import read_json
from ..files.figures import check_picture, save_figure
from .dial_map import is_of_dials
from .document import Dials, Points, checked_document
from .tasks import all_tasks

Point = dict[str, Any]
OF_BUNDLE = {
    "kvp_mlx",
    "mlx",
    "mlx_lm",
    "auxiliary",
    "predictor",
    "adapter",
    "recompute",
    "choice",
    "dials",
    "auto_min_tokens",
}
"""What recipes of results that are compared may differ in: the bundle and the versions."""


def read_documents(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the JSON documents of files.

    Raises:
        InputError: a file that is not readable JSON.
    """
    documents = []
    for path in paths:
        try:
            document = read_json(path)
            documents.append(checked_document(document, str(path), Dials if is_of_dials(document) else Points))
        except (InputError, OSError) as error:
            raise InputError(f"{path} is no JSON document of 'kvp eval TASK --out' ({error}).") from error
    return documents


def points(results: Sequence[dict[str, Any]]) -> list[Point]:
    """Return one point per result and arm, best score first, with the fronts it lies on.

    Args:
        results: JSON documents of one task (``kvp eval TASK --out``), of one or several bundles of one base.

    Raises:
        InputError: no results, documents of something else, or what cannot be compared.
    """
    needed = {"task", "n", "model", "arms"}
    if not results or any(not isinstance(result, dict) or not needed <= result.keys() for result in results):
        raise InputError("pareto takes the JSON documents that 'kvp eval TASK --out FILE' wrote.")
    if len(tasks := {result["task"] for result in results}) > 1:
        raise InputError(f"pareto compares one task at a time, not {', '.join(sorted(tasks))}.")
    recipes = [{"n": result["n"]} | result.get("recipe", {}) for result in results]
    for key in sorted({key for recipe in recipes for key in recipe} - OF_BUNDLE):
        if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes):
            raise InputError(f"pareto compares results of one {key.replace('_', ' ')}, which these are not.")
    task = all_tasks().get(results[0]["task"])
    sign = -1 if task is not None and task.less_is_better else 1
    several = len({result["model"] for result in results}) > 1
    found: dict[str, Point] = {}
    for result in results:
        for name, arm in result["arms"].items():
            is_shared = not parse_arm(name).kind.is_of_bundle  # one point stands for all bundles
            label = name if is_shared or not several else f"{result['model']}: {name}"
            kept = {key: arm[key] for key in ("score", "interval", "ttft_ms", "flops_ratio")}
            if label in found and not is_shared:
                raise InputError(f"two of these results measure {label}; leave one out.")
            found.setdefault(label, {"label": label, "arm": name, "n": result["n"], **kept})
    rows = sorted(found.values(), key=lambda point: -sign * point["score"])
    for row in rows:
        for front, cost in (
            ("fastest_so_good", lambda p: p["ttft_ms"]),
            ("cheapest_so_good", lambda p: -p["flops_ratio"]),
        ):
            row[front] = not any(
                cost(other) < cost(row) and sign * other["score"] >= sign * row["score"] for other in rows
            )
    return rows


def colour_of(arm: str) -> str:
    """Return an arm's colour in the pictures."""
    if parse_arm(arm).kind.predicts:
        return "tab:blue"
    return "tab:orange" if arm == "full" else "0.6"


SIDES: tuple[tuple[str, str, Callable[[Point], float]], ...] = (
    ("time to first token, ms (median)", "fastest_so_good", lambda row: row["ttft_ms"]),
    ("prefill work, share of full prefill's", "cheapest_so_good", lambda row: 1 / row["flops_ratio"]),
)


def draw(tasks: Mapping[str, Sequence[Point]], out: Path) -> None:
    """Draw a row of two panels per task: score over TTFT, and over prefill work relative to the full model's.

    Args:
        tasks: what ``points`` returned, by the name that is to stand beside it.
        out: the picture.

    Raises:
        InputError: see ``picture``.
    """
    with picture(out, len(SIDES), len(tasks)) as grid:
        for panels, (task, rows) in zip(grid, tasks.items(), strict=True):
            for panel, (title, front, place) in zip(panels, SIDES, strict=True):
                draw_points(panel, rows, front, place)
                panel.set_xlabel(title)
            panels[0].set_ylabel(f"{task}, n = {rows[0]['n']}")
            panels[0].set_ylim(bottom=0)


def draw_points(panel: Any, rows: Sequence[Point], front: str, place: Callable[[Point], float]) -> None:
    """Draw a task's points with their intervals, and join those on a front."""
    for row in rows:
        low, high = row["interval"]
        bars = [[max(0.0, row["score"] - low)], [max(0.0, high - row["score"])]]
        panel.errorbar(place(row), row["score"], yerr=bars, fmt="o", color=colour_of(row["arm"]), ecolor="0.85")
        annotate(panel, row["label"], place(row), row["score"])
    draw_front(panel, [(place(row), row["score"]) for row in rows if row[front]])


def annotate(panel: Any, text: str, x: float, y: float) -> None:
    """Write a point's name beside it."""
    panel.annotate(text, (x, y), fontsize=7, xytext=(4, 3), textcoords="offset points")


def draw_front(panel: Any, places: list[tuple[float, float]]) -> None:
    """Join the points that nothing beats."""
    panel.plot(*zip(*sorted(places), strict=True), color="0.7", linewidth=1, zorder=0)


@contextmanager
def picture(out: Path, columns: int, rows: int = 1) -> Iterator[Sequence[Sequence[Any]]]:
    """Give rows of panels, with one scale of scores in each, to draw on; at the end they are a file.

    Raises:
        InputError: see ``check_picture`` and ``save_figure``.
    """
    check_picture(out)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(rows, columns, figsize=(6 * columns, 5 * rows), sharey="row", squeeze=False)
    try:
        yield panels.tolist()
        figure.tight_layout()
        save_figure(figure, out)
    finally:
        pyplot.close(figure)


def draw_dials(rows: Sequence[Point], out: Path) -> None:
    """Draw recovery over TTFT as a share of full prefill's, a panel per prompt length, a colour per bundle.

    Raises:
        InputError: see ``picture``.
    """
    lengths = sorted({row["prompt_tokens"] for row in rows})
    models = list(dict.fromkeys(row["model"] for row in rows))
    with picture(out, len(lengths)) as (panels,):
        for panel, length in zip(panels, lengths, strict=True):
            here = [row for row in rows if row["prompt_tokens"] == length]
            for number, model in enumerate(models):
                of_model = sorted((row["ttft_ratio"], row["recovery"]) for row in here if row["model"] == model)
                if of_model:
                    colour = "0.3" if model is None else f"C{number}"
                    panel.plot(*zip(*of_model, strict=True), "o", color=colour, label=model or "full")
            for row in here:
                annotate(panel, row["label"].rpartition(": ")[2], row["ttft_ratio"], row["recovery"])
            draw_front(panel, [(row["ttft_ratio"], row["recovery"]) for row in here if row["fastest_so_good"]])
            prompts = f"{here[0]['documents']} prompts of about {length:,} tokens"
            panel.set_xlabel(f"time to first token, share of full prefill's ({prompts})")
            panel.legend(fontsize=7)
        panels[0].set_ylabel("recovery")
