"""The options that several commands share, each declared once: types for typer, and what reads their values."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import mlx.core as mx
import typer
from mlx_lm.sample_utils import make_sampler as mlx_lm_make_sampler

from ..arms.kinds import forms
from ..bundle.named import ALIAS
from ..engine.dial import QUALITIES
from ..engine.dial import Path as PrefillPath
from ..errors import InputError

DEFAULT_MODEL = ALIAS
DEFAULT_EXACT_TAIL = QUALITIES["balanced"].exact_tail  # a question, and the chat template around it
DEMO_DOCUMENT = Path(__file__).parents[1] / "data" / "demo.md"
TEXT_HELP = "Text (.txt, .md, .jsonl, also .gz): file, folder, pattern, hub:NAME; repeatable."


class Dtype(StrEnum):
    """The values of ``--dtype``."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


# What is run

Model = Annotated[str, typer.Option("--model", help="Bundle directory, Hub id or the alias of the default.")]
ModelArgument = Annotated[str, typer.Argument(help="Bundle directory, Hub id or alias.")]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Run on a base that the bundle was not made for.")
]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="Type of the weights that are not quantised; default: as they are.")
]
QBits = Annotated[int | None, typer.Option("--q-bits", help="Quantise to 4 or 8 bits.")]
Arms = Annotated[
    str,
    typer.Option("--arms", help=f"Arms, comma-separated: {forms()}; mlx-lm and llama.cpp are timed only."),
]

# How a prompt is read

Quality = Annotated[
    Literal["fast", "balanced", "exact"],
    typer.Option("--quality", help="Sets the next three; what is given beside it wins."),
]
PrefillOption = Annotated[
    PrefillPath | None,
    typer.Option("--prefill", help="kvp: predict; full: the base reads all; auto: predict if long."),
]
ExactHead = Annotated[
    int | None, typer.Option("--exact-head", min=0, help="First prompt tokens that the base reads itself.")
]
ExactTail = Annotated[
    int | None, typer.Option("--exact-tail", min=0, help="Prompt tokens before the last that the base reads itself.")
]
Recompute = Annotated[
    float | None,
    typer.Option(
        "--recompute",
        min=0.0,
        max=1.0,
        help="Share of the prompt's tokens that the base reads itself, on average over layers, where it matters most "
        "(default: the bundle's).",
    ),
]
Cache = Annotated[str | None, typer.Option("--cache", help="Begin with a saved cache ('kvp cache build').")]
StepSize = Annotated[int | None, typer.Option("--prefill-step-size", min=1, help="Prompt tokens per chunk, every arm.")]

# What is generated

MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Nucleus sampling; 1 is off.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code-execution", help="Run what the model writes, fenced in; nothing of it runs without."),
]

# The data, and how much of it

TextData = Annotated[list[str], typer.Option("--data", help=TEXT_HELP)]
TextOrSample = Annotated[list[str] | None, typer.Option("--data", help=f"{TEXT_HELP}  [default: a sample]")]
ItemData = Annotated[
    list[str], typer.Option("--data", help="JSONL (also .gz): file, folder, pattern, hub:NAME; repeatable.")
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Items at most; a larger limit extends a smaller one.")
]
Documents = Annotated[int, typer.Option("--limit", min=2, help="Documents at most.")]
DataSeed = Annotated[int, typer.Option("--seed", help="Orders the data, and draws what is drawn from it.")]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", min=2, help="Prompt length.")]
ContinuationTokens = Annotated[int, typer.Option("--continuation-tokens", min=1, help="Tokens scored after it.")]
PromptLengths = Annotated[str, typer.Option("--prompt-tokens", help="Prompt lengths, comma-separated.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Measured rounds; one more is discarded.")]

# Where the outcome goes

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]
OutDirectory = Annotated[Path, typer.Option("--out", help="Directory to write.")]
OutFile = Annotated[
    Path | None, typer.Option("--out", help="Also write the result here: JSON (of a bench by its name .csv or .md).")
]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the result here (.png, .svg, .pdf).")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


def make_sampler(temperature: float, top_p: float, seed: int | None) -> Any:
    """Return mlx-lm's sampler, after seeding MLX's generator."""
    if seed is not None:
        mx.random.seed(seed)
    return mlx_lm_make_sampler(temp=temperature, top_p=top_p)


def parse_numbers(text: str, option: str) -> list[int]:
    """Parse what an option says, whole numbers and commas.

    Raises:
        InputError: anything else, or a number below 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"{option} takes whole numbers and commas (128,512), not '{text}'.")
    return [int(part) for part in parts]
