"""What a chat reads and shows: line editing by prompt_toolkit, Markdown by rich; plain lines in a pipe."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from ..errors import InputError
from ..files import make_private
from .output import SafeConsole, progress_lines, say, show_answer

STATUS_REFRESH_SECONDS = 0.5
REDRAW_SECONDS = 0.125
FENCES = ("```", "~~~")


def is_interactive() -> bool:
    """Return whether somebody types and reads at a terminal that can move its cursor."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def read_line() -> str:
    """Return the next line of a pipe (or of a terminal that can do no more).

    Raises:
        EOFError: there is none.
        InputError: it is not UTF-8.
    """
    try:
        return input("> " if sys.stdin.isatty() else "").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"the input is not UTF-8 text (byte {error.start}); convert it first.") from error


class Editor:
    """Line editing at a terminal: history, multi-line paste, a status line.

    prompt_toolkit, since bracketed paste, a status line that changes while one types and a callback for every key
    take it: readline has the first only in part and the others not at all.

    Args:
        history: file that keeps what was entered.
        status: returns the status line.
        on_key: called whenever the text changes.
    """

    def __init__(self, history: Path, status: Callable[[], str], on_key: Callable[[], None]):
        self._session: PromptSession[str] = _prompt_session(history, status)
        self._session.default_buffer.on_text_changed += lambda _: on_key()

    def read(self, default: str = "") -> str:
        """Return the next message or command; Enter sends, Alt-Enter begins a new line.

        Args:
            default: text to begin with.

        Raises:
            EOFError: Ctrl-D on an empty line.
            KeyboardInterrupt: Ctrl-C.
        """
        # Ctrl-C is a key here. A signal comes only between two prompts, where prompt_toolkit would stumble over it.
        return self._session.prompt("> ", default=default, prompt_continuation="  ", handle_sigint=False)


def _prompt_session(history: Path, status: Callable[[], str]) -> PromptSession[str]:
    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")  # what Enter becomes when it is typed while a reply is still coming
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        history=_open_history(history),
        multiline=True,
        key_bindings=keys,
        bottom_toolbar=status,
        refresh_interval=STATUS_REFRESH_SECONDS,
        enable_suspend=True,
    )


class _PrivateHistory(FileHistory):
    """A file that only the user may read; what cannot be written stays in memory, and a line says so once."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        self._is_kept = True

    def store_string(self, string: str) -> None:
        """Append an entry to the file."""
        try:
            super().store_string(string)
        except OSError as error:
            if self._is_kept:
                say(f"{self.filename!s} cannot be written ({error.strerror}), so what you type is not kept.", "yellow")
            self._is_kept = False


def _open_history(path: Path) -> History:
    """Return the history of a file, made with its folder if need be; one in memory where that cannot be."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        make_private(path)
    except OSError as error:
        say(f"{path} cannot be written ({error.strerror}), so what you type is not kept.", "yellow")
        return InMemoryHistory()
    return _PrivateHistory(path)


class PlainReply:
    """Shows a reply piece by piece, as it is: in a pipe. What takes long before it is told on stderr."""

    def __init__(self) -> None:
        self._reading = ExitStack()
        self._tell = self._reading.enter_context(progress_lines("reading, tokens"))

    def progress(self, done: int, total: int) -> None:
        """Take note of how much of the prompt has been read."""
        self._tell(done, total)

    def feed(self, text: str) -> None:
        """Show the next piece."""
        self._reading.close()
        show_answer(text)

    def close(self) -> None:
        """End the reply's last line."""
        self._reading.close()
        show_answer("\n")


class MarkdownReply:
    """Shows a reply as Markdown while it grows: whole blocks are printed for good, the last one is redrawn.

    So a reply may be longer than the screen, and a resize spoils nothing but the last block until it is redrawn.
    """

    def __init__(self) -> None:
        self._pending = ""
        self._drawn = 0.0
        self._live = Live(console=SafeConsole(), refresh_per_second=1 / REDRAW_SECONDS, transient=True)
        self._restore_echo = without_echo()
        self._live.start()

    def progress(self, done: int, total: int) -> None:
        """Show how much of the prompt has been read."""
        if total > done:
            self._live.update(Text(f"reading, {done:,} of {total:,} tokens", style="dim"))
        else:
            self._live.update("")

    def feed(self, text: str) -> None:
        """Show the next piece."""
        self._pending += text
        end = whole_blocks(self._pending)
        if end:
            self._live.console.print(_markdown(self._pending[:end]))
            self._pending = self._pending[end:]
        if end or time.monotonic() - self._drawn > REDRAW_SECONDS:
            self._drawn = time.monotonic()
            self._live.update(_markdown(self._pending))

    def close(self) -> None:
        """Print what is left."""
        self._live.update("")
        self._live.stop()
        self._restore_echo()
        if self._pending.strip():
            self._live.console.print(_markdown(self._pending))


def _markdown(text: str) -> Markdown:
    return Markdown(text, hyperlinks=False)  # where a link leads stands beside it, and the terminal is told nothing


def without_echo() -> Callable[[], None]:
    """Keep what is typed from showing, since it would break up what is redrawn; returns what undoes it.

    The next prompt still receives it.
    """
    if not sys.stdin.isatty():
        return lambda: None
    import termios  # absent on Windows, where mlx is not either

    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(file, termios.TCSANOW, silent)
    return lambda: termios.tcsetattr(file, termios.TCSANOW, before)


def whole_blocks(markdown: str) -> int:
    """Return where the last block that is surely finished ends: behind an empty line outside of fenced code."""
    end = position = 0
    fence = None
    for line in markdown.splitlines(keepends=True):
        position += len(line)
        mark = line.lstrip()[:3]
        if mark in FENCES and fence in (None, mark):
            fence = mark if fence is None else None
        elif fence is None and not line.strip() and line.endswith("\n"):
            end = position
    return end
