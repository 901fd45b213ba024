"""A script: runs a job's sources one after another, and writes the job's token if all came to their end.

The job is JSON on stdin: ``sources`` and ``token``. The program cannot write the token itself, because it cannot find
it: it runs in a thread of its own, which C functions alone start and end, so that no frame, argument or module leads to
where the token is; what lists all objects or other threads' frames is refused. What happens after the end was
looked up before the beginning, so that replacing functions changes nothing.
"""

import _thread
import collections
import functools
import itertools
import json
import os
import subprocess  # noqa: F401 - asyncio needs it, and it can no longer be imported behind the guard
import sys
import time

STACK_BYTES = 2**26


def guard(event: str, arguments: tuple[object, ...]) -> None:
    """Refuse what a solution of a programming problem never does; an audit hook, which cannot be taken back.

    All that it looks at is constant, and a program that meets its frame cannot get at the function.
    """
    if event == "open":
        if not arguments[2] or not (arguments[2] & 0o3103):  # type: ignore[operator] # any of the writing flags
            return
    elif event == "import":
        if arguments[0] not in {
            "_posixsubprocess", "_ctypes", "ctypes", "_multiprocessing", "cffi", "_cffi_backend", "_testcapi",
            "_testinternalcapi", "_xxsubinterpreters", "_interpreters",
        }:  # fmt: skip
            return
    elif event.startswith("socket."):
        if event in {"socket.__new__", "socket.gethostname"}:  # asyncio wakes itself through a pair of sockets
            return
    elif event.partition(".")[0] not in {
        "shutil", "ctypes", "ftplib", "smtplib", "urllib", "tempfile", "gc", "pty", "syslog", "webbrowser", "fcntl",
        "subprocess", "sqlite3", "resource", "imaplib", "poplib", "nntplib", "telnetlib",
    } and event not in {
        "os.chdir", "os.chmod", "os.chown", "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.link",
        "os.mkdir", "os.posix_spawn", "os.remove", "os.rename", "os.rmdir", "os.spawn", "os.startfile", "os.symlink",
        "os.system", "os.truncate", "os.utime", "os.lockf", "os.setxattr", "os.removexattr", "os.chflags",
        "signal.pthread_kill", "sys._current_frames", "sys._current_exceptions", "sys.settrace", "sys.setprofile",
    }:  # fmt: skip
        return
    raise PermissionError(event)


def main() -> None:
    """Run the job on stdin; the process ends here."""
    job = json.load(sys.stdin)
    token, sources = job.pop("token").encode(), job.pop("sources")
    verdict = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    try:
        codes = [compile(source, "program", "exec") for source in ["", *sources]]
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        os._exit(1)
    write, leave, sleep, threads = os.write, os._exit, time.sleep, _thread._count
    ended: collections.deque[None] = collections.deque()
    count, wanted = ended.__len__, len(codes)
    names = {"__name__": "program", "__builtins__": __builtins__}
    target = functools.partial(ended.extend, map(exec, codes, itertools.repeat(names)))
    _thread.stack_size(STACK_BYTES)
    sys.addaudithook(guard)
    del sys.modules["_posixsubprocess"], globals()["main"], globals()["guard"]
    running = threads()
    _thread.start_new_thread(target, ())
    while not count():  # the thread has not begun
        sleep(0.001)
    while count() != wanted and threads() > running:
        sleep(0.001)
    if count() == wanted:
        write(verdict, token)
    leave(0)


if __name__ == "__main__":
    main()
