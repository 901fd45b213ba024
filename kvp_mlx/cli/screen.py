"""What stands between the program and a terminal: control characters, odd streams and sizes, Ctrl-C.

This file imports nothing slow, since every command needs it.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from ..files import remove_unfinished

STARTED = time.monotonic()
"""When the program began: this file is the first that it imports."""
STARTING_SECONDS = 0.7
PATIENCE_SECONDS = 1.0
LEFT_BY_CTRL_C = 130
_VISIBLE = {
    number: f"\\x{number:02x}"
    for number in range(0xA0)
    if unicodedata.category(chr(number)) == "Cc" and chr(number) not in "\n\t"
}


def visible(text: str) -> str:
    r"""Return text whose control characters (but line feeds and tabs) are spelled out, as ``\x1b``.

    Terminals obey these: they would set titles, write the clipboard or overwrite lines, on behalf of whoever wrote a
    model, a file name or a document.
    """
    return text.translate(_VISIBLE)


def show(text: str = "", stream: TextIO | None = None) -> None:
    """Print one line for people, harmless, on stdout or another stream."""
    print(visible(text), file=stream)


def prepare_streams() -> None:
    """Make the three streams and the screen's size such as the rest of the program may rely on.

    A closed stream becomes the null device, before a file that is opened takes its number. What an encoding lacks
    is spelled out, so that no answer is lost; input is UTF-8. ``COLUMNS=0`` counts as unset.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    with contextlib.suppress(AttributeError, ValueError):  # something else than a text file stands in
        sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    for name in ("COLUMNS", "LINES"):
        if not os.environ.get(name, "1").isdecimal() or int(os.environ.get(name, "1")) < 1:
            del os.environ[name]


@contextlib.contextmanager
def starting(name: str) -> Iterator[None]:
    """Tell on a terminal, until the block ends, that a program is being started where that takes a while."""
    is_told = threading.Event()

    def tell() -> None:
        is_told.set()
        os.write(2, f"{name}: starting ...".encode())

    note = threading.Timer(STARTING_SECONDS, tell)
    note.daemon = True
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        note.start()
    try:
        yield
    finally:
        note.cancel()
        if is_told.is_set():
            os.write(2, b"\r\x1b[K")


def is_utf8(stream: Any) -> bool:
    """Return whether a stream takes any character."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").replace("_", "") == "utf8"


@contextlib.contextmanager
def leaving_on_ctrl_c(tidy: Callable[[], object] = remove_unfinished) -> Iterator[None]:
    """Let Ctrl-C end the program within ``PATIENCE_SECONDS`` while the block runs, whatever it is busy with.

    Python hears a signal only between two of its own steps, and a tokeniser or a chunk of prefill may take long. So a
    thread waits for the signal itself, and ends the program where the block has not ended by then.

    Args:
        tidy: what that thread puts in order before.
    """
    ended, heard = threading.Event(), threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    except ValueError:  # not the main thread, which alone has signals
        os.close(reading)
        os.close(writing)
        yield
        return
    watching = threading.Thread(target=_leave_after_signal, args=(reading, ended, heard, tidy), daemon=True)
    watching.start()
    try:
        try:
            yield
        finally:
            ended.set()
            signal.set_wakeup_fd(before)
            os.close(writing)  # which ends the thread's reading
            watching.join()
            os.close(reading)
    except Exception as error:
        if heard.is_set():  # a library took it for an error of its own
            raise KeyboardInterrupt from error
        raise


def _leave_after_signal(
    reading: int, ended: threading.Event, heard: threading.Event, tidy: Callable[[], object]
) -> None:
    while number := os.read(reading, 1):
        if number[0] != signal.SIGINT:
            continue
        heard.set()
        if not ended.wait(PATIENCE_SECONDS):
            with contextlib.suppress(Exception):
                tidy()
            show_cursor = "\r\x1b[?25h\x1b[K" if os.isatty(2) else ""
            os.write(2, f"{show_cursor}kvp: interrupted.\n".encode())
            os._exit(LEFT_BY_CTRL_C)
