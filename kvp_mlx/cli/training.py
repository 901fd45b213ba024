"""``kvp fit``."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Json, errors, print_json, progress_bar


def fit(
    base: Annotated[str, typer.Argument(help="mlx-lm model: directory, Hub id or the default's alias.")],
    data: Annotated[list[Path], typer.Option(help="Text file (.txt, .jsonl, .gz) or folder; repeatable.")],
    out: Annotated[Path, typer.Option(help="Bundle directory to write.")],
    layers: Annotated[int | None, typer.Option(help="Prefix: the base's own first K layers read the prompt.")] = None,
    auxiliary: Annotated[Path | None, typer.Option(help="A smaller mlx-lm model of the same tokeniser.")] = None,
    prune: Annotated[float | None, typer.Option(help="Keep 0.75, 0.5 or 0.25 of the base's layers.")] = None,
    sources: Annotated[int, typer.Option(help="Auxiliary layers that each base layer reads.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of text to read.")] = 200_000,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    penalty: Annotated[float, typer.Option(help="Ridge penalty, relative to the inputs' mean square.")] = 1e-4,
    seed: Annotated[int, typer.Option(help="Shuffles the text.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    json: Json = False,
) -> None:
    """Make a bundle in closed form.

    Ridge regression from what the auxiliary reads to the base's keys and values.
    """
    from ..train.fit import FitOptions, fit_bundle

    options = FitOptions(layers, auxiliary, prune, sources, tokens, window, penalty, seed)
    with progress_bar("tokens read") as progress:
        result = fit_bundle(base, data, out, options, force=force, progress=progress)
    if json:
        print_json({"out": str(out), **result})
    else:
        errors.print(f"Wrote {out}: {result['tokens']:,} tokens read in {result['seconds']} s.")
