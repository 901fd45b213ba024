"""``kvp bench``."""

import random
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from .common import DEFAULT_MODEL, AllowMismatch, Json, Model, clean_stdout, print_json, progress_bar
from .inference import DEMO_DOCUMENT

MIN_TABLE_WIDTH = 112
RANDOM_PROMPT_TOKENS = 10_000

app = typer.Typer(help="Measure time to first token.", rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Measure time to first token."""


@app.command()
def ttft(
    model: Model = DEFAULT_MODEL,
    preset: Annotated[str | None, typer.Option(help="A published OpenELM pair, random weights and prompts.")] = None,
    prompt_tokens: Annotated[str, typer.Option(help="Prompt lengths, comma-separated.")] = "128,512,1024",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    arms: Annotated[str, typer.Option(help="Arms, comma-separated: full, kvp, auxiliary.")] = "full,kvp",
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds; one more is discarded.")] = 5,
    prefill_step_size: Annotated[int | None, typer.Option(min=1, help="Prompt tokens per chunk, every arm.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON document here.")] = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Time the first token by full prefill and by prediction, interleaved in one process."""
    lengths = parse_lengths(prompt_tokens)
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise InputError(f"{out} is a folder or lies in none; name a file with --out.")
    from ..bench.ttft import measure_ttft
    from ..bundle import load
    from ..files import write_json
    from ..pipeline import default_step_size
    from ..presets import preset_model

    with clean_stdout(json), progress_bar("measuring") as progress:
        if preset is None:
            loaded = load(model, allow_base_mismatch=allow_base_mismatch)
            text_ids = loaded.text_tokenizer.encode(DEMO_DOCUMENT.read_text(encoding="utf-8"))
        else:
            loaded = preset_model(preset)
            text_ids = random.Random(0).choices(range(loaded.base.args.vocab_size), k=RANDOM_PROMPT_TOKENS)
        result = measure_ttft(
            loaded,
            preset or model,
            text_ids,
            prompt_tokens=lengths,
            batch_size=batch_size,
            arms=[arm.strip() for arm in arms.split(",")],
            rounds=rounds,
            step_size=prefill_step_size or default_step_size(),
            progress=progress,
        )
    if out is not None:
        write_json(out, result)
    if json:
        print_json(result)
    else:
        print_table(result)


def parse_lengths(text: str) -> list[int]:
    """Parse ``128,512``.

    Raises:
        InputError: anything but whole numbers and commas.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--prompt-tokens takes whole numbers and commas (128,512), not '{text}'.") from error


def print_table(result: dict[str, Any]) -> None:
    """Print the rows for people."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    machine = result["machine"]
    table = Table(
        title=f"Time to first token, ms: {result['model']} on {machine['chip']} ({machine['cores']} cores, "
        f"{machine['device']}), median of {result['rounds']}",
        box=SIMPLE_HEAD,
        padding=(0, 1),
    )
    for column in (
        "tokens",
        "arm",
        "TTFT",
        "(q1-q3)",
        "aux",
        "predict",
        "step",
        "floor",
        "speed-up",
        "FLOPs",
        "realised",
    ):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for row in result["rows"]:
        ttft_ms, predicted = row["ttft_ms"], row["arm"] == "kvp"
        batch = f"{row['batch_size']}x" if row["batch_size"] > 1 else ""
        table.add_row(
            f"{batch}{row['prompt_tokens']}",
            row["arm"],
            f"{ttft_ms['median']:.0f}",
            f"({ttft_ms['q1']:.0f}-{ttft_ms['q3']:.0f})",
            f"{row['auxiliary_prefill_ms']:.0f}" if predicted else "",
            f"{row['predict_ms']:.0f}" if predicted else "",
            f"{row['first_step_ms']:.0f}" if predicted else "",
            f"{row['floor_ms']:.0f}",
            "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
            f"{row['flops_ratio']:.2f}x",
            "" if row["realised"] is None else f"{row['realised']:.2f}",
        )
    Console(width=max(Console().width, MIN_TABLE_WIDTH)).print(table)
