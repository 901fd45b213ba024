"""A server under clients good and bad for as long as one likes, then ended, killed and started again.

``make soak MINUTES=20`` runs it on the default model; ``test_soak.py`` for seconds on a tiny one.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# isort: off
import kvp_mlx  # noqa: F401 - before all that imports mlx: it puts the fast BLAS in front
# isort: on

import httpx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support.directories import TEXT, prose
from support.scheduling import plain

from kvp_mlx.bundle.loading import load_any

KEY = "right-key"
HEADERS = {"x-api-key": KEY}
ANSWER_TOKENS = 12
TIMEOUT_SECONDS = 180.0
CALL: dict[str, Any] = {"timeout": TIMEOUT_SECONDS, "verify": False}  # reading certificates would take a core
WARM_SECONDS = 600.0
"""Shorter runs are warm-up in most of their length: caches, queues and the allocator still grow."""
MAX_BODY_MIB = 0.25
PLAIN_LINES = re.compile(r"loading |.* predictor|^$")
"""What a server may say on stderr."""
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/v1/messages/count_tokens")

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Known:
    """A conversation, and what mlx-lm answers to it at temperature 0."""

    messages: Messages
    answer: str


@dataclass
class Report:
    """What happened; ``failures`` should stay empty."""

    done: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)  # resident, and what contexts take of it, MiB
    told: dict[str, Any] = field(default_factory=dict)

    def check(self, holds: bool, what: str) -> None:
        """Note a failure."""
        if not holds:
            self.failures.append(what)


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    process: subprocess.Popen[str]
    url: str

    def rss_mib(self) -> float:
        """Return its resident memory."""
        return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(self.process.pid)])) / 1024

    def statistics(self) -> dict[str, float]:
        """Return the numbers of ``/metrics``."""
        lines = httpx.get(f"{self.url}/metrics", headers=HEADERS, **CALL).text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("kvp_")]
        return {name.removeprefix("kvp_"): float(value) for name, value in pairs}


@contextlib.contextmanager
def started(model: str, place: Path, cache_mib: float) -> Iterator[Server]:
    """Start a server; in ``place`` are its caches, and what it says of errors goes to the end of ``log.txt``."""
    log = place / "log.txt"
    options = {"--port": 0, "--cache-gib": cache_mib / 1024, "--max-body-mib": MAX_BODY_MIB}
    options["--cache-dir"] = place / "caches"
    command = [sys.executable, "-m", "kvp_mlx", "serve", "--model", model, *map(str, sum(options.items(), ()))]
    with log.open("a") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | {"KVP_API_KEY": KEY}
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving "), log.read_text()
        yield Server(process, line.split()[-1])
    finally:
        process.kill()
        process.wait(30)


def known_conversations(model: str) -> list[Known]:
    """Return conversations whose turns share their beginnings, with mlx-lm's own answers."""
    loaded = load_any(model)
    tokenizer = loaded.text_tokenizer
    conversations = []
    for seed in range(3):
        messages: Messages = [{"role": "system", "content": f"Answer from this text.\n{prose(250, seed)}"}]
        for question in ("What lies below the town?", "Who trims the lamp?", "And in winter?"):
            messages = [*messages, {"role": "user", "content": question}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            answer = text_of(tokenizer, plain(loaded.base, ids, ANSWER_TOKENS))
            conversations.append(Known(messages, answer))
            messages = [*messages, {"role": "assistant", "content": TEXT[: 40 + 30 * seed]}]
    return conversations


def text_of(tokenizer: TokenizerWrapper, tokens: list[int]) -> str:
    """Return generated tokens as text, up to the end token."""
    detokenizer = tokenizer.detokenizer
    for token in tokens:
        if token in tokenizer.eos_token_ids:
            break
        detokenizer.add_token(token)
    detokenizer.finalize()
    return str(detokenizer.text)


# Clients: each function is one visit, which notes what went wrong


@dataclass
class Visitor:
    """A client with chances of its own."""

    server: Server
    known: list[Known]
    report: Report
    chance: random.Random

    def post(self, route: str, body: Any, **options: Any) -> httpx.Response:
        """Send a body that is JSON and read the whole answer."""
        headers = options.pop("headers", HEADERS)
        return httpx.post(self.server.url + route, json=body, headers=headers, **CALL, **options)

    def good(self) -> None:
        """Ask what is known, by either API, streamed or not."""
        known, streams = self.chance.choice(self.known), self.chance.random() < 0.5
        if self.chance.random() < 0.5:
            answer = self.openai(known.messages, streams)
        else:
            answer = self.anthropic(known.messages, streams)
        self.report.check(answer == known.answer, f"a wrong answer: {answer!r}, not {known.answer!r}")

    def openai(self, messages: Messages, streams: bool) -> str:
        """Return the answer of OpenAI's route."""
        body = {"messages": messages, "max_tokens": ANSWER_TOKENS, "stream": streams, "kvp": {"path": "full"}}
        response = self.post("/v1/chat/completions", body)
        response.raise_for_status()
        if not streams:
            return str(response.json()["choices"][0]["message"]["content"])
        return "".join(delta_of(event) for event in events_of(response.text))

    def anthropic(self, messages: Messages, streams: bool) -> str:
        """Return the answer of Anthropic's route."""
        body: dict[str, Any] = {"max_tokens": ANSWER_TOKENS, "stream": streams, "kvp": {"path": "full"}}
        body |= {"system": messages[0]["content"], "messages": messages[1:]}
        response = self.post("/v1/messages", body)
        response.raise_for_status()
        if not streams:
            return "".join(block["text"] for block in response.json()["content"])
        return "".join(event.get("delta", {}).get("text", "") for event in events_of(response.text))

    def predicting(self) -> None:
        """Ask something new, read as the server likes."""
        body = {"messages": self.fresh(), "max_tokens": 8}
        usage = self.post("/v1/chat/completions", body).raise_for_status().json()["usage"]
        self.report.check(usage["completion_tokens"] > 0, "an answer of nothing")

    def fresh(self) -> Messages:
        """Return a conversation that nobody had before."""
        text = prose(self.chance.randrange(20, 300), self.chance.randrange(10**9))
        return [{"role": "user", "content": text}]

    def slow(self) -> None:
        """Take a long answer in small sips."""
        small = httpx.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)])
        body = {"messages": self.fresh(), "max_tokens": 150, "stream": True}
        pieces = []
        with (
            httpx.Client(transport=small, **CALL, headers=HEADERS) as client,
            client.stream("POST", f"{self.server.url}/v1/chat/completions", json=body) as response,
        ):
            for piece in response.iter_raw(512):
                pieces.append(piece)
                time.sleep(0.01)
        self.report.check(b"".join(pieces).endswith(b"data: [DONE]\n\n"), "a slow reader's answer had no end")

    def vanishing(self) -> None:
        """Go away while the prompt is sent or read, or amid the answer."""
        body = json.dumps({"messages": self.fresh(), "max_tokens": 2000, "stream": self.chance.random() < 0.7}).encode()
        head = request_head(self.server.url, "/v1/chat/completions", len(body))
        with connection(self.server.url) as open_socket:
            open_socket.sendall(head + body[: len(body) if self.chance.random() < 0.8 else len(body) // 2])
            open_socket.settimeout(self.chance.random() * 2)
            with contextlib.suppress(TimeoutError):
                open_socket.recv(self.chance.randrange(1, 4000))

    def malformed(self) -> None:
        """Send a body that is none."""
        route = self.chance.choice(ROUTES)
        bodies: list[bytes] = [
            *(b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": 7}', b'{"messages": [{}]}', b"[" * 100_000),
            *(b'{"prompt": 1e999}', b'{"messages": [{"role": "user", "content": null}], "max_tokens": -7}'),
            json.dumps({"messages": self.fresh(), "prompt": {}, "input": {}, "model": {}}).encode(),
            b'{"messages": "' + b"x" * int(MAX_BODY_MIB * 2**20) + b'"}',
        ]
        self.refused(route, self.chance.choice(bodies), HEADERS, (400, 413))

    def uninvited(self) -> None:
        """Bring the wrong key, none, or the wrong Host."""
        wrong: list[tuple[dict[str, str], int]] = [
            ({}, 401),
            ({"x-api-key": KEY[:-1]}, 401),
            ({"authorization": "Bearer sesame"}, 401),
            ({"authorization": KEY}, 401),
            (HEADERS | {"host": "rebound.example"}, 403),
        ]
        headers, status = self.chance.choice(wrong)
        self.refused(self.chance.choice(ROUTES), b"{}", headers, (status,))

    def refused(self, route: str, body: bytes, headers: dict[str, str], expected: tuple[int, ...]) -> None:
        """Send what has to be refused in the API's own way."""
        response = httpx.post(self.server.url + route, content=body, headers=headers, **CALL)
        self.report.check(response.status_code in expected, f"{route} {body[:60]!r}: {response.status_code}")
        self.report.check(bool(response.json()["error"]["message"]), f"{route} {body[:60]!r}: no message")


VISITS: tuple[Callable[[Visitor], None], ...] = (
    *(Visitor.good, Visitor.good, Visitor.predicting, Visitor.slow),
    *(Visitor.vanishing, Visitor.vanishing, Visitor.malformed, Visitor.uninvited),
)
"""What each of the eight clients does all the time."""
UNWELCOME = VISITS[4:]
"""These leave time for others: what they may cost is bounded, but not nothing."""


def connection(url: str) -> socket.socket:
    """Return a connection to a server."""
    place = urlsplit(url)
    return socket.create_connection((str(place.hostname), int(place.port or 0)), timeout=TIMEOUT_SECONDS)


def request_head(url: str, route: str, length: int) -> bytes:
    """Return a POST request up to its body."""
    place = urlsplit(url).netloc
    return f"POST {route} HTTP/1.1\r\nhost: {place}\r\nx-api-key: {KEY}\r\ncontent-length: {length}\r\n\r\n".encode()


def events_of(text: str) -> list[dict[str, Any]]:
    """Return the data of server-sent events."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(each) for each in data if each != "[DONE]"]


def delta_of(event: dict[str, Any]) -> str:
    """Return the text that a chunk of OpenAI's adds."""
    return "".join(choice["delta"].get("content") or "" for choice in event.get("choices", []))


# The run


def soak(model: str, seconds: float, place: Path, cache_mib: float) -> Report:
    """Run everything; ``place`` is an empty directory, ``cache_mib`` what contexts may take: soon full, so flat."""
    report, server_options = Report(), (model, place, cache_mib)
    known = known_conversations(model)
    with started(*server_options) as server:
        load(server, known, report, seconds)
        settle(server, report)
        end_in_order(server, known, report)
    saved = len(list(place.glob("caches/*/cache.json")))
    report.check(saved > 0, "nothing was saved at the end")
    with started(*server_options) as server:
        report.told["after SIGTERM"] = serves_what_was_saved(server, known[-1], report)
        kill_at_work(server, known, report)
    with started(*server_options) as server:
        report.told["after kill -9"] = serves_what_was_saved(server, known[-1], report)
    lines = [line for line in (place / "log.txt").read_text().splitlines() if not PLAIN_LINES.match(line)]
    report.check(not lines, f"the log: {lines[:20]}")
    report.told |= {"saved": saved}
    return report


def load(server: Server, known: list[Known], report: Report, seconds: float) -> None:
    """Let eight clients visit for a while, and watch the memory."""
    end = time.monotonic() + seconds

    def run(number: int) -> None:
        visitor = Visitor(server, known, report, random.Random(number))
        visit = VISITS[number]
        while time.monotonic() < end:
            try:
                visit(visitor)
            except Exception as error:
                report.failures.append(f"{visit.__name__}: {type(error).__name__} {error}"[:300])
            report.done[visit.__name__] += 1
            if visit in UNWELCOME:
                time.sleep(visitor.chance.random())

    clients = [threading.Thread(target=run, args=[number], daemon=True) for number in range(len(VISITS))]
    for client in clients:
        client.start()
    while time.monotonic() < end:
        time.sleep(min(1.0, seconds / 20))
        report.memory.append((server.rss_mib(), server.statistics()["cached_bytes"] / 2**20))
    for client in clients:
        client.join(TIMEOUT_SECONDS)
    report.check(not any(client.is_alive() for client in clients), "a request was stuck")
    check_memory(report, seconds)


def check_memory(report: Report, seconds: float) -> None:
    """Compare the last quarter with the second one: the first is warm-up, and contexts may take what they are given."""
    quarter = len(report.memory) // 4
    before, after = (
        np.median(part, axis=0) for part in (report.memory[quarter : 2 * quarter], report.memory[-quarter:])
    )
    growth, growth_of_contexts = after - before
    report.told["memory"] = [(round(rss), round(cached)) for rss, cached in report.memory[:: max(1, quarter // 3)]]
    share = 0.03 if seconds >= WARM_SECONDS else 0.3
    allowed = 32 + share * before[0] + 2 * max(0.0, growth_of_contexts)
    report.check(growth < allowed, f"memory grew by {growth:.0f} MiB, more than {allowed:.0f}")


def settle(server: Server, report: Report) -> None:
    """Wait until nothing is at work any more."""
    names = ("waiting", "reading", "running")
    for _ in range(300):
        now = server.statistics()
        if not any(now[name] for name in names):
            report.told["finished"] = now["finished"]
            return
        time.sleep(0.1)
    report.failures.append(f"work never ended: {now}")


def end_in_order(server: Server, known: list[Known], report: Report) -> None:
    """Send SIGTERM while answers run: each ends or is told, and the server exits with 0."""
    ask_known(server, known[-1])
    answers: list[str] = []
    body = {"messages": known[0].messages, "max_tokens": 2000, "stream": True}

    def read() -> None:
        with contextlib.suppress(httpx.HTTPError):
            url = f"{server.url}/v1/chat/completions"
            answers.append(httpx.post(url, json=body, headers=HEADERS, **CALL).text)

    readers = [threading.Thread(target=read, daemon=True) for _ in range(4)]
    for reader in readers:
        reader.start()
    while not server.statistics()["running"]:
        time.sleep(0.02)
    server.process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(60)
    report.check(server.process.poll() == 0, f"the server ended with {server.process.poll()}")
    for reader in readers:
        reader.join(30)
    told = ["[DONE]" if text.endswith("[DONE]\n\n") else "shutting_down" in text and "told" for text in answers]
    report.told["ended"] = Counter(map(str, told))
    report.check(len(told) == len(readers) and all(told), f"answers were cut off at the end: {told}")


def ask_known(server: Server, known: Known) -> dict[str, Any]:
    """Return the server's answer, as OpenAI's API tells it, to what is known."""
    body = {"messages": known.messages, "max_tokens": ANSWER_TOKENS, "kvp": {"path": "full"}}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=HEADERS, **CALL)
    told: dict[str, Any] = response.raise_for_status().json()
    return told


def serves_what_was_saved(server: Server, known: Known, report: Report) -> dict[str, int]:
    """Ask what was asked before the last start; most of its prompt has to be there."""
    answer = ask_known(server, known)
    usage = answer["usage"]
    cached, prompt = usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]
    report.check(cached > prompt / 2, f"of {prompt} tokens only {cached} were saved")
    report.check(answer["choices"][0]["message"]["content"] == known.answer, "another answer from what was saved")
    return {"prompt_tokens": prompt, "cached_tokens": cached}


def kill_at_work(server: Server, known: list[Known], report: Report) -> None:
    """Let a conversation be saved, then kill the server while it reads, decodes and saves others."""
    for _ in range(300):
        if server.statistics()["saved_bytes"]:
            break
        time.sleep(0.1)
    visitors = [Visitor(server, known, Report(), random.Random(seed)) for seed in range(4)]

    def visit(visitor: Visitor) -> None:
        with contextlib.suppress(httpx.HTTPError):
            while True:
                visitor.predicting()

    for visitor in visitors:
        threading.Thread(target=visit, args=[visitor], daemon=True).start()
    time.sleep(1.5)
    server.process.kill()
    report.check(server.process.wait(30) == -signal.SIGKILL, "the server did not let itself be killed")


def main() -> None:
    """Run it as told, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cache-mib", type=float, default=128.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        report = soak(arguments.model, 60 * arguments.minutes, Path(place), arguments.cache_mib)
    print(json.dumps({"done": report.done, **report.told, "failures": report.failures[:50]}, indent=1))
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
