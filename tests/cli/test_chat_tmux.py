"""``kvp chat`` as somebody uses it the first time, in tmux; where there is no tmux, in a pseudo-terminal alone."""

import json
import shutil

import pytest

pytest.importorskip("pty", reason="pseudo-terminals are a Unix thing")

from support.directories import prose
from support.terminal import Terminal, Tmux

import kvp_mlx


@pytest.fixture
def roomy(bundle):
    """The bundle, its base with a window of 8,192 tokens."""
    path = bundle / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 8192}))
    return bundle


def leave(chat):
    """Press Ctrl-D until the program ends: pressed before a prompt has begun, the terminal keeps it to itself."""
    for _ in range(5):
        chat.send("\x04")
        if (code := chat.wait(4)) is not None:
            return code
    return None


@pytest.mark.parametrize("place", ["tmux", "pty"])
def test_first_run_a_pasted_document_ctrl_c_and_a_resize(place, roomy, tmp_path):
    if place == "tmux" and shutil.which("tmux") is None:
        pytest.skip("tmux is not installed; the same runs in a pseudo-terminal")
    document = "\n".join(prose(12, seed) for seed in range(80))
    tokens = len(kvp_mlx.load(str(roomy)).tokenizer.encode(document))
    assert 3000 < tokens < 6000
    environment = {"KVP_CACHE_DIR": str(tmp_path / "nothing" / "yet")}
    start = Tmux if place == "tmux" else Terminal
    chat = start("chat", "--model", roomy, "--max-tokens", 40, environment=environment)
    try:
        chat.wait_for("context 0 of 8,192 tokens")
        chat.paste(document)
        chat.pause(0.5)
        chat.send("\r")
        chat.wait_for("predicted, first token after")  # the reply ended by itself, or is stopped below
        chat.resize(60, 20)
        chat.send("/stats")
        chat.send("\r")
        chat.wait_for("peak memory")
        chat.send("Tell me more of it, please")
        chat.send("\r")
        chat.send("\x03")
        chat.send("/quality")
        chat.send("\r")
        chat.wait_for("quality: balanced")
        chat.resize(120, 40)
        assert leave(chat) == 0, chat.text[-2000:]
        assert "Traceback" not in chat.text
    finally:
        chat.close()


@pytest.mark.parametrize("place", ["tmux", "pty"])
def test_ctrl_c_stops_a_reply_and_what_came_of_it_stays(place, roomy, tmp_path):
    if place == "tmux" and shutil.which("tmux") is None:
        pytest.skip("tmux is not installed; the same runs in a pseudo-terminal")
    start = Tmux if place == "tmux" else Terminal
    # the tiny model soon repeats one token, and would for all of 6,000
    chat = start("chat", "--model", roomy, "--max-tokens", 6000, environment={"KVP_CACHE_DIR": str(tmp_path)})
    try:
        chat.wait_for("context 0 of 8,192 tokens")
        for attempt in range(10):  # a stop may come before the reply has begun, the more so on a busy machine
            chat.send("Hello")
            chat.send("\r")
            chat.pause(0.5 + attempt)
            chat.send("\x03")
            chat.pause(1)
            if "[stopped]" in chat.text:
                break
        chat.wait_for("[stopped]")
        chat.send("/stats")
        chat.send("\r")
        chat.wait_for("peak memory")
        assert leave(chat) == 0, chat.text[-2000:]
    finally:
        chat.close()
