"""``kvp bench``."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..arms.kinds import parse_arms
from ..bench.calibrate import calibrate_auto
from ..bench.capacity import require_memory
from ..bench.compare import compare_results
from ..bench.decode import measure_decode
from ..bench.drafts import measure_drafts
from ..bench.flops import flops_table
from ..bench.hosts import Cluster, hosts_table
from ..bench.memory import measure_memory
from ..bench.plot import draw_ttft, read_drawable
from ..bench.precision import bundle_for_bench, preset_for_bench
from ..bench.report import (
    CALIBRATION,
    COMPARE,
    DECODE,
    DRAFTS,
    FLOPS,
    HOSTS,
    MEMORY,
    SERVE,
    TTFT,
    table_of,
    write_result,
)
from ..bench.serve import ARMS as SERVE_ARMS
from ..bench.serve import ServeSweep, check_serve_sweep, measure_serving, write_subject
from ..bench.ttft import Sweep, measure_ttft
from ..bundle.loading import KVPModel, load_any
from ..device.hosts import is_launched, launched_rank
from ..device.streams import default_step_size
from ..engine.speculative import DRAFT_TOKENS, Drafting
from ..errors import InputError, KVPError
from ..files import check_writable, remove_unfinished, scratch_directory
from .device import DeviceOption, use_device
from .options import (
    DEFAULT_EXACT_TAIL,
    DEFAULT_MODEL,
    DEMO_DOCUMENT,
    AllowMismatch,
    AnyModel,
    Arms,
    DraftOption,
    DraftTokens,
    Dtype,
    DtypeOption,
    ExactTail,
    Json,
    Model,
    OtherBase,
    OutFile,
    Plot,
    PromptLengths,
    QBits,
    Rounds,
    StepSize,
    open_model,
    parse_numbers,
)
from .output import clean_stdout, print_json, progress_bar, progress_lines, say, say_written, show_table
from .screen import leaving_on_ctrl_c

RANDOM_PROMPT_TOKENS = 10_000

app = typer.Typer(help="Measure time to first token, decoding speed and memory.", rich_markup_mode=None)

Preset = Annotated[str | None, typer.Option("--preset", help="A published OpenELM pair, random weights and prompts.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Prompts at once.")]
Result = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is measured: a bundle, or a published pair, and in which precision."""

    model: str
    preset: str | None
    dtype: Dtype | None
    q_bits: int | None
    base: str | None
    allow_base_mismatch: bool

    @property
    def name(self) -> str:
        """How the user called it."""
        return self.preset or self.model


@app.callback()
def group() -> None:
    """Measure time to first token, decoding speed and memory."""


@app.command()
def ttft(
    model: Model = DEFAULT_MODEL,
    preset: Preset = None,
    prompt_tokens: PromptLengths = "128,512,1024",
    batch_size: BatchSize = 1,
    arms: Arms = "mlx-lm,full,kvp",
    rounds: Rounds = 5,
    prefill_step_size: StepSize = None,
    dtype: DtypeOption = None,
    q_bits: QBits = None,
    device: DeviceOption = None,
    out: OutFile = None,
    plot: Plot = None,
    base: OtherBase = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Time the first token by several arms, interleaved in one process.

    Ctrl-C or SIGTERM keeps the prompt lengths that are finished.
    """
    use_device(device)
    sweep = make_sweep(prompt_tokens, batch_size, arms, rounds, prefill_step_size)
    subject = Subject(model, preset, dtype, q_bits, base, allow_base_mismatch)
    if launched_rank():
        out = plot = None  # the first host writes
    check_writable(out, plot)
    require_default_model(sweep, subject)
    with clean_stdout(json):
        loaded, text_ids = load_subject(subject, sweep)
    begun: list[Result] = []

    def finish() -> None:
        if begun[0]["rows"]:
            report(begun[0], TTFT, f"Time to first token, median of {rounds}", out, json)
            if begun[0]["hosts"] > 1 and not json:
                sums = (f"{row['arm']} {row['summed_bytes_per_token'] / 1e3:,.1f} KB" for row in begun[0]["rows"])
                say(f"{begun[0]['hosts']} hosts, which add up for each prompt token: {', '.join(sums)}.", style="")
            if plot is not None:
                draw_ttft(begun, plot)
                say_written(plot)

    def keep() -> None:  # in the middle of a chunk that takes long
        remove_unfinished()
        begun[0]["interrupted"] = True
        finish()

    with clean_stdout(json), progress_bar("measuring, rounds") as progress, leaving_on_ctrl_c(keep):
        result = measure_ttft(loaded, subject.name, text_ids, sweep, progress=progress, begun=begun.append)
    finish()
    if result["interrupted"]:
        raise KeyboardInterrupt


@app.command()
def decode(
    model: Model = DEFAULT_MODEL,
    preset: Preset = None,
    prompt_tokens: PromptLengths = "512",
    arms: Arms = "full,kvp",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to time.")] = 64,
    rounds: Rounds = 5,
    prefill_step_size: StepSize = None,
    dtype: DtypeOption = None,
    q_bits: QBits = None,
    device: DeviceOption = None,
    draft: DraftOption = "none",
    draft_tokens: DraftTokens = DRAFT_TOKENS,
    out: OutFile = None,
    base: OtherBase = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Time decoding after a predicted and after a true cache.

    With --draft, replies to three kinds of task (code, prose, quotation), each after a text of --prompt-tokens, with
    the auxiliary's drafts and without.
    """
    use_device(device)
    if draft != "none" and preset is not None:
        raise InputError("random weights say nothing of drafts; leave out --preset or --draft.")
    sweep = make_sweep(prompt_tokens, 1, arms, rounds, prefill_step_size)
    subject = Subject(model, preset, dtype, q_bits, base, allow_base_mismatch)
    check_writable(out)
    with clean_stdout(json):
        loaded, text_ids = load_subject(subject, sweep)
    with clean_stdout(json), progress_bar("measuring, rounds") as progress:
        how: dict[str, Any] = {"new_tokens": new_tokens, "progress": progress}
        if draft == "none":
            result = measure_decode(loaded, subject.name, text_ids, sweep, **how)
        else:
            result = measure_drafts(loaded, subject.name, text_ids, sweep, Drafting(draft, draft_tokens), **how)
    columns = DECODE if draft == "none" else DRAFTS
    report(result, columns, f"Decoding {new_tokens} tokens, median of {rounds}", out, json)


@app.command()
def memory(
    model: Model = DEFAULT_MODEL,
    preset: Preset = None,
    prompt_tokens: PromptLengths = "128,512,1024",
    batch_size: BatchSize = 1,
    arms: Arms = "full,kvp",
    prefill_step_size: StepSize = None,
    dtype: DtypeOption = None,
    q_bits: QBits = None,
    device: DeviceOption = None,
    out: OutFile = None,
    base: OtherBase = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Measure each arm's peak memory up to the first token, beside what it is made of."""
    use_device(device)
    sweep = make_sweep(prompt_tokens, batch_size, arms, 1, prefill_step_size)
    subject = Subject(model, preset, dtype, q_bits, base, allow_base_mismatch)
    check_writable(out)
    with clean_stdout(json):
        loaded, text_ids = load_subject(subject, sweep)
    with clean_stdout(json), progress_bar("measuring, rounds") as progress:
        result = measure_memory(loaded, subject.name, text_ids, sweep, progress=progress)
    report(result, MEMORY, "Peak memory, MiB", out, json)


@app.command()
def serve(
    model: AnyModel = DEFAULT_MODEL,
    prompt_tokens: PromptLengths = "128,1024",
    clients: Annotated[str, typer.Option("--clients", help="Who ask at once, comma-separated.")] = "1,4,8",
    arms: Annotated[str, typer.Option("--arms", help=f"Of {', '.join(SERVE_ARMS)}.")] = ",".join(SERVE_ARMS),
    quality: Annotated[
        Literal["fast", "balanced", "exact"], typer.Option("--quality", help="Of the arm kvp.")
    ] = "balanced",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answers that are counted.")] = 64,
    rounds: Rounds = 5,
    out: OutFile = None,
    json: Json = False,
) -> None:
    """Time 'kvp serve' and 'mlx_lm.server' through HTTP, on the same weights.

    First tokens at each prompt length, then tokens per second of several clients at the shortest one.
    """
    counts = parse_numbers(clients, "--clients")
    if min(counts) < 1:
        raise InputError(f"--clients takes numbers from 1 up, not {min(counts)}.")
    sweep = ServeSweep(parse_lengths(prompt_tokens), counts, arms.split(","), rounds, new_tokens, quality)
    check_writable(out)
    with scratch_directory() as place:
        with clean_stdout(json):
            loaded = open_model(model, load_any)
            check_serve_sweep(sweep, loaded)
            subject = write_subject(loaded, model, demo_ids(loaded), place)
            del loaded  # the servers have their own
        with clean_stdout(json), progress_bar("measuring, rounds") as progress:
            result = measure_serving(subject, sweep, progress=progress)
    report(result, SERVE, f"Through HTTP, median of {rounds}", out, json)


@app.command()
def flops(
    preset: Annotated[list[str] | None, typer.Option(help="Repeatable; default: all 11.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Prompt length of the true ratio.")] = 1024,
    batch_size: BatchSize = 1,
    base: Annotated[
        Path | None, typer.Option("--base", help="In place of the pairs: a config.json or a model's directory.")
    ] = None,
    hosts: Annotated[int | None, typer.Option("--hosts", min=2, help="Spread --base over so many.")] = None,
    link: Annotated[float | None, typer.Option("--link", help="Between two hosts, gigabits per second.")] = None,
    latency: Annotated[float, typer.Option("--latency", help="Of each all-reduce, microseconds.")] = 50.0,
    tflops: Annotated[float, typer.Option("--tflops", help="That each host computes in a prefill.")] = 15.0,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Of the prefix that predicts; default: half.")
    ] = None,
    out: OutFile = None,
    json: Json = False,
) -> None:
    """Print the arithmetic of the published pairs beside the paper's ratios; with --hosts, of a base on several hosts.

    The paper counts parameters, embeddings included (``parameters``); ``true`` is the ratio of the FLOPs that are
    computed, attention and predictor included, embeddings and skipped layers not.
    """
    check_writable(out)
    if (base, hosts, link) != (None, None, None):
        if base is None or hosts is None or link is None or preset:
            raise InputError("--base, --hosts and --link go together, without --preset; give all three.")
        result = hosts_table(base, prompt_tokens, batch_size, layers, Cluster(hosts, link, latency, tflops))
        report_hosts(result, out, json)
        return
    result = flops_table(preset or [], prompt_tokens, batch_size)
    if out is not None:
        write_result(out, result, FLOPS)
        say_written(out)
    if json:
        print_json(result)
    else:
        show_table(
            *table_of(f"Work up to the first token, {batch_size} x {prompt_tokens} tokens", FLOPS, result["rows"])
        )


def report_hosts(result: Result, out: Path | None, json: bool) -> None:
    """Write and print the arithmetic of several hosts, with what it assumes."""
    if out is not None:
        write_result(out, result, HOSTS)
        say_written(out)
    if json:
        print_json(result)
        return
    told = result["assumptions"]
    title = f"{result['base']}, {result['batch_size']} x {result['prompt_tokens']} tokens"
    show_table(*table_of(title, HOSTS, result["rows"]))
    say(
        f"Assumed: {told['tflops']:g} TFLOP/s a host, links of {told['link_gbps']:g} Gbit/s each way in a ring, "
        f"{told['latency_us']:g} us an all-reduce, {told['sums_per_layer']} of these a layer and chunk of "
        f"{told['chunk_tokens']} tokens, {told['dtype_bytes']} bytes a value, nothing overlapped; kvp: a prefix of "
        f"{result['prefix_layers']} of {result['base_layers']} layers, nothing recomputed.",
        style="",
    )


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A result of 'kvp bench ttft --out'.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    fail_above: Annotated[
        float | None, typer.Option(min=0.0, help="Exit 1 if any row is this many times slower, and not by chance.")
    ] = None,
    json: Json = False,
) -> None:
    """Compare two results row by row: ratio of medians, with a bootstrap interval."""
    result = compare_results(before, after, fail_above)
    if json:
        print_json(result)
    else:
        show_table(*table_of(f"{after} over {before}", COMPARE, result["rows"]))
    if slower := [row for row in result["rows"] if row["failed"]]:
        worst = slower[0]
        raise KVPError(
            f"{len(slower)} of {len(result['rows'])} rows are more than {fail_above:g} times as slow, the worst "
            f"{worst['arm']} at {worst['prompt_tokens']} tokens ({worst['ratio']:.2f})."
        )


@app.command()
def calibrate(
    model: Model = DEFAULT_MODEL,
    exact_tail: ExactTail = None,
    rounds: Rounds = 5,
    device: DeviceOption = None,
    base: OtherBase = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Find the prompt length from which prediction pays here, and keep it for --prefill auto."""
    use_device(device)
    tail = DEFAULT_EXACT_TAIL if exact_tail is None else exact_tail
    with clean_stdout(json):
        loaded = open_model(model, base_name=base, allow_base_mismatch=allow_base_mismatch)
    with clean_stdout(json), progress_bar("measuring, rounds") as progress:
        result = calibrate_auto(loaded, model, demo_ids(loaded), exact_tail=tail, rounds=rounds, progress=progress)
    if json:
        print_json(result)
        return
    show_table(*table_of(f"Time to first token, {model}, exact tail {tail}", CALIBRATION, result["rows"]))
    pays = f"from {result['pays_from']} tokens on" if result["pays_from"] else "at none of these lengths"
    say(f"prediction pays {pays}; kept in {result['stored']}", style="")


@app.command()
def plot(
    results: Annotated[list[Path], typer.Argument(help="Results of 'kvp bench ttft --out FILE.json'.")],
    out: Annotated[Path, typer.Option(help="Picture to write (.png, .svg, .pdf).")] = Path("bench.png"),
) -> None:
    """Draw saved results: the first one's times and parts, and what all of them realise."""
    check_writable(out)
    draw_ttft([read_drawable(path) for path in results], out)
    say_written(out)


def make_sweep(prompt_tokens: str, batch_size: int, arms: str, rounds: int, step_size: int | None) -> Sweep:
    """Return what the options of a measurement ask for.

    Raises:
        InputError: prompt lengths or arms that are none.
    """
    lengths = parse_lengths(prompt_tokens)
    return Sweep(lengths, batch_size, parse_arms(arms), rounds, step_size or default_step_size())


def parse_lengths(text: str) -> list[int]:
    """Parse prompt lengths such as ``128,512``.

    Raises:
        InputError: anything but whole numbers from 2 up and commas.
    """
    lengths = parse_numbers(text, "--prompt-tokens")
    if min(lengths) < 2:
        raise InputError(f"prompts have 2 tokens or more, not {min(lengths)}; change --prompt-tokens.")
    return lengths


def require_default_model(sweep: Sweep, subject: Subject) -> None:
    """Refuse to time an engine on the default model's file beside other models.

    Raises:
        InputError: that is asked for.
    """
    foreign = [arm.name for arm in sweep.arms if arm.kind.is_foreign]
    if foreign and subject.name != DEFAULT_MODEL:
        raise InputError(
            f"the arm {foreign[0]} reads the default model's file; leave out that arm, or take {DEFAULT_MODEL}."
        )


def load_subject(subject: Subject, sweep: Sweep) -> tuple[KVPModel, list[int]]:
    """Load or build what is measured, and the text of the prompts, unless the run would not fit into memory.

    Raises:
        InputError: too little memory, or ``--q-bits`` other than 4 or 8.
    """
    if subject.q_bits not in (None, 4, 8):
        raise InputError(f"--q-bits is 4 or 8, not {subject.q_bits}.")
    size = {"prompt_tokens": max(sweep.prompt_tokens), "batch": sweep.batch_size, "step_size": sweep.step_size}
    dtype, q_bits = None if subject.dtype is None else subject.dtype.value, subject.q_bits
    if subject.preset is not None:
        if is_launched():
            raise InputError("a published pair runs on one host; leave out --preset.")
        with progress_lines(f"building {subject.preset}"):
            loaded = preset_for_bench(subject.preset, dtype, q_bits, **size)
        return loaded, random.Random(0).choices(range(loaded.base.args.vocab_size), k=RANDOM_PROMPT_TOKENS)
    how = {"base_name": subject.base, "allow_base_mismatch": subject.allow_base_mismatch}
    loaded = open_model(subject.model, partial(bundle_for_bench, dtype=dtype, q_bits=q_bits), **how)
    require_memory(loaded, **size, loaded=True)
    return loaded, demo_ids(loaded)


def demo_ids(loaded: KVPModel) -> list[int]:
    """Return the shipped document as token ids."""
    return loaded.text_tokenizer.encode(DEMO_DOCUMENT.read_text(encoding="utf-8"))


def report(result: Result, columns: dict[str, Callable[[Any], str]], title: str, out: Path | None, json: bool) -> None:
    """Write the result to ``out``, and print it as JSON or as a table."""
    if out is not None:
        write_result(out, result, columns)
        say_written(out)
    if json:
        print_json(result)
        return
    machine = result["machine"]
    where = f"{machine['chip']} ({machine['cores']} cores, {machine['device']})"
    show_table(*table_of(f"{title}: {result['model']}, {result['precision']}, {where}", columns, result["rows"]))
