"""``kvp chat`` in a pseudo-terminal: two hundred random turns, then what it saved against full prefill."""

import json
import random
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("pty", reason="pseudo-terminals are a Unix thing")

from support.directories import TEXT
from support.terminal import Terminal

import kvp_mlx
from kvp_mlx.engine.prefill import base_prefill
from kvp_mlx.engine.saved_caches import load_cache
from kvp_mlx.engine.transcripts import load_conversation

STEPS = 200
WARM_UP_STEPS = 60


@pytest.fixture
def chat(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("KVP_CACHE_DIR", str(tmp_path / "cache"))
    opened = []

    def start(*arguments, **environment):
        opened.append(Terminal("chat", "--model", bundle, "--max-tokens", 8, *arguments, environment=environment))
        opened[-1].wait_for_prompt()
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def random_step(rng, terminal):
    """Do one thing that a user might do."""
    words = " ".join(rng.choices(TEXT.split(), k=rng.randrange(1, 30)))
    step = rng.choice(
        ["say"] * 6 + ["paste", "paste", "stop", "stop", "edit", "regenerate", "command", "keys", "resize"]
    )
    if step == "say":
        terminal.enter(words)
    elif step == "paste":
        terminal.paste(f"{words}\n\n{words}\n")
        terminal.enter("What of it?")
    elif step == "stop":
        terminal.prompts = terminal.output.count(b"\x1b[?2004h")
        terminal.send(f"{TEXT}\r")
        time.sleep(rng.random() * 0.05)
        terminal.send("\x03")
        terminal.wait_for_prompt()
        terminal.read(0.05)
    elif step == "edit":
        terminal.enter(f"/edit {words}")
    elif step == "regenerate":
        terminal.enter(f"/regenerate {rng.choice(['', '1.0'])}")
    elif step == "command":
        commands = ["/help", "/stats", "/quality fast", "/quality balanced", "/quality exact", "/refine", "/refine on"]
        commands += ["/save a", "/load a", "/clear", "/nonsense", "/file /no/such/file", "/edit", "/save ../x"]
        terminal.enter(rng.choice(commands))
    elif step == "keys":
        terminal.send(rng.choice(["hello\x03", "\x1b[A\x1b[B\x03", "a\x1b\rb\x03", "\t\x15\x03"]))
        terminal.read(0.05)
    else:
        terminal.resize(rng.randrange(20, 140), rng.randrange(5, 50))


@pytest.mark.long
def test_two_hundred_random_turns(chat, bundle):
    rng, terminal, resident = random.Random(1), chat(), []
    for number in range(STEPS):
        random_step(rng, terminal)
        assert terminal.process.poll() is None, terminal.text[-2000:]
        if number >= WARM_UP_STEPS and sys.platform == "linux":
            resident.append(terminal.resident_bytes())
    terminal.settle()
    terminal.send("\x03")  # whatever is left on the line
    terminal.settle()
    for command in ("/quality balanced", "/refine off", "The end of it.", "/save end"):
        terminal.enter(command)
    terminal.wait_for("saved as 'end'")
    terminal.send("\x04")
    assert terminal.wait() == 0, terminal.text[-2000:]
    for trace in ("Traceback", "Error:", "please report", "refinement failed", "terminate called"):
        assert trace not in terminal.text
    if resident:
        half = len(resident) // 2
        growth = np.median(resident[half:]) - np.median(resident[:half])
        assert growth < 20e6, f"{growth / 1e6:.1f} MB more in the second half"
    check_saved(bundle, "end")


def check_saved(bundle, name):
    """A saved conversation's tokens are its transcript's, and its exact entries full prefill's."""
    model = kvp_mlx.load(str(bundle))
    saved, context = load_cache(model, f"chat-{name}")
    messages, first = load_conversation(name)
    assert messages[-1]["role"] == "assistant"
    rendered = model.tokenizer.apply_chat_template(messages[first:])
    shared = min(len(rendered), len(saved.tokens)) - 8  # the reply's end may be cut in the middle of a character
    assert list(saved.tokens[:shared]) == rendered[:shared]
    exact = saved.exact_tokens
    if exact:
        true = base_prefill(model, mx.array([saved.tokens[:exact]]))
        for mine, expected in zip(context.cache, true, strict=True):
            for a, b in zip(mine.keys_and_values(), expected.keys_and_values(), strict=True):
                np.testing.assert_allclose(a[:, :, :exact], b, atol=1e-4)


def test_refinement_goes_on_while_nothing_is_typed(chat, bundle):
    terminal = chat("--prefill", "kvp", "--exact-tail", 0)
    terminal.enter(TEXT)
    for _ in range(50):
        if "100% exact, refined" in terminal.text:
            break
        time.sleep(0.1)
        terminal.enter("/stats")
    terminal.enter("/save refined")
    terminal.enter("/refine off")
    terminal.enter(TEXT)
    terminal.enter("/stats")
    saved, _ = load_cache(kvp_mlx.load(str(bundle)), "chat-refined")
    assert saved.is_exact
    check_saved(bundle, "refined")


def test_a_signal_before_the_editor_is_ready_or_after_it_is_ignored(chat):
    terminal = chat()
    for _ in range(20):
        terminal.process.send_signal(signal.SIGINT)
        time.sleep(0.002)
    terminal.read(0.5)
    terminal.enter("/stats")
    terminal.send("\x04")
    assert terminal.wait() == 0, terminal.text[-2000:]
    assert "Exception" not in terminal.text


def test_ctrl_c_while_a_prompt_is_read_leaves_the_conversation_as_it_was(chat):
    terminal = chat()
    terminal.enter("Hello")
    terminal.enter("/save before")
    for _ in range(5):
        terminal.send(f"{TEXT}\r\x03")
        terminal.read(0.3)
    terminal.enter("/stats")
    terminal.enter("And now?")
    terminal.settle()
    terminal.send("\x04")
    assert terminal.wait() == 0


def test_the_last_conversation_survives_a_kill(chat):
    terminal = chat()
    terminal.enter("Remember the lighthouse")
    terminal.process.kill()
    terminal.process.wait()
    again = chat()
    again.enter("/load last")
    assert "'last': 1 turn\r" in again.text
    again.send("/edit\r")
    again.wait_for("/edit Remember the lighthouse")


def test_no_colour_and_a_dumb_terminal(chat):
    terminal = chat(NO_COLOR="1")
    terminal.enter("Hello")
    assert b"\x1b[3" not in terminal.output.replace(b"\x1b[39m", b"")


def test_a_dumb_terminal_gets_plain_lines(bundle):
    terminal = Terminal("chat", "--model", bundle, "--max-tokens", 4, environment={"TERM": "dumb"})
    try:
        terminal.wait_for("> ")
        terminal.send("Hello\n")
        terminal.wait_for("new tokens on 0 cached")
        terminal.send("\x04")
        assert terminal.wait() == 0
        assert b"\x1b" not in terminal.output
    finally:
        terminal.close()


def test_a_pipe_that_nobody_reads_ends_the_chat(bundle):
    command = [sys.executable, "-m", "kvp_mlx", "chat", "--model", str(bundle), "--max-tokens", "4"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        process.stdin.write(b"Hello\n" * 50)
        process.stdin.close()
        said = process.stderr.read().decode()
        assert process.wait(60) == 1
    assert "report it" not in said and said.count("new tokens") <= 1


def test_status_of_a_pipe_is_json_free_text(bundle, kvp):
    outcome = kvp("chat", "--model", bundle, "--max-tokens", 4, stdin=b"Hello\n/stats\n/quality\n/nope\n")
    assert outcome.code == 0
    assert "quality: balanced" in outcome.err
    assert "there is no command /nope" in outcome.err
    assert "new tokens" not in outcome.out
    with pytest.raises(json.JSONDecodeError):
        json.loads(outcome.err)
