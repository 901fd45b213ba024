"""What the commands share: option types, progress bars, JSON output."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..bundle.named import ALIAS
from ..errors import InputError

errors = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Dial:
    """How a prompt is read: the path, and how many of its first and last tokens the base reads itself."""

    prefill: str
    exact_head: int
    exact_tail: int


QUALITIES = {
    "fast": Dial("auto", 0, 32),
    "balanced": Dial("auto", 32, 32),
    "exact": Dial("full", 0, 0),
}
"""Chosen from the measured trade-off between recovery and time (README, "Chat")."""


class QualityChoice(StrEnum):
    """The values of ``--quality``."""

    fast = "fast"
    balanced = "balanced"
    exact = "exact"


class PrefillChoice(StrEnum):
    """The three values of ``--prefill``."""

    kvp = "kvp"
    full = "full"
    auto = "auto"


Model = Annotated[str, typer.Option("--model", help="Bundle directory, Hub id or the alias of the default.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]
Quality = Annotated[QualityChoice, typer.Option("--quality", help="Sets the next three; what is given beside it wins.")]
PrefillOption = Annotated[
    PrefillChoice | None,
    typer.Option("--prefill", help="kvp: predict; full: the base reads all; auto: predict if long."),
]
ExactHead = Annotated[
    int | None, typer.Option("--exact-head", min=0, help="First prompt tokens that the base reads itself.")
]
ExactTail = Annotated[
    int | None, typer.Option("--exact-tail", min=0, help="Prompt tokens before the last that the base reads itself.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Nucleus sampling; 1 is off.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]
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
AllowMismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Run on a base that the bundle was not made for.")
]
DEFAULT_MODEL = ALIAS
DEFAULT_EXACT_TAIL = QUALITIES["balanced"].exact_tail  # a question, and the chat template around it


def make_dial(quality: str, prefill: str | None, exact_head: int | None, exact_tail: int | None) -> Dial:
    """Return a named quality with what was given beside it."""
    named = QUALITIES[quality]
    return Dial(
        prefill=named.prefill if prefill is None else prefill,
        exact_head=named.exact_head if exact_head is None else exact_head,
        exact_tail=named.exact_tail if exact_tail is None else exact_tail,
    )


def print_json(data: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def say(text: str, style: str = "dim") -> None:
    """Print one line for people on stderr, never broken by a narrow or absent terminal."""
    errors.print(text, style=style, soft_wrap=True, markup=False)


@contextlib.contextmanager
def clean_stdout(json: bool) -> Iterator[None]:
    """With ``json``, send what libraries print to stderr while the block runs (mlx-lm warns on stdout)."""
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr while the block runs, on a terminal only; yields its (done, total) callback."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def read_text(path: str, remedy: str = "check --prompt-file") -> str:
    """Return the text of a file, or of stdin for ``-``.

    Args:
        path: the file.
        remedy: what to do where it cannot be read.

    Raises:
        InputError: missing, empty or not UTF-8.
    """
    name = "stdin" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}); {remedy}.") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}); convert it first.") from error
    if not text.strip():
        raise InputError(f"{name} is empty; give it some text.")
    return text


def make_sampler(temperature: float, top_p: float, seed: int | None) -> Any:
    """Return mlx-lm's sampler, after seeding MLX's generator."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler as mlx_lm_make_sampler

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
