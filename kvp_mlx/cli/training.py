"""``kvp fit`` and ``kvp train``."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .common import Json, clean_stdout, print_json, progress_bar, say

Base = Annotated[str, typer.Argument(help="mlx-lm model: directory, Hub id or the default's alias.")]
Data = Annotated[
    list[Path], typer.Option("--data", help="Text file (.txt, .md, .jsonl, also .gz) or folder; repeatable.")
]
Out = Annotated[Path, typer.Option("--out", help="Bundle directory to write.")]
Layers = Annotated[int | None, typer.Option("--layers", help="Prefix: the base's own first K layers read the prompt.")]
Auxiliary = Annotated[Path | None, typer.Option("--auxiliary", help="A smaller mlx-lm model of the same tokeniser.")]
Prune = Annotated[float | None, typer.Option("--prune", help="Keep 0.75, 0.5 or 0.25 of the base's layers.")]
Sources = Annotated[int, typer.Option("--sources", help="Auxiliary layers that each base layer reads.")]
Window = Annotated[int, typer.Option("--window", help="Tokens per window.")]
Penalty = Annotated[float, typer.Option("--penalty", help="Ridge penalty, relative to the inputs' mean square.")]
Seed = Annotated[int, typer.Option("--seed", help="Orders the text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


def fit(
    base: Base,
    data: Data,
    out: Out,
    layers: Layers = None,
    auxiliary: Auxiliary = None,
    prune: Prune = None,
    sources: Sources = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of text to read.")] = 200_000,
    window: Window = 512,
    penalty: Penalty = 1e-4,
    seed: Seed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make a bundle in closed form.

    Ridge regression from what the auxiliary reads to the base's keys and values.
    """
    from ..train.fit import FitOptions, fit_bundle

    options = FitOptions(layers, auxiliary, prune, sources, tokens, window, penalty, seed)
    with clean_stdout(json), progress_bar("tokens read") as progress:
        result = fit_bundle(base, data, out, options, force=force, progress=progress)
    if json:
        print_json({"out": str(out), **result})
    else:
        say(f"Wrote {out}: {result['tokens']:,} tokens read in {result['seconds']} s.")


def train(
    base: Base,
    data: Data,
    out: Out,
    layers: Layers = None,
    auxiliary: Auxiliary = None,
    prune: Prune = None,
    sources: Sources = 1,
    start: Annotated[str | None, typer.Option(help="Bundle to go on from, instead of a ridge fit.")] = None,
    fit_tokens: Annotated[int, typer.Option(help="Tokens that the ridge fit reads first.")] = 20_000,
    minutes: Annotated[float, typer.Option(min=0.1, help="Training time after the fit.")] = 20.0,
    learning_rate: Annotated[float, typer.Option(help="AdamW's peak rate.")] = 1e-3,
    window: Window = 512,
    seed: Seed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train a bundle's maps.

    From a ridge fit on, by gradient: the base must go on from the predicted cache as from the true one. The best
    state so far is in --out at any time.
    """
    from ..files import require_free
    from ..train.fit import FitOptions, fit_bundle
    from ..train.loop import TrainOptions
    from ..train.train import train_bundle

    options = TrainOptions(minutes=minutes, learning_rate=learning_rate, seed=seed)
    require_free(out, force)  # before the fit; once more before training, against what that reads
    with clean_stdout(json), tempfile.TemporaryDirectory(prefix="kvp-") as scratch:
        if start is None:
            start = str(Path(scratch) / "fit")
            fitting = FitOptions(layers, auxiliary, prune, sources, fit_tokens, window, seed=seed)
            with progress_bar("ridge fit, tokens") as fit_progress:
                fit_bundle(base, data, Path(start), fitting, progress=fit_progress)
        with progress_bar("training, percent") as progress:
            result = train_bundle(
                start,
                data,
                out,
                options,
                window=window,
                force=force,
                progress=lambda share: progress(round(100 * share), 100),
            )
    if json:
        print_json({"out": str(out), **result})
    else:
        say(f"Wrote {out}: context recovery {result['recovery']:.2f}, separation {result['separation']:.2f}.")
