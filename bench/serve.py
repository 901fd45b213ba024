"""``kvp serve`` beside ``mlx_lm.server`` through HTTP: time to first token, and tokens per second of several clients.

Requests are interleaved, and whoever is not asked stands still (SIGSTOP): our server would refine what it predicted.
"""

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import save_config, save_model

from ..bundle.loading import KVPModel
from ..engine.prompt import render
from ..errors import InputError, KVPError
from ..files import remove_unfinished
from .document import heading
from .precision import precision_name
from .ttft import fresh_prompt, quartiles

MLX_LM: Final = "mlx-lm-server"
ARMS: Final = ("auto", "full", MLX_LM)
"""Those that are asked unless others are named."""
PATHS: Final[dict[str, dict[str, str]]] = {"auto": {}, "kvp": {"path": "kvp"}, "full": {"path": "full"}}
"""What the arms on our server ask for, beside a quality; ``auto`` is a client who names no path."""
MLX_LM_SERVER: Final = "import kvp_mlx; from mlx_lm.server import main; main()"
"""``mlx_lm.server`` behind the fast BLAS that importing this package loads first; on Linux it is 30 times slower
without."""
FIRST_TOKENS = 2
START_SECONDS, ANSWER_SECONDS, END_SECONDS = 180.0, 600.0, 30.0


@dataclass(frozen=True)
class ServeSweep:
    """What to measure.

    Attributes:
        prompt_tokens: lengths of the prompts whose first token is timed; the shortest is used with several clients.
        clients: how many ask at once where tokens per second are counted.
        arms: of ``PATHS``, or mlx-lm's server.
        rounds: measured; one more is run first and discarded.
        new_tokens: of the answers that are counted.
        quality: of the arms ``auto`` and ``kvp``.
    """

    prompt_tokens: list[int]
    clients: list[int]
    arms: list[str]
    rounds: int
    new_tokens: int
    quality: str


@dataclass(frozen=True)
class Subject:
    """A model that is served.

    Attributes:
        name: what ``kvp serve`` calls it.
        weights: its base as an mlx-lm directory, in the precision that we compute in, for ``mlx_lm.server``.
        precision: of both.
        tokenizer: its own.
        text_ids: real text as token ids.
    """

    name: str
    weights: Path
    precision: str
    tokenizer: TokenizerWrapper
    text_ids: list[int]

    def message(self, tokens: int, number: int) -> str:
        """Return the ``number``-th user's message that makes a prompt of about so many tokens, and like no other."""
        frame = len(render(self.tokenizer, [{"role": "user", "content": ""}]))
        return str(self.tokenizer.decode(fresh_prompt(self.text_ids, max(1, tokens - frame), number)))


@dataclass(frozen=True)
class Reply:
    """One streamed answer, by the client's clock.

    ``engine_ms`` is the clock of ``kvp generate``, from the token ids to the first token, and ``path`` how the prompt
    was read, where the server tells it.
    """

    ttft_ms: float
    engine_ms: float | None
    path: str | None
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Server:
    """A server that runs on this machine."""

    process: "subprocess.Popen[bytes]"
    port: int

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Let it run for as long as the block lasts."""
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def ask(self, message: str, max_tokens: int, kvp: dict[str, str] | None) -> Reply:
        """Send one user's message and read the streamed answer to its end.

        Raises:
            KVPError: another answer than tokens.
        """
        body: dict[str, Any] = {"messages": [{"role": "user", "content": message}], "max_tokens": max_tokens}
        body |= {"temperature": 0.0, "stream": True, "stream_options": {"include_usage": True}}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        start, first, usage = time.perf_counter(), None, None
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            connection.request(
                "POST", "/v1/chat/completions", json.dumps(body | ({"kvp": kvp} if kvp else {})), headers
            )
            response = connection.getresponse()
            if response.status != 200:
                raise KVPError(f"a server answered {response.status}: {response.read(300).decode(errors='replace')}")
            for line in response:
                event = json.loads(line[6:]) if line.startswith(b"data: {") else {}
                if first is None and any(map(_tells, event.get("choices", []))):
                    first = time.perf_counter()
                usage = event.get("usage") or usage
        if first is None or usage is None:
            raise KVPError("a server's answer ended early; see what it needs with 'kvp serve --verbose'.")
        told, ttft_ms = usage.get("kvp", {}), 1e3 * (first - start)
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        counts = usage["prompt_tokens"], cached, usage["completion_tokens"]
        return Reply(ttft_ms, told.get("ttft_ms"), told.get("path"), *counts)


def _tells(choice: dict[str, Any]) -> bool:
    return bool(choice["delta"].get("content") or choice["delta"].get("reasoning") or choice["finish_reason"])


def write_subject(model: KVPModel, name: str, text_ids: list[int], directory: Path) -> Subject:
    """Write a model's base for ``mlx_lm.server`` as it computes here, and return what is needed beside.

    Raises:
        InputError: it has no chat template.
    """
    tokenizer = model.text_tokenizer
    if not tokenizer.has_chat_template:
        raise InputError(f"{name} has no chat template, and this asks for chat completions; choose another model.")
    save_model(directory, model.base)
    config, precision = dict(model.base_config), precision_name(model)
    if "bit" not in precision:
        config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    save_config(config, directory / "config.json")
    tokenizer.save_pretrained(str(directory))
    return Subject(name, directory, precision, tokenizer, text_ids)


def check_serve_sweep(sweep: ServeSweep, model: KVPModel) -> None:
    """Refuse what cannot be run.

    Raises:
        InputError: an unknown arm, no predictor for one, or prompts and answers beyond the context window.
    """
    if unknown := [arm for arm in sweep.arms if arm not in (*PATHS, MLX_LM)]:
        raise InputError(f"there is no arm {unknown[0]} here; choose among {', '.join([*PATHS, MLX_LM])}.")
    predicting = [arm for arm in sweep.arms if arm in PATHS and arm != "full"]
    if predicting and not model.config.has_predictor:
        raise InputError(f"this model has no predictor; leave the arm {predicting[0]} out.")
    longest, window = max(sweep.prompt_tokens) + sweep.new_tokens, model.context_length
    if window is not None and longest >= window:
        raise InputError(f"{longest} tokens of prompt and answer do not fit the context window of {window}.")


def measure_serving(
    subject: Subject, sweep: ServeSweep, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Start the servers, ask them, and return the JSON document.

    Args:
        subject: what they serve.
        sweep: see ``check_serve_sweep``.
        progress: called with (rounds done, rounds in all).

    Raises:
        KVPError: a server that does not start, or fails at a request.
    """
    tasks: list[tuple[int, int | None]] = [(tokens, None) for tokens in sweep.prompt_tokens]
    tasks += [(min(sweep.prompt_tokens), clients) for clients in sweep.clients]
    steps, total = itertools.count(1), len(tasks) * (sweep.rounds + 1)
    fresh = itertools.count(step=len(PATHS) * max(sweep.clients))  # numbers of prompts
    rows: list[dict[str, Any]] = []
    with running(subject, sweep.arms) as servers:
        for tokens, clients in tasks:
            found: dict[str, list[Round]] = {arm: [] for arm in sweep.arms}
            for number in itertools.islice(fresh, sweep.rounds + 1):
                for arm in sweep.arms:
                    found[arm].append(ask_once(subject, sweep, servers[arm], arm, tokens, clients, number))
                progress(next(steps), total)
            rows += rows_of({arm: rounds[1:] for arm, rounds in found.items()}, tokens, clients, sweep)
    return heading(subject.name, subject.precision) | {
        "rounds": sweep.rounds,
        "quality": sweep.quality,
        "rows": rows,
    }


@dataclass(frozen=True)
class Round:
    """What all clients of one arm got at once, and how long it took."""

    replies: list[Reply]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of all clients, reading included."""
        return sum(reply.new_tokens for reply in self.replies) / self.seconds


def ask_once(
    subject: Subject, sweep: ServeSweep, server: Server, arm: str, tokens: int, clients: int | None, number: int
) -> Round:
    """Let one client, or several at once, ask from the ``number``-th prompt on what nobody asked this server before.

    ``full`` and mlx-lm's server, which share no cache, get the same prompts, so their answers have the same lengths.
    """
    count, kvp = clients or 1, kvp_field(arm, sweep.quality)
    first = number + max(sweep.clients) * {"auto": 1, "kvp": 2}.get(arm, 0)
    messages = [subject.message(tokens, first + client) for client in range(count)]
    max_tokens = FIRST_TOKENS if clients is None else sweep.new_tokens
    with server.at_work(), ThreadPoolExecutor(count) as pool:
        start = time.perf_counter()
        replies = list(pool.map(lambda message: server.ask(message, max_tokens, kvp), messages))
        return Round(replies, time.perf_counter() - start)


def kvp_field(arm: str, quality: str) -> dict[str, str] | None:
    """Return what tells our server which path to take."""
    if arm not in PATHS:
        return None
    return PATHS[arm] | ({} if arm == "full" else {"quality": quality})


def rows_of(found: dict[str, list[Round]], tokens: int, clients: int | None, sweep: ServeSweep) -> list[dict[str, Any]]:
    """Return the arms' rows; ``clients`` None: first tokens alone.

    ``http_ms`` is all that a client who asks alone waits beyond the engine's clock: connection, body, template and
    tokeniser, the hand-over between threads, and the way back. Of several, most would be waiting for each other.
    """
    rows: list[dict[str, Any]] = []
    for arm, rounds in found.items():
        replies = [reply for each in rounds for reply in each.replies]
        timed = [(reply.ttft_ms, reply.engine_ms) for reply in replies if reply.engine_ms is not None]
        is_alone = clients in (None, 1)
        row: dict[str, Any] = {
            "arm": arm,
            "paths": sorted({reply.path for reply in replies if reply.path is not None}),
            "prompt_tokens": tokens,
            "read_tokens": statistics.median(reply.prompt_tokens - reply.cached_tokens for reply in replies),
            "clients": clients or 1,
            "ttft_ms": quartiles([reply.ttft_ms for reply in replies]),
            "engine_ms": quartiles([engine for _, engine in timed]) if timed else None,
            "http_ms": quartiles([whole - engine for whole, engine in timed]) if timed and is_alone else None,
            "new_tokens": None if clients is None else sweep.new_tokens,
            "tps": None if clients is None else quartiles([each.tokens_per_second for each in rounds]),
        }
        rows.append(row)
    theirs = next((row for row in rows if row["arm"] == MLX_LM), None)
    for row in rows:
        row["speedup"] = theirs["ttft_ms"]["median"] / row["ttft_ms"]["median"] if theirs else None
    return rows


_running: set[subprocess.Popen[bytes]] = set()


@contextlib.contextmanager
def running(subject: Subject, arms: Sequence[str]) -> Iterator[dict[str, Server]]:
    """Start the servers of some arms, one for both paths of ours; yields who answers for each, all standing still."""
    with contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        ours = [arm for arm in arms if arm != MLX_LM]
        if ours:
            command = [sys.executable, "-m", "kvp_mlx", "serve", "--model", subject.name]
            servers |= dict.fromkeys(ours, stack.enter_context(started(command, subject.weights / "kvp.log")))
        if MLX_LM in arms:
            command = [sys.executable, "-c", MLX_LM_SERVER, "--model", str(subject.weights), "--log-level", "ERROR"]
            servers[MLX_LM] = stack.enter_context(started(command, subject.weights / "mlx-lm.log"))
        yield servers


@contextlib.contextmanager
def started(command: list[str], log: Path) -> Iterator[Server]:
    """Start a server on a free port, wait until it is healthy, and end it after the block; yields it stopped.

    Raises:
        KVPError: it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "KVP_API_KEY"}
    with log.open("w") as output:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=output, stderr=output, env=environment)
    server = Server(process, port)
    _running.add(process)
    try:
        if not _is_healthy(server):
            said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise KVPError(f"the server '{' '.join(command[1:4])} ...' does not start: {said[-1]}")
        process.send_signal(signal.SIGSTOP)
        yield server
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _running.discard(process)


def end_servers() -> None:
    """End the servers that run, where the program is about to end without its blocks."""
    for process in list(_running):
        process.kill()
    remove_unfinished()


def _is_healthy(server: Server) -> bool:
    """Wait until a server answers ``/health``; returns whether it does."""
    end = time.monotonic() + START_SECONDS
    while server.process.poll() is None and time.monotonic() < end:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return True
        time.sleep(0.1)
    return False
