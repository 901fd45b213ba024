"""What stands between the program and a terminal: escapes, odd streams, Ctrl-C."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

pytest.importorskip("pty", reason="pseudo-terminals are a Unix thing")

from conftest import Kvp
from rich.markdown import Markdown
from rich.table import Table
from support.terminal import Terminal

import kvp_mlx
from kvp_mlx.cli.output import SafeConsole, read_piped
from kvp_mlx.cli.screen import leaving_on_ctrl_c, visible

EVIL = "a\x1b]52;c;ZXZpbA==\x07b\x9b2Jc\x1b[31md\re\x08f\x7f"
OWN_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kvp_mlx", *map(str, arguments)]
    return subprocess.run(command, check=False, **{"capture_output": True, "stdin": subprocess.DEVNULL, **options})


def test_control_characters_are_spelled_out_and_nothing_else_changes() -> None:
    assert visible(EVIL).isprintable()
    assert visible("\x1b\x07\x9b") == "\\x1b\\x07\\x9b"
    plain = "Grüße\n\tund 日本語 👋\u200d🦰 \u00a0."
    assert visible(plain) == plain


@pytest.mark.parametrize("wrap", [str, Markdown, lambda text: f"# {text}", lambda text: f"[x](http://{text})"])
def test_no_control_character_gets_through_rich(wrap) -> None:
    file = io.StringIO()
    console = SafeConsole(file=file, force_terminal=True, width=60, markup=False)
    console.print(wrap(EVIL))
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    console.print(table)
    left = OWN_ESCAPES.sub("", file.getvalue())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", left)
    assert "]52;" in left


@pytest.fixture
def evil(bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose folder, records and answers hold escapes."""
    directory = tmp_path / "m\x1b]0;title\x07m"
    shutil.copytree(bundle, directory)
    config = json.loads((directory / "kvp.json").read_text())
    config["measured"] = {EVIL: {"recovery": 0.5}}
    config["training"] = {"method": EVIL}
    (directory / "kvp.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "{}"],
        ["models", "ls", "{}"],
        ["generate", "Hi", "--model", "{}/none"],
        ["\x1b]0;x\x07"],
        ["info", "-\x1bx"],
    ],
)
def test_names_and_records_are_harmless(arguments: list[str], evil: Path, kvp: Kvp) -> None:
    outcome = kvp(*(argument.format(evil) for argument in arguments))
    text = outcome.out + outcome.err
    assert "\\x1b" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def test_tables_of_results_are_harmless(tmp_path: Path, kvp: Kvp) -> None:
    row = {"arm": EVIL, "prompt_tokens": 8, "batch_size": 1, "ttft_ms": {"samples": [1.0, 2.0]}}
    (tmp_path / "bench.json").write_text(json.dumps({"format": 2, "rows": [row]}))
    arm = {"score": 0.5, "interval": [0.4, 0.6], "ttft_ms": 3.0, "flops_ratio": 1.0}
    score = {"task": EVIL, "n": 2, "model": EVIL, "arms": {"full": arm}}
    (tmp_path / "eval.json").write_text(json.dumps(score))
    compared = kvp("bench", "compare", tmp_path / "bench.json", tmp_path / "bench.json")
    drawn = kvp("eval", "pareto", tmp_path / "eval.json", "--out", tmp_path / "m\x1b]0;x\x07.json")
    for outcome in (compared, drawn):
        assert outcome.code == 0, outcome.err
        assert "]52;c" in outcome.out
        assert not CONTROLS.search(outcome.out + outcome.err)
    assert "Wrote " in drawn.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "squad", "{model}", "--data", "{folder}/\x1b[2Jnone"],
        ["eval", "needle", "{model}", "--arms", "a\x9b2J"],
        ["eval", "suite", "{folder}", "--tasks", "\x1b[2J"],
        ["bench", "ttft", "--arms", "\x1b[2J"],
        ["fit", "{folder}/\x07", "--layers", "1", "--out", "{folder}/o"],
        ["convert", "gguf", "{folder}/\x1bx.gguf", "--out", "{folder}/o"],
        ["cache", "rm", "\x1bx"],
        ["models", "rm", "\x1bx", "--yes"],
    ],
)
def test_what_is_wrong_is_named_harmlessly(arguments: list[str], bundle: Path, tmp_path: Path, kvp: Kvp) -> None:
    outcome = kvp(*(argument.format(model=bundle, folder=tmp_path) for argument in arguments))
    assert (outcome.code, outcome.err.count("\n"), outcome.out) == (2, 1, "")
    assert not CONTROLS.search(outcome.err)


def test_json_holds_control_characters_by_escapes_alone(evil: Path, kvp: Kvp) -> None:
    outcome = kvp("info", evil, "--json")
    assert not CONTROLS.search(outcome.out)
    assert outcome.json()["training"] == {"method": EVIL}


def test_an_answer_is_itself_in_a_pipe_and_harmless_on_a_terminal(bundle: Path, monkeypatch, kvp: Kvp) -> None:
    escape = mx.array([kvp_mlx.load(str(bundle)).tokenizer.encode("\x1b", add_special_tokens=False)[0]])
    monkeypatch.setattr("kvp_mlx.cli.options.make_sampler", lambda **_: lambda logprobs: escape)
    common = ("generate", "Hi", "--model", bundle, "--max-tokens", 3)
    assert kvp(*common).out == "\x1b\x1b\x1b\n"
    assert kvp(*common, "--json").json()["text"] == "\x1b\x1b\x1b"
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    assert kvp(*common).out == "\\x1b\\x1b\\x1b\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_fault(closed: str, bundle: Path) -> None:
    script = f"exec {sys.executable} -m kvp_mlx generate Hi --model '{bundle}' --max-tokens 2 {closed}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert b"Traceback" not in result.stderr
    for left in bundle.rglob("*.safetensors"):
        assert b"new tokens on" not in left.read_bytes()


def test_an_answer_survives_an_ascii_stream(bundle: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    document = run("generate", "Grüße", "--model", bundle, "--max-tokens", 8, "--json", env=environment)
    expected = run("generate", "Grüße", "--model", bundle, "--max-tokens", 8, "--json")
    assert json.loads(document.stdout)["text"] == json.loads(expected.stdout)["text"]
    plain = run("generate", "Grüße", "--model", bundle, "--max-tokens", 8, env=environment)
    assert plain.returncode == 0
    assert plain.stdout.isascii()
    chat = run("chat", "--model", bundle, "--max-tokens", 3, env=environment, stdin=None, input="Grüße\n".encode())
    assert chat.returncode == 0
    assert b"new tokens" in chat.stderr


def test_a_full_disk_is_a_line() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "w") as full:
        result = run("info", "--json", stdout=full, capture_output=False, stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr.count(b"\n")) == (1, 1)
    assert b"No space left" in result.stderr


@pytest.mark.parametrize("columns", ["0", "x", "1"])
def test_odd_widths(columns: str, bundle: Path) -> None:
    terminal = Terminal("chat", "--model", bundle, "--max-tokens", 2, environment={"COLUMNS": columns})
    try:
        terminal.wait_for_prompt()
        terminal.send("\x04")
        assert terminal.wait() == 0, terminal.text
        assert "Traceback" not in terminal.text
    finally:
        terminal.close()


def test_ctrl_c_ends_what_python_cannot_interrupt() -> None:
    code = (
        "import hashlib; from kvp_mlx.cli.screen import leaving_on_ctrl_c\n"
        "with leaving_on_ctrl_c():\n    print('busy', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"busy\n"
    time.sleep(0.5)  # until it is inside
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - start < 2.5
    assert (process.returncode, err) == (130, b"kvp: interrupted.\n")


def test_ctrl_c_that_python_can_handle_is_left_to_it() -> None:
    code = (
        "import time; from kvp_mlx.cli.screen import leaving_on_ctrl_c\n"
        "try:\n    with leaving_on_ctrl_c():\n        print('busy', flush=True)\n        time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(1.5)\n    print('tidy')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"busy\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, b"tidy\n")


def test_ctrl_c_that_a_library_takes_for_its_own_error_is_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt), leaving_on_ctrl_c():
        try:
            signal.raise_signal(signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            raise AttributeError("half imported") from None
    with pytest.raises(AttributeError), leaving_on_ctrl_c():
        raise AttributeError("its own")


def test_ctrl_c_leaves_nothing_half_written(tmp_path: Path) -> None:
    code = (
        "import hashlib; from pathlib import Path; from kvp_mlx.cli.screen import leaving_on_ctrl_c\n"
        "from kvp_mlx.files.directories import atomic_directory\n"
        f"with leaving_on_ctrl_c(), atomic_directory(Path({str(tmp_path / 'out')!r})) as work:\n"
        "    (work / 'part').write_text('x'); print('busy', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"busy\n"
    assert list(tmp_path.iterdir()) != []
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_told_of(bundle: Path) -> None:
    command = [sys.executable, "-m", "kvp_mlx", "generate", "Hi", "--model", str(bundle), "--max-tokens", "1"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert b"waiting for the end of standard input" in process.stderr.readline()
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.wait(30)
    assert time.monotonic() - start < 2.5
    assert (process.returncode, process.stderr.read()) == (130, b"kvp: interrupted.\n")
    process.stdin.close()
    process.stdout.close()


def test_completion_in_bash() -> None:
    shown = f"{shlex.quote(sys.executable)} -m kvp_mlx --show-completion; true"  # typer asks which shell it is run by
    told = subprocess.run(["bash", "-c", shown], capture_output=True, check=True)
    assert b"complete -o default -F _kvp_completion kvp" in told.stdout
    for words, expected in (("kvp ge", b"generate\n"), ("kvp generate --prefill ", b"kvp\nfull\nauto\n")):
        asked = {"_KVP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        assert run(env=os.environ | asked).stdout == expected


def test_stdin_that_is_no_pipe_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as null:
        monkeypatch.setattr(sys, "stdin", null)
        assert read_piped() == ""


def test_a_pipe_that_stays_open_is_told_of(bundle: Path) -> None:
    command = [sys.executable, "-m", "kvp_mlx", "generate", "Hi", "--model", str(bundle), "--max-tokens", "1"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert b"waiting for the end of standard input" in process.stderr.readline()
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_cache_that_cannot_be_written_is_told_of_once(bundle: Path) -> None:
    terminal = Terminal("chat", "--model", bundle, "--max-tokens", 2, environment={"KVP_CACHE_DIR": "/proc/none"})
    try:
        terminal.wait_for_prompt()
        for _ in range(3):
            terminal.enter("Hello")
        terminal.send("\x04")
        assert terminal.wait() == 0, terminal.text
        text = " ".join(terminal.text.split())  # lines wrap where the folder's name is long
        assert text.count("what you type is not kept") == 1
        assert text.count("will not find this conversation") == 1
        assert "Traceback" not in terminal.text
    finally:
        terminal.close()


def test_what_a_chat_keeps_is_the_users_alone(bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    terminal = Terminal("chat", "--model", bundle, "--max-tokens", 2, environment={"KVP_CACHE_DIR": str(place)})
    try:
        terminal.wait_for_prompt()
        terminal.enter("Hello")
        terminal.enter("/save mine")
        terminal.send("\x04")
        assert terminal.wait() == 0
    finally:
        terminal.close()
    kept = [place, *(path for path in place.rglob("*") if "compiled" not in path.parts)]
    assert {"chat-history", "last.json", "mine.json", "cache.safetensors"} <= {path.name for path in kept}
    assert {path.name for path in kept if path.stat().st_mode & 0o077} == set()
