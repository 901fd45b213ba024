"""Generated programs, run where they can do no harm: HumanEval.

A program runs in a Python process of its own that gives up its rights before it starts: processor time, memory,
processes and file size are limited by the kernel, an audit hook (which cannot be taken back) refuses to write,
delete, start processes, open sockets or load native code, root becomes nobody. The parent kills the whole process
group when time is up. It is a fence against accidents of a model, not a prison for an attacker: that takes a
virtual machine.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile

SECONDS = 10.0
MEMORY_BYTES = 2**30

RUNNER = r"""
import os, resource, sys
seconds, memory, code = (int(word) for word in sys.argv[1:4])
program = sys.stdin.read()

def limit(kind, value):
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))

if os.geteuid() == 0:
    os.setegid(65534), os.seteuid(65534)
    readable = os.access(os.__file__, os.R_OK, effective_ids=True)
    os.seteuid(0), os.setegid(0)
    if readable:
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
limit(resource.RLIMIT_CPU, seconds)
limit(resource.RLIMIT_FSIZE, 0)
limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_NPROC, 64)
for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
    try:
        limit(kind, memory)
    except (OSError, ValueError):  # macOS knows the name and refuses
        pass

EVENTS = {
    "open", "import", "os.chdir", "os.chmod", "os.chown", "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg",
    "os.link", "os.mkdir", "os.posix_spawn", "os.remove", "os.rename", "os.rmdir", "os.spawn", "os.startfile",
    "os.symlink", "os.system", "os.truncate", "os.utime", "os.lockf", "os.setxattr", "os.removexattr", "os.chflags",
    "pty.spawn", "sqlite3.connect", "sqlite3.load_extension", "resource.setrlimit", "resource.prlimit",
    "signal.pthread_kill", "subprocess.Popen", "syslog.openlog", "webbrowser.open", "fcntl.fcntl", "fcntl.ioctl",
}
NATIVE = {"_posixsubprocess", "_ctypes", "ctypes", "_multiprocessing", "cffi", "_cffi_backend"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC

def guard(event, arguments, events=EVENTS, native=NATIVE, writing=WRITING):
    if event.split(".")[0] in ("socket", "shutil", "ctypes", "ftplib", "smtplib", "urllib", "tempfile"):
        raise PermissionError(event)
    if event not in events:
        return
    if event == "open" and not (arguments[2] or 0) & writing:
        return
    if event == "import" and arguments[0] not in native:
        return
    raise PermissionError(event)

sys.addaudithook(guard)
exec(compile(program, "program", "exec"), {"__name__": "program"})
os._exit(code)
"""


def passes(program: str, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Run a Python program and return whether it came to its end without an exception.

    The runner ends with an exit code drawn for this one run, so a program that just exits has not passed.

    Args:
        program: source text.
        seconds: of the clock, and of one processor.
        memory_bytes: of address space (kept by Linux, not by macOS).
    """
    code = random.SystemRandom().randrange(100, 250)
    command = [sys.executable, "-I", "-S", "-c", RUNNER, str(int(seconds) + 1), str(memory_bytes), str(code)]
    with tempfile.TemporaryDirectory() as empty:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=empty,
            env={},
            start_new_session=True,
        )
        try:
            process.communicate(program.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode == code
