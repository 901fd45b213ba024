"""The picture of a training run: its loss, and what validation measured."""

import math
from pathlib import Path

from ..errors import InputError
from ..files.figures import save_figure
from .state import read_log

LOSSES = ("continuation", "residual", "base", "auxiliary", "consistency")


def draw_training(log: Path, picture: Path) -> bool:
    """Draw a run's log into a PNG; returns whether matplotlib, and a step to draw, were there.

    Args:
        log: log.jsonl of a run.
        picture: file to write.
    """
    try:
        from matplotlib.figure import Figure

        entries = read_log(log)
    except (ImportError, InputError):
        return False
    steps = [entry for entry in entries if "loss" in entry]
    if not steps:
        return False
    checks = [entry for entry in entries if "recovery" in entry]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens = [entry["tokens"] / 1e3 for entry in steps]
    names = [name for name in LOSSES if name in steps[-1]]
    for number, name in enumerate(names):
        values = [entry.get(name, math.nan) for entry in steps]
        left.plot(tokens, values, color=f"C{number}", alpha=0.2, linewidth=0.8)
        left.plot(tokens, smoothed(values), color=f"C{number}", label=name)
    left.set(xlabel="thousand tokens", ylabel="loss", title="Training", yscale="log")
    left.legend(frameon=False)
    for number, name in enumerate(("recovery", "separation")):
        values = [entry.get(name, math.nan) for entry in checks]
        right.plot([e["tokens"] / 1e3 for e in checks], values, "o-", color=f"C{number}", label=name)
    right.axhline(1.0, color="0.7", linewidth=0.8)
    right.set(xlabel="thousand tokens", ylabel="share of the full model's", title="Held-back passages")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    save_figure(figure, picture)
    return True


def smoothed(values: list[float], share: float = 0.05) -> list[float]:
    """Return a running mean over a share of the run, at least five steps."""
    steps = max(5.0, share * len(values))
    out: list[float] = []
    for value in values:
        weight = max(1 / steps, 1 / (len(out) + 1))
        out.append(value if not out else out[-1] + weight * (value - out[-1]))
    return out
