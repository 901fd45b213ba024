"""Programs that a model might write, the harmful ones too."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvp_mlx.evaluate.sandbox import passes
from kvp_mlx.evaluate.task import Item
from kvp_mlx.evaluate.tasks.humaneval import program as program_of

PROBLEM = Item(
    "add",
    "def add(a, b):\n",
    extra={"test": "def check(f):\n    assert f(2, 3) == 5\n", "entry_point": "add"},
)


@pytest.mark.parametrize(
    ("completion", "right"),
    [("    return a + b\n", True), ("", False), ("    return a - b\n", False), ("    return (", False)],
)
def test_a_completion_passes_its_tests_or_not(completion: str, right: bool) -> None:
    assert passes(program_of(PROBLEM, completion)) is right


def test_usual_imports_work() -> None:
    names = "math, re, hashlib, collections, heapq, functools, itertools, string, typing, random, datetime"
    assert passes(f"import {names}\nassert hashlib.md5(b'x').hexdigest()[0] == '9'\n")


@pytest.mark.parametrize("program", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_leaving_early_is_not_passing(program: str) -> None:
    assert not passes(program + "\nassert False")


def test_loops_end() -> None:
    start = time.perf_counter()
    assert not passes("while True: pass", seconds=1)
    assert time.perf_counter() - start < 5


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit address space")
def test_memory_is_limited() -> None:
    assert passes("x = b'x' * 2**20")
    assert not passes("x = b'x' * 2**31")


HARM = {
    "delete": "import os; os.remove({file!r})",
    "delete tree": "import shutil; shutil.rmtree({folder!r})",
    "write": "open({file!r}, 'w').write('gone')",
    "append": "import os; os.open({file!r}, os.O_WRONLY | os.O_APPEND)",
    "make": "open({folder!r} + '/new', 'x')",
    "rename": "import os; os.rename({file!r}, {file!r} + '2')",
    "chmod": "import os; os.chmod({file!r}, 0)",
    "truncate": "import os; os.truncate({file!r}, 0)",
    "fork": "import os; os.fork()",
    "shell": "import os; os.system('rm ' + {file!r})",
    "process": "import subprocess; subprocess.run(['rm', {file!r}])",
    "own process": "import _posixsubprocess",
    "native": "import ctypes; ctypes.CDLL(None).unlink({file!r}.encode())",
    "network": "import socket; socket.create_connection(('127.0.0.1', 9), 0.1)",
    "kill": "import os; os.kill(os.getppid(), 0)",
    "undo": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
}


@pytest.mark.parametrize("name", HARM)
def test_harm_is_refused(name: str, tmp_path: Path) -> None:
    """Refused, not merely failed: swallowing the error, the program comes to its end and nothing has happened."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    file = folder / "file"
    file.write_text("here")
    file.chmod(0o666)
    program = HARM[name].format(file=str(file), folder=str(folder))
    assert not passes(program)
    swallowed = f"try:\n    {program}\nexcept PermissionError:\n    refused = True\nassert refused\n"
    assert passes(swallowed)
    assert file.read_text() == "here"
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_forks_leave_nothing_behind(tmp_path: Path) -> None:
    marker = f"marker{os.getpid()}"
    program = (
        f"# {marker}\nimport os, time\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    )
    assert not passes(program, seconds=1)
    left = subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True, check=False).stdout
    assert "RLIMIT_NPROC" not in left
