"""Generated programs, run where they can do no harm: HumanEval.

What holds on Linux with namespaces (any kernel from 5.12 on that lets a user have them; as root always):

- A program sees a read-only file system with the interpreter and the system's libraries, no other file, no other
  process, no network. It is nobody, without capabilities. Processor time, memory, processes and file size are limited.
  The kernel keeps all that, whatever the program does to its interpreter. Its environment is empty.
- All that it leaves behind is killed with it.
- A ``Judged`` program's tests run in a process of their own, fenced in as well, which asks the solution by messages.
  The solution cannot reach the tests: it passes by right answers alone, which arrive as plain values.
- A plain program passes by coming to its end. It would have to find a random token in its own interpreter to pretend
  that, and nothing that it can reach leads there (see ``runner``). That is no promise of the kernel's.

On macOS ``sandbox-exec`` keeps programs from writing, the network and other processes; memory is not limited, files can
be read. Without either nothing is run (InputError), unless the environment says ``KVP_CODE_ISOLATION=none``: then an
audit hook refuses the same, which stops accidents and no attacker. Errors of the kernel are beyond all of this: that
takes a virtual machine.
"""

import contextlib
import functools
import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError

SECONDS = 10.0
MEMORY_BYTES = 2**30
ISOLATION = "KVP_CODE_ISOLATION"
FENCE = Path(__file__).with_name("fence.py")
MESSAGES = Path(__file__).with_name("messages.py")
OWN = "_kvp_messages"
"""Where a judged program's processes keep what ``messages`` defines, apart from names of its own."""
MACOS = "(version 1)(allow default)(deny network*)(deny file-write*)(deny process-fork)(deny signal (target others))"


@dataclass(frozen=True)
class Judged:
    """A solution and the tests that judge it from outside.

    Attributes:
        solution: source text, what a model wrote in it.
        entry_point: the function of it that is tested.
        given: source text of the problem that the tests may use beside the function.
        tests: source text that defines ``check(candidate)``.
    """

    solution: str
    entry_point: str
    given: str
    tests: str


def passes(program: str | Judged, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Run a Python program and return whether it came to its end without an exception, or its solution is right.

    Args:
        program: source text.
        seconds: of the clock, and of one processor.
        memory_bytes: of address space (kept by Linux, not by macOS).

    Raises:
        InputError: this machine has nothing to fence programs in with.
    """
    isolate = can_isolate()
    if not isolate and os.environ.get(ISOLATION) != "none":
        raise InputError(
            "this machine gives programs no isolation (Linux namespaces or macOS sandbox-exec), so what models write "
            f"is not run; use another, or set {ISOLATION}=none in a virtual machine that you can lose."
        )
    limits = Limits(seconds, memory_bytes, isolate)
    if isinstance(program, str):
        return finishes([program], limits)
    return is_right(program, limits)


@dataclass(frozen=True)
class Limits:
    """What programs may use, and whether the system keeps them apart."""

    seconds: float
    memory_bytes: int
    isolate: bool


@functools.cache
def can_isolate() -> bool:
    """Return whether the system keeps programs apart, tried with one that does nothing."""
    return finishes([""], Limits(SECONDS, MEMORY_BYTES, True))


def is_right(program: Judged, limits: Limits) -> bool:
    """Let the tests ask the solution, each in a process of its own."""
    messages = f"{OWN} = {{}}\nexec({MESSAGES.read_text(encoding='utf-8')!r}, {OWN})"
    with pipe() as (asked, ask), pipe() as (answered, answer):
        serve = f"{messages}\n{OWN}['serve']({program.entry_point}, {asked}, {answer})\n"
        judge = f"{messages}\n{program.entry_point} = {OWN}['asked'] = {OWN}['Candidate']({ask}, {answered})\n"
        check = f"{program.tests}\ncheck({OWN}['asked'])\n"
        with running([program.solution, serve], limits, (asked, answer)) as (_, _):
            os.close(asked)
            os.close(answer)
            return finishes([program.given, judge, check], limits, (ask, answered))


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Yield a pipe's two ends; whatever of it is open in the end is closed."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            with contextlib.suppress(OSError):
                os.close(end)


def finishes(sources: list[str], limits: Limits, descriptors: tuple[int, ...] = ()) -> bool:
    """Run sources one after another in one process and return whether all came to their end in time."""
    deadline = time.monotonic() + limits.seconds
    with running(sources, limits, descriptors) as (process, token):
        output: Any = process.stdout
        found = b""
        while len(found) < len(token) and (left := deadline - time.monotonic()) > 0:
            if not select.select([output], [], [], left)[0] or not (part := os.read(output.fileno(), len(token))):
                break
            found += part
        return found == token


@contextlib.contextmanager
def running(
    sources: list[str], limits: Limits, descriptors: tuple[int, ...] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], bytes]]:
    """Start a fenced process on sources; yields it and the token that it writes at their end.

    It and all that it started is killed when the block ends.
    """
    token = secrets.token_hex(16)
    job = json.dumps({"sources": [re.sub("[\ud800-\udfff]", "?", source) for source in sources], "token": token})
    isolate = limits.isolate and sys.platform == "linux"
    with tempfile.TemporaryDirectory() as empty:
        fence = [str(int(isolate)), str(int(limits.seconds) + 1), str(limits.memory_bytes), os.path.realpath(empty)]
        sandbox = ["/usr/bin/sandbox-exec", "-p", MACOS] if limits.isolate and sys.platform == "darwin" else []
        process = subprocess.Popen(
            [*sandbox, sys.executable, "-I", "-S", str(FENCE), *fence],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=empty,
            env={},
            pass_fds=descriptors,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # type: ignore[union-attr]
                stdin.write(job.encode())
            yield process, token.encode()
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
