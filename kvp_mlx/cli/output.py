"""What the commands print and read: JSON, lines for people, progress bars, files of text.

Whatever reaches a terminal goes through ``show``, ``say``, ``show_answer``, ``show_table``, ``print_json`` or a
``SafeConsole``: none of them lets a control character through (``screen.visible``). Nothing else prints.
"""

import contextlib
import json
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..device.hosts import is_launched
from ..engine.reply import Piece
from ..errors import InputError
from ..files import expanded
from .screen import STARTED, is_utf8, visible
from .screen import show as show  # noqa: PLC0414 - it belongs here, but has to be quick to import

MOST_BYTES = 2**28
"""Of one text: more than any context window holds."""
WAITING_SECONDS = 2.0
SILENT_SECONDS = 2.0
"""That a command may take without a line on stderr; between lines at most a minute."""
GRACE_SECONDS = 1.0
"""That each piece of work has, however long the program took to begin: most errors come that soon, alone."""


class SafeConsole(Console):
    """rich's console; control characters in what is printed are spelled out, those that rich itself adds stay."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments of something printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


errors = SafeConsole(stderr=True, highlight=False, emoji=False)


CONTROLS = {number: f"\\u{number:04x}" for number in range(0x7F, 0xA0)}
"""Control characters that JSON may hold as they are."""


def print_json(data: Any, *, indent: int | None = 2) -> None:
    """Print one JSON document on stdout, by escapes where the stream is not UTF-8."""
    text = json.dumps(data, indent=indent, ensure_ascii=not is_utf8(sys.stdout))
    print(text.translate(CONTROLS), flush=indent is None)


def show_table(table: Table, width: int) -> None:
    """Print a table on stdout, never narrower than ``width``."""
    SafeConsole(width=max(Console().width, width), markup=False, emoji=False).print(table)


def show_answer(text: str) -> None:
    """Print a piece of an answer on stdout: as it is in a pipe, safely on a terminal."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


def say(text: str, style: str = "dim") -> None:
    """Print one line for people on stderr; a terminal's lines are broken between words, a pipe's never."""
    errors.print(text, style=style, soft_wrap=not errors.is_terminal, markup=False)


def say_written(*files: Path) -> None:
    """Say that files were written."""
    say(f"Wrote {', '.join(map(str, files))}.")


def say_rows(rows: Iterable[tuple[str, str]], width: int) -> None:
    """Print names, in a column of some width, and what they mean on stderr, in the lines that a terminal has."""
    if not errors.is_terminal:
        for name, meaning in rows:
            say(f"{name:{width}}{meaning}", "default")
        return
    table = Table.grid(padding=(0, 2))
    for name, meaning in rows:
        table.add_row(Text(name), Text(meaning))
    errors.print(table)


def plural(number: int, thing: str) -> str:
    """Return a number of things, as ``1 token`` or ``2,000 tokens``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def summary(piece: Piece) -> str:
    """Return the line that follows an answer: what was read and how, the time to its first token, its speed."""
    path = f"{piece.predicted_tokens} of them predicted" if piece.path == "kvp" else "full prefill"
    recomputed = f" ({plural(piece.recomputed_tokens, 'token')} recomputed)" if piece.recomputed_tokens else ""
    new = f"{piece.new_tokens} new token{'' if piece.new_tokens == 1 else 's'}"
    exact = "all" if piece.exact_tokens == piece.prompt_tokens else f"{piece.exact_tokens} of {piece.prompt_tokens}"
    if piece.refined_tokens > piece.exact_tokens:
        exact += f" exact at first, {piece.refined_tokens} in the end"
    else:
        exact += " exact"
    return (
        f"{new} on {piece.cached_tokens} cached, {path}, first token after {piece.ttft_ms / 1e3:.2f} s{recomputed}, "
        f"then {piece.generation_tps:.1f} tokens/s; {exact}"
    )


def say_outcome(last: Piece, max_tokens: int) -> None:
    """Print what follows an answer: that it was cut, if it was, and its summary."""
    if last.finish_reason == "length":
        is_by_option = last.generation_tokens >= max_tokens
        remedy = "--max-tokens allows more" if is_by_option else "the context window is full"
        say(f"[cut off after {plural(last.generation_tokens, 'token')}; {remedy}]", "yellow")
    say(summary(last))


@contextlib.contextmanager
def clean_stdout(json: bool) -> Iterator[None]:
    """With ``json``, send what libraries print to stderr while the block runs (mlx-lm warns on stdout)."""
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr while the block runs, or lines if it is no terminal; yields its (done, total) callback."""
    if not sys.stderr.isatty():
        with progress_lines(label) as tell:
            yield tell
        return
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def progress_lines(label: str) -> Iterator[Callable[..., None]]:
    """Tell on stderr what takes long: that it is being done, ever more rarely how far it is, and that it is done.

    Yields its callback of what is done, the total, and the words for both where they are not numbers of things.
    """
    start = time.monotonic()
    due = start + SILENT_SECONDS
    first: tuple[float, int] | None = None  # when it was told first how much was done: what went before was no part
    last = 0
    note = threading.Timer(max(GRACE_SECONDS, SILENT_SECONDS - (start - STARTED)), say, [f"{label} ..."])
    note.daemon = True
    note.start()

    def tell(done: int, total: int, words: str = "") -> None:
        nonlocal due, first, last
        now = time.monotonic()
        if first is None or done < last:  # it begins, or begins again
            first = now, done
        last = done
        since, begun = first
        if now < due or not begun < done < total:
            return
        due = now + min(now - start, 60.0)
        left = (now - since) * (total - done) / (done - begun)
        say(f"{label}: {words or f'{done:,} of {total:,}'}, about {duration(left)} left")

    try:
        yield tell
    finally:
        note.cancel()
    if (took := time.monotonic() - start) > SILENT_SECONDS:
        say(f"{label}: done after {duration(took)}")


def duration(seconds: float) -> str:
    """Return a time for people."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def read_text(path: str, remedy: str = "check --prompt-file") -> str:
    """Return the text of a file, or of stdin for ``-``.

    Args:
        path: the file.
        remedy: what to do where it cannot be read.

    Raises:
        InputError: missing, too large, empty or not UTF-8.
    """
    name = "stdin" if path == "-" else path
    if path == "-" and is_launched():
        raise InputError("mlx.launch never ends what it pipes on, so stdin cannot be read to its end; name a file.")
    try:
        if path == "-":
            data = _standard_input()
        else:
            with open(expanded(path), "rb") as file:
                data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in a name; a home that nobody has
        raise InputError(f"{name} cannot be read ({getattr(error, 'strerror', error)}); {remedy}.") from error
    text = plain_text(data, name)
    if not text.strip():
        raise InputError(f"{name} is empty; give it some text.")
    return text


def read_piped() -> str:
    """Return what is piped in; nothing where stdin is a terminal, a device or ``mlx.launch``'s, which never ends.

    Raises:
        InputError: too large, or not UTF-8.
    """
    if is_launched():
        return ""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # something else than a file stands in
        kind = stat.S_IFIFO
    is_piped = stat.S_ISFIFO(kind) or stat.S_ISREG(kind) or stat.S_ISSOCK(kind)
    return plain_text(_standard_input(), "stdin") if is_piped else ""


def plain_text(data: bytes, name: str) -> str:
    """Return the text of a file as everyone reads it: no byte order mark, lines that end with a line feed.

    Raises:
        InputError: too large, not UTF-8, or with NUL characters, as UTF-16 has them.
    """
    if len(data) > MOST_BYTES:
        raise InputError(f"{name} has more than {MOST_BYTES / 2**20:.0f} MiB, more than any model reads; shorten it.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}); convert it first.") from error
    if "\0" in text:
        raise InputError(f"{name} holds NUL characters, which text has none of; convert it to UTF-8 first.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _standard_input() -> bytes:
    """Return all of stdin, telling after a while that its end is waited for."""
    line = "waiting for the end of standard input (Ctrl-D ends it, '< /dev/null' leaves it out)"
    note = threading.Timer(WAITING_SECONDS, say, [line])
    note.daemon = True
    note.start()
    try:
        return sys.stdin.buffer.read(MOST_BYTES + 1)
    finally:
        note.cancel()
