"""``kvp fit`` and ``kvp train``."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import typer
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..bundle.config import MAX_PRECEDING, MAX_RANK, BundleConfig, read_config
from ..bundle.loading import bundle_directory
from ..bundle.named import find_model
from ..device.hosts import launched_rank
from ..device.machine import matmul_flops_per_s
from ..errors import InputError
from ..files.directories import scratch_directory
from ..models.safetensors import fingerprint
from ..train import SAMPLE
from ..train.directory import starting_bundle
from ..train.fit import FitOptions, fit_bundle, fit_bundles
from ..train.loop import TrainOptions
from ..train.objectives import weights_of
from ..train.run import Phase, check_kinds, train_bundle
from .options import DataSeed, Force, Json, OutDirectory, TextOrSample, parse_numbers
from .output import clean_stdout, errors, plural, print_json, progress_bar, progress_lines, say

MOST = 2**40
"""Above any number that makes sense, below what a machine word holds."""

Base = Annotated[str, typer.Argument(help="mlx-lm model: directory, Hub id or the default's alias.")]
Layers = Annotated[
    int | None, typer.Option("--layers", min=1, help="Prefix: the base's own first K layers read the prompt.")
]
Prefixes = Annotated[
    str | None,
    typer.Option("--layers", help="As for train; several, as 8,12, in one pass: bundles OUT/8 and OUT/12."),
]
Auxiliary = Annotated[
    str | None,
    typer.Option("--auxiliary", help="A smaller mlx-lm model of the same tokeniser; a named base is not copied."),
]
Prune = Annotated[float | None, typer.Option("--prune", help="Keep 0.75, 0.5 or 0.25 of the base's layers.")]
Sources = Annotated[int, typer.Option("--sources", min=1, help="Auxiliary layers that each base layer reads.")]
Preceding = Annotated[
    int | None,
    typer.Option(
        "--preceding",
        min=0,
        max=MAX_PRECEDING,
        help="Tokens before each one that the maps read, too.  [default: 1 for a prefix, else 0]",
    ),
]
Window = Annotated[int, typer.Option("--window", min=1, max=MOST, help="Tokens per window.")]
Penalty = Annotated[float, typer.Option("--penalty", help="Ridge penalty, relative to the inputs' mean square.")]


def fit(
    base: Base,
    out: OutDirectory,
    data: TextOrSample = None,
    layers: Prefixes = None,
    auxiliary: Auxiliary = None,
    prune: Prune = None,
    sources: Sources = 1,
    preceding: Preceding = None,
    tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of text to read.")] = 200_000,
    window: Window = 512,
    penalty: Penalty = 1e-4,
    seed: DataSeed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make a bundle in closed form.

    Ridge regression from what the auxiliary reads to the base's keys and values.
    """
    prefixes = [None] if layers is None else sorted(set(parse_numbers(layers, "--layers")))
    common: dict[str, Any] = {
        "preceding": preceding,
        "tokens": tokens,
        "window": window,
        "penalty": penalty,
        "seed": seed,
    }
    bar = progress_bar("fitting: the base is loaded, then tokens are read")
    with clean_stdout(json), scratch_directory() as scratch, bar as progress:
        place = scratch / "out" if launched_rank() else out  # the first host's is kept
        wanted = {
            place / str(prefix) if len(prefixes) > 1 else place: FitOptions(prefix, auxiliary, prune, sources, **common)
            for prefix in prefixes
        }
        result = fit_bundles(base, data or [str(SAMPLE)], wanted, force=force, progress=progress)
    if json:
        print_json({"out": str(out), **result})
    else:
        say(f"Wrote {' and '.join(map(str, wanted))}: {result['tokens']:,} tokens read in {result['seconds']} s.")


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
    preceding: Preceding = None,
    start: Annotated[str | None, typer.Option(help="Bundle to go on from, instead of a ridge fit.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the killed run that was writing --out.")] = False,
    fit_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens that the ridge fit reads first.")] = 20_000,
    minutes: Annotated[
        float | None, typer.Option(help="Training time after the fit and the first validation.  [default: 20]")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Budget in tokens instead; the same seed then gives the same.")
    ] = None,
    objective: Annotated[Objective, typer.Option(help="Default weights of the losses.")] = Objective.continuation,
    continuation_weight: Annotated[Weight, typer.Option(help="KL to the base going on from its true cache.")] = None,
    residual_weight: Annotated[Weight, typer.Option(help="Error of the residual stream, beside the former.")] = None,
    base_weight: Annotated[Weight, typer.Option(help="Cross-entropy of the base on predicted entries alone.")] = None,
    auxiliary_weight: Annotated[Weight, typer.Option(help="Cross-entropy of the auxiliary.")] = None,
    consistency_weight: Annotated[Weight, typer.Option(help="L1 between predicted and true entries.")] = None,
    z_weight: Annotated[Weight, typer.Option(help="z-loss on both cross-entropies.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="AdamW's peak rate.  [default: 0.0036 of the maps' root mean square]")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="AdamW's, on matrices.")] = 0.01,
    window: Window = 512,
    pack: Annotated[bool, typer.Option("--pack/--no-pack", help="Fill windows with several pieces of text.")] = True,
    lora_rank: Annotated[
        int | None, typer.Option(min=1, max=MAX_RANK, help="The auxiliary reads with low-rank updates.")
    ] = None,
    train_auxiliary: Annotated[bool, typer.Option("--train-auxiliary", help="Train all of it (no prefix).")] = False,
    checkpoint: Annotated[bool, typer.Option("--checkpoint", help="Save memory, at a third more work.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST, help="Windows run together.")] = 1,
    accumulate: Annotated[int, typer.Option(min=1, max=MOST, help="Batches per optimiser step.")] = 1,
    splits: Annotated[int, typer.Option(min=1, max=MOST, help="Split points per batch.")] = 3,
    right: Annotated[
        int, typer.Option(min=1, max=MOST, help="Tokens after a split; every other split has a quarter.")
    ] = 128,
    recompute: Annotated[
        float, typer.Option(help="Share of a prompt's tokens that will be recomputed: they are exact in training, too.")
    ] = 0.0,
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
        recompute=recompute,
        validate_every=validate_every,
        seed=seed,
    )
    texts = data or [str(SAMPLE)]
    fitting = (
        None
        if start is not None or resume
        else FitOptions(layers, auxiliary, prune, sources, preceding, fit_tokens, window, seed=seed)
    )
    with clean_stdout(json), scratch_directory() as scratch, display() as (phase, progress):
        begun = starting_bundle(out) if resume else None if start is None else bundle_directory(start)
        if begun is not None and (begun / "kvp.json").is_file():
            check_goes_on(read_config(begun), base, layers, auxiliary, prune, preceding)

        def beginning() -> str:
            if fitting is None:
                return start or ""
            check_kinds(find_model(base), options, fitting.layers or 0)
            with phase("closed form, tokens") as told:
                fit_bundle(base, texts, scratch / "fit", fitting, progress=told)
            return str(scratch / "fit")

        how: dict[str, Any] = {"resume": resume, "force": force, "progress": progress, "phase": phase}
        result = train_bundle(beginning, texts, out, options, **how)
        if mx.distributed.init().rank() > 0:
            return  # the first process reports
        floor = mx.distributed.init().size() * matmul_flops_per_s(mx.float32) / result["flops_per_token"]
    if json:
        print_json({"out": str(out), **result, "floor_tokens_per_second": round(floor, 1)})
    else:
        say_result(out, result, floor, "the start's" if fitting is None else "the closed form's")


def check_goes_on(
    config: BundleConfig,
    base: str,
    layers: int | None,
    auxiliary: str | None,
    prune: float | None,
    preceding: int | None,
) -> None:
    """Refuse a base, an auxiliary or inputs other than those of the bundle that training is to go on from.

    Raises:
        InputError: it has another one.
    """
    own = config.auxiliary
    given = {"--layers": layers, "--auxiliary": auxiliary, "--prune": prune, "--preceding": preceding}
    fits = {"--layers": own.kind == "prefix" and layers == own.layers, "--auxiliary": own.kind == "model"}
    fits |= {"--prune": own.kind == "pruned", "--preceding": preceding == config.predictor.preceding}
    if wrong := [name for name, value in given.items() if value is not None and not fits[name]]:
        raise InputError(
            f"training goes on from a {own.kind} of {plural(own.layers, 'layer')} that reads "
            f"{plural(config.predictor.preceding, 'token')} before each, to which {wrong[0]} "
            f"{given[wrong[0]]} does not fit; leave it out, or begin anew without --start and --resume."
        )
    if fingerprint(find_model(base)) != config.base.fingerprint:
        raise InputError(f"training goes on from a bundle that was made for another base than {base}; name its own.")


def say_result(out: Path, result: dict[str, Any], floor: float, start: str) -> None:
    """Say what was trained and what is kept of it."""
    has_written = result["steps_now"] or result["rewritten"]
    verb = "Wrote" if has_written else "Nothing is left to train of"
    strays = f", {result['divergence']:.3f} nats a token from full prefill" if "divergence" in result else ""
    say(f"{verb} {out}: context recovery {result['recovery']:.2f}, separation {result['separation']:.2f}{strays}.")
    if result["rewritten"]:
        say("The bundle of this run was gone; what is written is the best since it was resumed.")
    steps, tokens = plural(result["steps_taken"], "step"), plural(result["tokens_taken"], "token")
    best = (
        f"the best was after step {result['step']}" if result["step"] else f"none was better, so {start} maps are kept"
    )
    say(f"{steps} taken, {tokens} in {result['minutes_taken']:.1f} min; {best}.")
    if "tokens_per_second" in result:
        say(f"{result['tokens_per_second']:.0f} tokens/s; the matmuls alone would allow {floor:.0f}.")


Told = Callable[[float, dict[str, Any]], None]


@contextlib.contextmanager
def display() -> Iterator[tuple[Phase, Told]]:
    """Show phases and training on stderr: a bar for each on a terminal, else lines.

    Yields what opens a phase, and what is told after each step: the share of the budget, and its log entry.
    """
    if not sys.stderr.isatty():
        with contextlib.ExitStack() as stack:
            yield progress_bar, training_lines(stack)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        training: list[TaskID] = []

        @contextlib.contextmanager
        def phase(label: str) -> Iterator[Callable[[int, int], None]]:
            task = bar.add_task(label, total=None, state="")
            try:
                yield lambda done, total: bar.update(task, completed=done, total=total)
            finally:
                bar.remove_task(task)

        def told(share: float, entry: dict[str, Any]) -> None:
            if not training:
                training.append(bar.add_task("training", total=1.0, state=""))
            bar.update(training[0], completed=share, state=_state(entry))

        yield phase, told


def training_lines(stack: contextlib.ExitStack) -> Told:
    """Return what says now and then how far training is, from the first step on."""
    lines: list[Callable[..., None]] = []

    def told(share: float, entry: dict[str, Any]) -> None:
        if not lines:
            lines.append(stack.enter_context(progress_lines("training")))
        lines[0](round(1000 * share), 1000, f"{share:.0%} of the budget, {_state(entry)}")

    return told


def _state(entry: dict[str, Any]) -> str:
    return f"loss {entry['loss']:.3f}, {entry['tokens']:,} tokens, {entry['tokens_per_second']:.0f}/s"
