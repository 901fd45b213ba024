"""``kvp bench``."""

import json as json_library
import random
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, KVPError
from ..files import check_writable
from .inference import DEMO_DOCUMENT
from .options import DEFAULT_EXACT_TAIL, DEFAULT_MODEL, AllowMismatch, ExactTail, Json, Model, parse_numbers
from .output import clean_stdout, print_json, progress_bar, say

if TYPE_CHECKING:
    from ..bench.ttft import Sweep
    from ..bundle.loading import KVPModel

RANDOM_PROMPT_TOKENS = 10_000

app = typer.Typer(help="Measure time to first token, decoding speed and memory.", rich_markup_mode=None)


class Dtype(StrEnum):
    """The values of ``--dtype``."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Device(StrEnum):
    """The values of ``--device``."""

    cpu = "cpu"
    gpu = "gpu"


Preset = Annotated[str | None, typer.Option(help="A published OpenELM pair, random weights and prompts.")]
PromptTokens = Annotated[str, typer.Option(help="Prompt lengths, comma-separated.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts at once.")]
Arms = Annotated[
    str,
    typer.Option(
        help="Arms, comma-separated: full, full-ours, kvp, kvp-N, kvp-N-R, auxiliary, layers-R, random-R, static-R, "
        "lazy-A-B, spec-R, llama.cpp."
    ),
]
Rounds = Annotated[int, typer.Option(min=1, help="Measured rounds; one more is discarded.")]
StepSize = Annotated[int | None, typer.Option(min=1, help="Prompt tokens per chunk, every arm.")]
DtypeOption = Annotated[Dtype | None, typer.Option("--dtype", help="Weights as this type, even where it is slow.")]
QBits = Annotated[int | None, typer.Option(min=4, max=8, help="Quantise base and auxiliary, to 4 or 8 bits.")]
DeviceOption = Annotated[Device | None, typer.Option("--device", help="Default: the GPU where there is one.")]
Out = Annotated[Path | None, typer.Option(help="Also write the result here: JSON, or by its name .csv or .md.")]


@app.callback()
def group() -> None:
    """Measure time to first token, decoding speed and memory."""


@app.command()
def ttft(
    model: Model = DEFAULT_MODEL,
    preset: Preset = None,
    prompt_tokens: PromptTokens = "128,512,1024",
    batch_size: BatchSize = 1,
    arms: Arms = "full,kvp",
    rounds: Rounds = 5,
    prefill_step_size: StepSize = None,
    dtype: DtypeOption = None,
    q_bits: QBits = None,
    device: DeviceOption = None,
    out: Out = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the result here (.png, .svg, .pdf).")] = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Time the first token by several arms, interleaved in one process.

    Ctrl-C or SIGTERM keeps the prompt lengths that are finished.
    """
    lengths = parse_lengths(prompt_tokens)
    check_writable(out, plot)
    use_device(device)
    from ..bench.llama_cpp import llama_cpp_engine
    from ..bench.plot import draw_ttft
    from ..bench.report import TTFT
    from ..bench.ttft import Sweep, measure_ttft, parse_bench_arms
    from ..device.streams import default_step_size

    sweep = Sweep(lengths, batch_size, parse_bench_arms(arms), rounds, prefill_step_size or default_step_size())
    has_llama_cpp = any(arm.kind == "llama.cpp" for arm in sweep.arms)
    if has_llama_cpp and (preset is not None or model != DEFAULT_MODEL):
        raise InputError(
            f"the arm llama.cpp reads the default model's file; leave out that arm, or take {DEFAULT_MODEL}."
        )
    other_engine = llama_cpp_engine(max(lengths)) if has_llama_cpp else None
    with clean_stdout(json), progress_bar("measuring") as progress:
        loaded, text_ids = prepare(model, preset, dtype, q_bits, sweep, allow_base_mismatch)
        result = measure_ttft(loaded, preset or model, text_ids, sweep, other_engine=other_engine, progress=progress)
    report(result, TTFT, f"Time to first token, median of {rounds}", out, json)
    if plot is not None:
        draw_ttft([result], plot)
    if result["interrupted"]:
        raise KeyboardInterrupt


@app.command()
def decode(
    model: Model = DEFAULT_MODEL,
    preset: Preset = None,
    prompt_tokens: PromptTokens = "512",
    arms: Arms = "full,kvp",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to time.")] = 64,
    rounds: Rounds = 5,
    prefill_step_size: StepSize = None,
    dtype: DtypeOption = None,
    q_bits: QBits = None,
    device: DeviceOption = None,
    out: Out = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Time decoding after a predicted and after a true cache."""
    lengths = parse_lengths(prompt_tokens)
    check_writable(out)
    use_device(device)
    from ..arms.arm import parse_arms
    from ..bench.decode import measure_decode
    from ..bench.report import DECODE
    from ..bench.ttft import Sweep
    from ..device.streams import default_step_size

    sweep = Sweep(lengths, 1, parse_arms(arms), rounds, prefill_step_size or default_step_size())
    with clean_stdout(json), progress_bar("measuring") as progress:
        loaded, text_ids = prepare(model, preset, dtype, q_bits, sweep, allow_base_mismatch)
        name = preset or model
        result = measure_decode(loaded, name, text_ids, sweep, new_tokens=new_tokens, progress=progress)
    report(result, DECODE, f"Decoding {new_tokens} tokens, median of {rounds}", out, json)


@app.command()
def memory(
    model: Model = DEFAULT_MODEL,
    preset: Preset = None,
    prompt_tokens: PromptTokens = "128,512,1024",
    batch_size: BatchSize = 1,
    arms: Arms = "full,kvp",
    prefill_step_size: StepSize = None,
    dtype: DtypeOption = None,
    q_bits: QBits = None,
    device: DeviceOption = None,
    out: Out = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Measure each arm's peak memory up to the first token, beside what it is made of."""
    lengths = parse_lengths(prompt_tokens)
    check_writable(out)
    use_device(device)
    from ..arms.arm import parse_arms
    from ..bench.memory import measure_memory
    from ..bench.report import MEMORY
    from ..bench.ttft import Sweep
    from ..device.streams import default_step_size

    sweep = Sweep(lengths, batch_size, parse_arms(arms), 1, prefill_step_size or default_step_size())
    with clean_stdout(json), progress_bar("measuring") as progress:
        loaded, text_ids = prepare(model, preset, dtype, q_bits, sweep, allow_base_mismatch)
        result = measure_memory(loaded, preset or model, text_ids, sweep, progress=progress)
    report(result, MEMORY, "Peak memory, MiB", out, json)


@app.command()
def flops(
    preset: Annotated[list[str] | None, typer.Option(help="Repeatable; default: all 11.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Prompt length of the true ratio.")] = 1024,
    batch_size: BatchSize = 1,
    out: Out = None,
    json: Json = False,
) -> None:
    """Print the arithmetic of the published pairs beside the paper's ratios.

    The paper counts parameters, embeddings included (``parameters``); ``true`` is the ratio of the FLOPs that are
    computed, attention and predictor included, embeddings and skipped layers not.
    """
    check_writable(out)
    from ..bench.flops import flops_table
    from ..bench.report import FLOPS, print_table, write_result

    result = flops_table(preset or [], prompt_tokens, batch_size)
    if out is not None:
        write_result(out, result, FLOPS)
    if json:
        print_json(result)
    else:
        print_table(f"Work up to the first token, {batch_size} x {prompt_tokens} tokens", FLOPS, result["rows"])


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
    from ..bench.compare import compare as compare_results
    from ..bench.report import COMPARE, print_table

    result = compare_results(before, after, fail_above)
    if json:
        print_json(result)
    else:
        print_table(f"{after} over {before}", COMPARE, result["rows"])
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
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Find the prompt length from which prediction pays here, and keep it for --prefill auto."""
    use_device(device)
    exact_tail = DEFAULT_EXACT_TAIL if exact_tail is None else exact_tail
    from ..bench.calibrate import calibrate as calibrate_model
    from ..bench.report import CALIBRATION, print_table
    from ..bundle.loading import load

    with clean_stdout(json), progress_bar("measuring") as progress:
        loaded = load(model, allow_base_mismatch=allow_base_mismatch)
        ids = demo_ids(loaded)
        result = calibrate_model(loaded, model, ids, exact_tail=exact_tail, rounds=rounds, progress=progress)
    if json:
        print_json(result)
        return
    print_table(f"Time to first token, {model}, exact tail {exact_tail}", CALIBRATION, result["rows"])
    pays = f"from {result['pays_from']} tokens on" if result["pays_from"] else "at none of these lengths"
    say(f"prediction pays {pays}; kept in {result['stored']}", style="")


@app.command()
def plot(
    results: Annotated[list[Path], typer.Argument(help="Results of 'kvp bench ttft --out FILE.json'.")],
    out: Annotated[Path, typer.Option(help="Picture to write (.png, .svg, .pdf).")] = Path("bench.png"),
) -> None:
    """Draw saved results: the first one's times and parts, and what all of them realise."""
    check_writable(out)
    from ..bench.plot import draw_ttft

    documents = []
    for path in results:
        try:
            documents.append(json_library.loads(path.read_text(encoding="utf-8")))
            _ = [row["speedup"] for row in documents[-1]["rows"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a result of 'kvp bench ttft --out FILE.json'.") from error
    draw_ttft(documents, out)


def prepare(
    model: str, preset: str | None, dtype: Dtype | None, q_bits: int | None, sweep: "Sweep", allow_base_mismatch: bool
) -> "tuple[KVPModel, list[int]]":
    """Load or build what is measured, and the text of the prompts, unless the run would not fit into memory.

    Raises:
        InputError: too little memory, or ``--q-bits`` other than 4 or 8.
    """
    from ..bench.capacity import require_memory
    from ..bench.precision import bundle_for_bench, preset_for_bench

    if q_bits not in (None, 4, 8):
        raise InputError(f"--q-bits is 4 or 8, not {q_bits}.")
    size = {"prompt_tokens": max(sweep.prompt_tokens), "batch": sweep.batch_size, "step_size": sweep.step_size}
    kind = None if dtype is None else dtype.value
    if preset is not None:
        loaded = preset_for_bench(preset, kind, q_bits, **size)
        return loaded, random.Random(0).choices(range(loaded.base.args.vocab_size), k=RANDOM_PROMPT_TOKENS)
    loaded = bundle_for_bench(model, kind, q_bits, allow_base_mismatch=allow_base_mismatch)
    require_memory(loaded, **size, loaded=True)
    return loaded, demo_ids(loaded)


def demo_ids(loaded: "KVPModel") -> list[int]:
    """Return the shipped document as token ids."""
    return loaded.text_tokenizer.encode(DEMO_DOCUMENT.read_text(encoding="utf-8"))


def use_device(device: Device | None) -> None:
    """Choose the device, before mlx-lm is imported: its stream stays on what is the default then.

    Raises:
        InputError: there is no such device.
    """
    import mlx.core as mx

    if device is None:
        return
    wanted = getattr(mx, device.value)
    if not mx.is_available(wanted):
        raise InputError(f"this machine has no {device.value} that mlx can use; leave out --device.")
    mx.set_default_device(wanted)


def report(
    result: dict[str, Any], columns: dict[str, Callable[[Any], str]], title: str, out: Path | None, json: bool
) -> None:
    """Write the result to ``out``, and print it as JSON or as a table."""
    from ..bench.report import print_table, write_result

    if out is not None:
        write_result(out, result, columns)
    if json:
        print_json(result)
        return
    machine = result["machine"]
    where = f"{machine['chip']} ({machine['cores']} cores, {machine['device']})"
    print_table(f"{title}: {result['model']}, {result['precision']}, {where}", columns, result["rows"])


def parse_lengths(text: str) -> list[int]:
    """Parse prompt lengths such as ``128,512``.

    Raises:
        InputError: anything but whole numbers from 2 up and commas.
    """
    lengths = parse_numbers(text, "--prompt-tokens")
    if min(lengths) < 2:
        raise InputError(f"prompts have 2 tokens or more, not {min(lengths)}; change --prompt-tokens.")
    return lengths
