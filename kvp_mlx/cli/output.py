"""What the commands print and read: JSON, lines for people, progress bars, files of text."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..engine.reply import Piece
from ..errors import InputError

errors = Console(stderr=True, highlight=False)


def print_json(data: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def say(text: str, style: str = "dim") -> None:
    """Print one line for people on stderr, never broken by a narrow or absent terminal."""
    errors.print(text, style=style, soft_wrap=True, markup=False)


def summary(piece: Piece) -> str:
    """Return the line that follows an answer: what was read and how, the time to its first token, its speed."""
    path = f"{piece.predicted_tokens} of them predicted" if piece.path == "kvp" else "full prefill"
    recomputed = f" ({piece.recomputed_tokens} tokens recomputed)" if piece.recomputed_tokens else ""
    return (
        f"{piece.new_tokens} new tokens on {piece.cached_tokens} cached, {path}, first token after "
        f"{piece.ttft_ms / 1e3:.2f} s{recomputed}, then {piece.generation_tps:.1f} tokens/s"
    )


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
