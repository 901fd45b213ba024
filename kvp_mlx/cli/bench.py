"""``kvp bench``."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..arms.kinds import split_names
from ..bench.calibrate import calibrate_auto
from ..bench.compare import compare_results
from ..bench.decode import measure_decode
from ..bench.drafts import measure_drafts
from ..bench.flops import flops_table
from ..bench.hosts import Cluster, hosts_table
from ..bench.memory import measure_memory
from ..bench.plot import draw_ttft, read_drawable
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
from ..bench.serve import MLX_LM, PATHS, ServeSweep, check_serve_sweep, end_servers, measure_serving, write_subject
from ..bench.ttft import measure_ttft
from ..bundle.loading import load_any
from ..device.hosts import launched_rank
from ..engine.speculative import DRAFT_TOKENS, Drafting
from ..errors import InputError, KVPError
from ..files import check_writable, remove_unfinished
from ..files.directories import scratch_directory
from ..files.figures import check_picture
from .device import DeviceOption, use_device
from .options import (
    DEFAULT_EXACT_TAIL,
    DEFAULT_MODEL,
    AllowMismatch,
    AnyModel,
    Arms,
    DraftOption,
    DraftTokens,
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
from .output import clean_stdout, print_json, progress_bar, say, say_written, show_table
from .screen import leaving_on_ctrl_c
from .subject import Subject, demo_ids, load_subject, make_sweep, parse_lengths, require_default_model

app = typer.Typer(help="Measure time to first token, decoding speed and memory.", rich_markup_mode=None)

Preset = Annotated[str | None, typer.Option("--preset", help="A published OpenELM pair, random weights and prompts.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Prompts at once.")]
Result = dict[str, Any]


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
    check_picture(plot)
    require_default_model(sweep, subject)
    with clean_stdout(json):
        loaded, text_ids = load_subject(subject, sweep)
    begun: list[Result] = []
    stdout = sys.stdout

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
        with contextlib.redirect_stdout(stdout):  # the other thread keeps it clean meanwhile
            finish()
        stdout.flush()

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
    arms: Annotated[str, typer.Option("--arms", help=f"Of {', '.join([*PATHS, MLX_LM])}.")] = ",".join(SERVE_ARMS),
    quality: Annotated[
        Literal["fast", "balanced", "exact"], typer.Option("--quality", help="Of the arms auto and kvp.")
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
    sweep = ServeSweep(parse_lengths(prompt_tokens), counts, split_names(arms), rounds, new_tokens, quality)
    check_writable(out)
    with scratch_directory() as place:
        with clean_stdout(json):
            loaded = open_model(model, load_any)
            check_serve_sweep(sweep, loaded)
            subject = write_subject(loaded, model, demo_ids(loaded), place)
            del loaded  # the servers have their own
        with clean_stdout(json), progress_bar("measuring, rounds") as progress, leaving_on_ctrl_c(end_servers):
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
        title = f"{result['base']}, {batch_size} x {prompt_tokens} tokens"
        report(result, HOSTS, title, out, json, note=assumed(result))
        return
    result = flops_table(preset or [], prompt_tokens, batch_size)
    report(result, FLOPS, f"Work up to the first token, {batch_size} x {prompt_tokens} tokens", out, json)


def assumed(result: Result) -> str:
    """Return what the arithmetic of several hosts takes for granted."""
    told = result["assumptions"]
    return (
        f"Assumed: {told['tflops']:g} TFLOP/s a host, links of {told['link_gbps']:g} Gbit/s each way in a ring, "
        f"{told['latency_us']:g} us an all-reduce, {told['sums_per_layer']} of these a layer and chunk of "
        f"{told['chunk_tokens']} tokens, {told['dtype_bytes']} bytes a value, nothing overlapped; kvp: a prefix of "
        f"{result['prefix_layers']} of {result['base_layers']} layers, nothing recomputed."
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
    check_picture(out)
    draw_ttft([read_drawable(path) for path in results], out)
    say_written(out)


def report(
    result: Result,
    columns: dict[str, Callable[[Any], str]],
    title: str,
    out: Path | None,
    json: bool,
    note: str = "",
) -> None:
    """Write the result to ``out``, and print it as JSON or as a table, which tells the machine of what was measured."""
    if out is not None:
        write_result(out, result, columns)
        say_written(out)
    if json:
        print_json(result)
        return
    if machine := result.get("machine"):
        where = f"{machine['chip']} ({machine['cores']} cores, {machine['device']})"
        title = f"{title}: {result['model']}, {result['precision']}, {where}"
    show_table(*table_of(title, columns, result["rows"]))
    if note:
        say(note, style="")
