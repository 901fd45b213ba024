"""Programs that a model might write, the harmful ones too."""

import contextlib
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvp_mlx.errors import InputError
from kvp_mlx.evaluate import sandbox
from kvp_mlx.evaluate.sandbox import Judged, can_isolate, passes
from kvp_mlx.evaluate.task import Item
from kvp_mlx.evaluate.tasks.humaneval import program as program_of

on_linux = pytest.mark.skipif(sys.platform != "linux" or not can_isolate(), reason="no namespaces here")

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


# --- verdicts ------------------------------------------------------------------------------------------------------

FORGED = {
    "leaves before the tests": "import os\nos._exit(0)\n",
    "leaves with every code": "import os, sys\nos._exit(int(sys.argv[-1]) if len(sys.argv) > 1 else 0)\n",
    "looks for the token in the frames": (
        "import os, sys\nframe = sys._getframe()\nfound = []\n"
        "while frame:\n    found += [x for x in frame.f_locals.values() if isinstance(x, (str, bytes))]\n"
        "    frame = frame.f_back\n"
        "for fd in range(16):\n    for x in found:\n"
        "        try: os.write(fd, x if isinstance(x, bytes) else x.encode())\n"
        "        except OSError: pass\nos._exit(0)\n"
    ),
    "looks for it in the modules": (
        "import os, sys, __main__\nfound = [*map(str, vars(__main__).values()), *sys.argv, *sys.orig_argv]\n"
        "for fd in range(16):\n    for x in found:\n        try: os.write(fd, x.encode())\n"
        "        except OSError: pass\nos._exit(0)\n"
    ),
    "replaces what writes it": (
        "import builtins, os, time, _thread\n"
        "def evil(*a): os._exit(0)\n"
        "os.write = time.sleep = _thread._count = builtins.len = evil\nraise KeyError\n"
    ),
    "lists all objects": "import gc\nfor x in gc.get_objects(): pass\nimport os\nos._exit(0)\n",
}


@pytest.mark.parametrize("name", FORGED)
def test_the_end_cannot_be_pretended(name: str) -> None:
    assert not passes(FORGED[name] + "raise AssertionError\n")


LIES = {
    "equal to anything": "    class Yes:\n        def __eq__(self, other): return True\n    return Yes()\n",
    "a subclass that is equal to anything": (
        "    class Yes(int):\n        def __eq__(self, other): return True\n    return Yes()\n"
    ),
    "its own check": "    return 0\ndef check(f): pass\n",
    "a check that stays": (
        "    return 0\nimport _thread\n"
        "def keep():\n    while True: globals()['check'] = lambda f: None\n_thread.start_new_thread(keep, ())\n"
    ),
    "swallows the tests": '    return 0\nx = """\n',
    "errors that are none": "    return 0\nimport builtins\nbuiltins.AssertionError = builtins.Exception = Warning\n",
    "an end in the middle": "    return 0\nimport os\nos._exit(0)\n",
    "answers of its own": (
        "    return 0\nimport os\nfor fd in range(3, 16):\n    for _ in range(9):\n"
        '        try: os.write(fd, b\'{"value": {"object": "x"}}\\n\')\n        except OSError: pass\n'
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_solution_passes_by_right_answers_alone(name: str) -> None:
    assert not passes(program_of(PROBLEM, LIES[name]), seconds=3)


def test_answers_are_plain_values_of_any_kind() -> None:
    values = [None, True, 2**80, 1.5, float("inf"), "\xe9\u20ac", b"x", (1, [2, {3}]), {(1, 2): [frozenset("a")]}, 1j]
    loop = f"for x in {values!r}:\n        assert f(x) == x and type(f(x)) is type(x)\n"
    test = f"def check(f):\n    inf = float('inf')\n    {loop}"
    item = Item("same", "def same(x):\n", extra={"test": test, "entry_point": "same"})
    assert passes(program_of(item, "    return x\n"))
    assert not passes(program_of(item, "    return str(x)\n"))
    raising = "def check(f):\n    try: f(1)\n    except ValueError: return\n    raise AssertionError\n"
    item = Item("same", "def same(x):\n", extra={"test": raising, "entry_point": "same"})
    assert passes(program_of(item, "    raise ValueError('no')\n"))
    assert not passes(program_of(item, "    raise KeyError('no')\n"))


def test_tests_may_use_what_the_problem_defines() -> None:
    test = "import math\ndef check(f):\n    assert double(f(2)) == 8 and f(3) == twice(3) == 6\n"
    item = Item(
        "t", "def double(x):\n    return 2 * x\n\ndef twice(x):\n", extra={"test": test, "entry_point": "twice"}
    )
    assert passes(program_of(item, "    return double(x)\n"))
    assert not passes(program_of(item, "    return 4\ndef double(x): return 8\n"))


@pytest.mark.parametrize("name", ["pack", "unpack", "send", "received", "serve", "json", "os", "Candidate", "check"])
def test_a_programs_names_are_its_own(name: str) -> None:
    tests = "def check(candidate):\n    assert candidate([1, 2, 3]) == 6\n"
    helper = f"def {name}(x):\n    return sum(x)\n\ndef f(x):\n    return {name}(x)\n"
    assert passes(Judged(helper, "f", "", tests))
    assert passes(Judged(f"def {name}(x):\n    return sum(x)\n", name, "", tests))
    used = f"def check(candidate):\n    assert candidate([1, 2]) == {name}([1, 2])\n"
    given = f"def {name}(x):\n    return sum(x)\n"
    assert name == "check" or passes(Judged("def f(x):\n    return sum(x)\n", "f", given, used))


def test_asyncio_works() -> None:
    assert passes("import asyncio\nasync def f(): return 5\nassert asyncio.run(f()) == 5\n")
    assert passes(
        program_of(PROBLEM, "    import asyncio\n    async def f(): return a + b\n    return asyncio.run(f())\n")
    )


@on_linux
def test_a_program_sees_nothing_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without Python's guard: what is open to a program is what the kernel leaves it."""
    monkeypatch.setenv("SECRET_TOKEN", "here")
    (tmp_path / "secret").write_text("here")
    inside = (
        "import os\n"
        "assert os.getpid() == 1 and os.getuid() == os.geteuid() == 65534 and set(os.environ) <= {'LC_CTYPE'}\n"
        "assert not os.path.exists('/proc') and not os.path.exists('/home') and not os.path.exists('/tmp')\n"
        f"assert not os.path.exists({str(tmp_path)!r})\n"
        f"for path in ('/proc/{os.getpid()}/environ', '/proc/self/environ', '/etc/passwd'):\n"
        "    try: open(path)\n    except OSError: pass\n    else: raise AssertionError\n"
    )
    assert passes(inside)


@on_linux
@pytest.mark.parametrize(
    "program",
    [
        "import os\nassert os.fork() is not None\nos.setsid()\n",
        "import os\ntry: os.mkdir('/new')\nexcept OSError as e: assert e.errno == 30\nelse: raise AssertionError\n",
        "import os\ntry: os.open('/usr/new', os.O_CREAT | os.O_WRONLY)\n"
        "except OSError as e: assert e.errno in (13, 30)\nelse: raise AssertionError\n",
        "import socket\ns = socket.socket()\ntry: s.connect(('127.0.0.1', 22))\n"
        "except OSError as e: assert e.errno == 101\nelse: raise AssertionError\n",
        "import resource\nfor kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC):\n"
        "    try: resource.setrlimit(kind, (-1, -1))\n    except (OSError, ValueError): pass\n"
        "    else: raise AssertionError\n",
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "assert libc.setuid(0) == -1 and libc.mount(b'x', b'/', b'tmpfs', 0, 0) == -1\n",
    ],
)
def test_the_kernel_refuses_what_the_guard_would(program: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    take_guard_off(monkeypatch, tmp_path)
    assert passes(program)


def take_guard_off(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Use a fence that has no hook in the interpreter."""
    line = "    sys.addaudithook(guard)\n"
    texts = {name: Path(sandbox.__file__).with_name(name).read_text() for name in ("fence.py", "runner.py")}
    assert line in texts["runner.py"]
    for name, text in texts.items():
        (folder / name).write_text(text.replace(line, ""))
    monkeypatch.setattr(sandbox, "FENCE", folder / "fence.py")


@on_linux
def test_what_a_program_leaves_behind_dies_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    take_guard_off(monkeypatch, tmp_path)
    start = time.monotonic()
    name = f"left{os.getpid()}"
    child = "os.setsid()\n    if os.fork() == 0: time.sleep(77.25)\n    os._exit(0)\n"
    named = f"import ctypes, os, time\nctypes.CDLL(None).prctl(15, b'{name}')\n"
    assert passes(f"{named}if os.fork() == 0:\n    {child}")
    assert time.monotonic() - start < 5
    time.sleep(0.2)
    assert name not in names_of_processes()
    assert not passes(f"{named}if os.fork() == 0:\n    {child}time.sleep(77)", seconds=1)
    time.sleep(0.2)
    assert name not in names_of_processes()


def names_of_processes() -> set[str]:
    found = set()
    for name in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            found.add(name.read_text().strip())
    return found


def test_without_isolation_nothing_is_run_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "can_isolate", lambda: False)
    monkeypatch.delenv("KVP_CODE_ISOLATION", raising=False)
    with pytest.raises(InputError, match="KVP_CODE_ISOLATION"):
        passes("")
    monkeypatch.setenv("KVP_CODE_ISOLATION", "none")
    assert passes("")
    assert passes(program_of(PROBLEM, "    return a + b\n"))
    assert not passes(program_of(PROBLEM, "    return a - b\n"))
    assert not passes("import os; os.fork()")
    assert not passes("open('x', 'w')")


HUMANEVAL = Path(__file__).parents[3] / "shared" / "data" / "eval" / "humaneval.jsonl.gz"


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="HumanEval is not here")
def test_humanevals_own_solutions_pass_and_empty_ones_do_not() -> None:
    """Every eighth problem, and those whose tests use the problem's functions; all 164 hold as well."""
    records = list(map(json.loads, gzip.decompress(HUMANEVAL.read_bytes()).splitlines()))
    for record in [*records[::8], records[32], records[38], records[50]]:
        item = Item(record["task_id"], record["prompt"], extra=record)
        assert passes(program_of(item, record["canonical_solution"])), record["task_id"]
        assert not passes(program_of(item, "")), record["task_id"]
        assert passes(program_of(item, record["prompt"] + record["canonical_solution"], chat=True)), record["task_id"]
        assert not passes(program_of(item, record["prompt"], chat=True)), record["task_id"]
