"""Pictures of results: time over prompt length, where it goes, and what is realised of the arithmetic."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..files.figures import check_picture, save_figure
from .document import TTFTResult, other_file, read_result

# Published: FLOPs ratio and speed-up on an M2 Pro CPU at 64 x 59 tokens (arXiv 2410.08391, OpenELM-1.1B).
PAPER_POINTS = {
    "C-450M": (2.36, 1.76),
    "C-270M": (3.98, 2.50),
    "LP-0.75": (1.34, 1.21),
    "LP-0.50": (1.93, 1.68),
    "LP-0.25": (3.60, 2.73),
}
PARTS = {
    "auxiliary_prefill_ms": "auxiliary prefill",
    "predict_ms": "prediction",
    "recompute_ms": "the base's own reading",
    "first_step_ms": "first step",
}


def read_drawable(path: Path) -> dict[str, Any]:
    """Return a result of ``kvp bench ttft``.

    Raises:
        InputError: it is none.
    """
    result = read_result(path)
    try:
        found = TTFTResult.model_validate(result)
    except ValidationError as error:
        raise other_file(path) from error
    kvp = [row for row in found.rows if row.arm == "kvp"]
    if not all(isinstance(getattr(row, part), int | float) for row in kvp for part in PARTS):
        raise other_file(path)
    return result


def draw_ttft(results: list[dict[str, Any]], picture: Path) -> None:
    """Draw results of ``kvp bench ttft`` into a file (PNG, SVG or PDF by its name).

    The first two panels show the first result, the third the kvp rows of all of them.

    Raises:
        InputError: see ``check_picture`` and ``save_figure``.
    """
    check_picture(picture)
    from matplotlib.figure import Figure

    first = results[0]
    figure = Figure(figsize=(13, 5), layout="constrained")
    times, parts, realised = figure.subplots(1, 3)
    draw_times(times, first["rows"])
    draw_parts(parts, [row for row in first["rows"] if row["arm"] == "kvp"])
    draw_realised(realised, results)
    for axes in (times, parts, realised):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    machine = first["machine"]
    where = f"{machine.get('chip', 'unknown chip')}, {machine.get('cores', 'unknown')} cores"
    figure.suptitle(f"{first['model']}, {first['precision']}, {where}", fontsize=11)
    save_figure(figure, picture)


def draw_times(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the median over prompt length with a band between the quartiles, one line per arm."""
    from matplotlib.ticker import LogLocator

    for number, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["prompt_tokens"])
        lengths = [row["prompt_tokens"] for row in own]
        median, q1, q3 = ([row["ttft_ms"][key] / 1e3 for row in own] for key in ("median", "q1", "q3"))
        axes.plot(lengths, median, "o-", color=f"C{number}", label=arm, markersize=4)
        axes.fill_between(lengths, q1, q3, color=f"C{number}", alpha=0.25, linewidth=0)
        if arm in ("full", "kvp"):
            floor = [row["floor_ms"] / 1e3 for row in own]
            axes.plot(lengths, floor, ":", color=f"C{number}", label=f"{arm}, floor", linewidth=1)
    axes.set(xlabel="prompt tokens", ylabel="seconds", title="Time to first token", xscale="log", yscale="log")
    ticks = sorted({row["prompt_tokens"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, columnspacing=1)


def draw_parts(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw where kvp's time goes as stacked bars, in shares, with the total above each bar."""
    labels = [str(row["prompt_tokens"]) for row in rows]
    totals = [sum(row[key] for key in PARTS) for row in rows]
    bottom = [0.0] * len(rows)
    for key, label in PARTS.items():
        heights = [100 * row[key] / total if total else 0.0 for row, total in zip(rows, totals, strict=True)]
        axes.bar(labels, heights, bottom=bottom, label=label, width=0.6)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    for place, total in enumerate(totals):
        axes.annotate(f"{total / 1e3:.2f} s", (place, 101), ha="center", fontsize=8)
    axes.set(xlabel="prompt tokens", ylabel="% of kvp's time", title="Where kvp's time goes", ylim=(0, 125))
    axes.set_yticks(range(0, 101, 25))
    axes.legend(frameon=False, fontsize=8, loc="upper center", ncols=3, columnspacing=1, handlelength=1)


def draw_realised(axes: Any, results: list[dict[str, Any]]) -> None:
    """Draw measured speed-up against FLOPs ratio, ours and the paper's; on the diagonal all is realised."""
    for number, result in enumerate(results):
        own = [row for row in result["rows"] if row["arm"] == "kvp" and row["speedup"]]
        x, y = ([row[key] for row in own] for key in ("flops_ratio", "speedup"))
        name = result["model"].removeprefix("openelm-")
        axes.scatter(x, y, color=f"C{number}", label=name, zorder=3, s=28)
        if own:
            longest = max(own, key=lambda row: row["prompt_tokens"])
            axes.annotate(
                f"{longest['prompt_tokens']}",
                (longest["flops_ratio"], longest["speedup"]),
                xytext=(5, 3),
                textcoords="offset points",
                fontsize=7,
            )
    axes.scatter(
        *zip(*PAPER_POINTS.values(), strict=True), marker="x", color="0.4", label="paper, 64x59", zorder=3, s=28
    )
    for name, point in PAPER_POINTS.items():
        axes.annotate(name, point, xytext=(5, -9), textcoords="offset points", fontsize=7, color="0.4")
    top = 1.06 * max([*axes.get_xlim(), *axes.get_ylim()])
    axes.plot([1, top], [1, top], "--", color="0.7", linewidth=1)
    axes.set(xlabel="FLOPs ratio", ylabel="times sooner", title="Realised of the arithmetic")
    axes.set(xlim=(min(0.9, *axes.get_xlim()), top), ylim=(min(0.9, *axes.get_ylim()), top))
    axes.legend(frameon=False, fontsize=8, loc="upper left")
