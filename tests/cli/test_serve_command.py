"""``kvp serve`` as it is started, asked and ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Kvp
from support.chat_models import write_tool_model

from kvp_mlx.cli.serve import served_name

HELLO = {"max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tool_model(tmp_path_factory.mktemp("served") / "tiny", max_position_embeddings=100_000)


@contextmanager
def started(model: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Start a server on a free port; yields its process and URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvp_mlx", "serve", "--model", str(model), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving tiny at http://127.0.0.1:"), line + process.stderr.read()
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait(30)


def ask(url: str, body: dict | None = None, **headers: str) -> bytes:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
        return answer.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_starts_answers_and_ends(number: int, model: Path, tmp_path: Path) -> None:
    with started(model, "--cache-dir", str(tmp_path / "caches"), KVP_API_KEY="secret") as (process, url):
        assert json.loads(ask(f"{url}/health"))["model"] == "tiny"
        with pytest.raises(urllib.request.HTTPError):
            ask(f"{url}/v1/messages", HELLO)
        answer = json.loads(ask(f"{url}/v1/messages", HELLO, x_api_key="secret"))
        assert answer["usage"]["output_tokens"] == 2
        process.send_signal(number)
        assert process.wait(30) == 0
        errors = process.stderr.read()
    assert "secret" not in errors
    assert "Traceback" not in errors
    assert not errors or all("predictor" in line or line.startswith("loading ") for line in errors.splitlines())


def test_a_second_signal_ends_what_still_runs(model: Path) -> None:
    with started(model) as (process, url):
        body = json.dumps({**HELLO, "max_tokens": 90_000, "stream": True}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/messages", body), timeout=60) as answer:
            assert answer.readline() == b"event: message_start\n"
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            lines = answer.read().decode().splitlines()
        assert process.wait(30) == 0
        assert "event: error" in lines
        assert "Traceback" not in process.stderr.read()


def test_what_cannot_be_served_is_one_line(model: Path, kvp: Kvp) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = kvp("serve", "--model", model, "--port", port)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"kvp: cannot listen on 127.0.0.1, port {port}: address already in use")
    for arguments, told in (
        (("--host", "0.0.0.0"), "set a key"),
        (("--host", "::"), "set a key"),
        (("--host", "192.168.1.2"), "set a key"),
        (("--host", "no.such.host.example", "--api-key", "x"), "cannot listen on no.such.host.example"),
        (("--host", "192.0.2.1", "--api-key", "x"), "cannot listen on 192.0.2.1"),
        (("--api-key", " "), "--api-key is empty"),
        (("--port", "65536"), "--port"),
        (("--quality", "superb"), "--quality"),
        (("--model", "/no/such/model", "--port", "0"), "/no/such/model"),
    ):
        outcome = kvp("serve", *arguments)
        assert (outcome.code, outcome.out) == (2, ""), arguments
        assert told in outcome.err
        assert len(outcome.err.splitlines()) == 1, outcome.err


def test_clients_see_a_name_and_no_path(model: Path) -> None:
    assert served_name(str(model)) == served_name(f"{model}/") == "tiny"
    assert served_name("smollm2-135m") == "smollm2-135m"
    assert served_name("OWNER/NAME") == "OWNER/NAME"
