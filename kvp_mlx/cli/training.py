"""``kvp fit`` and ``kvp train``."""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..device.machine import matmul_flops_per_s
from ..train import SAMPLE
from ..train.fit import FitOptions, fit_bundle
from ..train.loop import TrainOptions
from ..train.objectives import weights_of
from ..train.run import require_unstarted, train_bundle
from .options import DataSeed, Force, Json, OutDirectory, TextOrSample
from .output import clean_stdout, errors, print_json, progress_bar, say

Base = Annotated[str, typer.Argument(help="mlx-lm model: directory, Hub id or the default's alias.")]
Layers = Annotated[int | None, typer.Option("--layers", help="Prefix: the base's own first K layers read the prompt.")]
Auxiliary = Annotated[Path | None, typer.Option("--auxiliary", help="A smaller mlx-lm model of the same tokeniser.")]
Prune = Annotated[float | None, typer.Option("--prune", help="Keep 0.75, 0.5 or 0.25 of the base's layers.")]
Sources = Annotated[int, typer.Option("--sources", help="Auxiliary layers that each base layer reads.")]
Window = Annotated[int, typer.Option("--window", help="Tokens per window.")]
Penalty = Annotated[float, typer.Option("--penalty", help="Ridge penalty, relative to the inputs' mean square.")]


def fit(
    base: Base,
    out: OutDirectory,
    data: TextOrSample = None,
    layers: Layers = None,
    auxiliary: Auxiliary = None,
    prune: Prune = None,
    sources: Sources = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of text to read.")] = 200_000,
    window: Window = 512,
    penalty: Penalty = 1e-4,
    seed: DataSeed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make a bundle in closed form.

    Ridge regression from what the auxiliary reads to the base's keys and values.
    """
    options = FitOptions(layers, auxiliary, prune, sources, tokens, window, penalty, seed)
    with clean_stdout(json), progress_bar("tokens read") as progress:
        result = fit_bundle(base, data or [str(SAMPLE)], out, options, force=force, progress=progress)
    if json:
        print_json({"out": str(out), **result})
    else:
        say(f"Wrote {out}: {result['tokens']:,} tokens read in {result['seconds']} s.")


class Objective(StrEnum):
    """The two sets of weights that have a name."""

    continuation = "continuation"
    paper = "paper"


Weight = float | None


def train(
    base: Base,
    out: OutDirectory,
    data: TextOrSample = None,
    layers: Layers = None,
    auxiliary: Auxiliary = None,
    prune: Prune = None,
    sources: Sources = 1,
    start: Annotated[str | None, typer.Option(help="Bundle to go on from, instead of a ridge fit.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the killed run that was writing --out.")] = False,
    fit_tokens: Annotated[int, typer.Option(help="Tokens that the ridge fit reads first.")] = 20_000,
    minutes: Annotated[float | None, typer.Option(help="Training time after the fit.  [default: 20]")] = None,
    tokens: Annotated[int | None, typer.Option(help="Budget in tokens instead; repeatable.")] = None,
    objective: Annotated[Objective, typer.Option(help="Default weights of the losses.")] = Objective.continuation,
    continuation_weight: Annotated[Weight, typer.Option(help="KL to the base going on from its true cache.")] = None,
    residual_weight: Annotated[Weight, typer.Option(help="Error of the residual stream, beside the former.")] = None,
    base_weight: Annotated[Weight, typer.Option(help="Cross-entropy of the base on predicted entries alone.")] = None,
    auxiliary_weight: Annotated[Weight, typer.Option(help="Cross-entropy of the auxiliary.")] = None,
    consistency_weight: Annotated[Weight, typer.Option(help="L1 between predicted and true entries.")] = None,
    z_weight: Annotated[Weight, typer.Option(help="z-loss on both cross-entropies.")] = None,
    learning_rate: Annotated[float, typer.Option(help="AdamW's peak rate.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's, on matrices.")] = 0.01,
    window: Window = 512,
    pack: Annotated[bool, typer.Option("--pack/--no-pack", help="Fill windows with several pieces of text.")] = True,
    lora_rank: Annotated[int | None, typer.Option(help="The auxiliary reads with low-rank updates.")] = None,
    train_auxiliary: Annotated[bool, typer.Option("--train-auxiliary", help="Train all of it (no prefix).")] = False,
    checkpoint: Annotated[bool, typer.Option("--checkpoint", help="Save memory, at a third more work.")] = False,
    batch_size: Annotated[int, typer.Option(help="Windows run together.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Batches per optimiser step.")] = 1,
    splits: Annotated[int, typer.Option(help="Split points per batch.")] = 3,
    right: Annotated[int, typer.Option(help="Tokens after a split; every other split has a quarter.")] = 128,
    validate_every: Annotated[float, typer.Option(help="Minutes between validations.")] = 10.0,
    seed: DataSeed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train a bundle.

    From a ridge fit on, by gradient: the base must go on from the predicted cache as from the true one. The best
    state so far is in --out at any time; the log and what --resume needs are in OUT.training.
    """
    options = TrainOptions(
        minutes=20.0 if minutes is None and tokens is None else minutes,
        tokens=tokens,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        weights=weights_of(
            objective.value,
            continuation=continuation_weight,
            residual=residual_weight,
            base=base_weight,
            auxiliary=auxiliary_weight,
            consistency=consistency_weight,
            z=z_weight,
        ),
        window=window,
        packed=pack,
        lora_rank=lora_rank,
        train_auxiliary=train_auxiliary,
        checkpoint=checkpoint,
        batch_size=batch_size,
        accumulate=accumulate,
        splits=splits,
        right=right,
        validate_every=validate_every,
        seed=seed,
    )
    texts = data or [str(SAMPLE)]
    if not resume:
        require_unstarted(out, force)  # before the fit takes its time
    with clean_stdout(json), tempfile.TemporaryDirectory(prefix="kvp-") as scratch:
        if start is None and not resume:
            start = str(Path(scratch) / "fit")
            fitting = FitOptions(layers, auxiliary, prune, sources, fit_tokens, window, seed=seed)
            with progress_bar("ridge fit, tokens") as fit_progress:
                fit_bundle(base, texts, Path(start), fitting, progress=fit_progress)
        with training_bar() as progress:
            result = train_bundle(start or "", texts, out, options, resume=resume, force=force, progress=progress)
        if mx.distributed.init().rank() > 0:
            return  # the first process reports
        floor = mx.distributed.init().size() * matmul_flops_per_s(mx.float32) / result["flops_per_token"]
    if json:
        print_json({"out": str(out), **result, "floor_tokens_per_second": round(floor, 1)})
    else:
        say(f"Wrote {out}: context recovery {result['recovery']:.2f}, separation {result['separation']:.2f}.")
        if "tokens_per_second" in result:
            say(f"{result['tokens_per_second']:.0f} tokens/s; the matmuls alone would allow {floor:.0f}.")


@contextlib.contextmanager
def training_bar() -> Iterator[Callable[[float, dict[str, Any]], None]]:
    """Show share of the budget, loss, tokens per second and time left on stderr, on a terminal only."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("training", total=1.0, state="")
        yield lambda share, entry: bar.update(
            task,
            completed=share,
            state=f"loss {entry['loss']:.3f}, {entry['tokens']:,} tokens, {entry['tokens_per_second']:.0f}/s",
        )
