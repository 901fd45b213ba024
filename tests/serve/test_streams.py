"""Silence, clients that go away, a full queue, and the server's end."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import anthropic
import httpx
import pytest
from support.chat_models import write_tool_model
from support.serving import serving
from support.waiting import wait_until

from kvp_mlx.serve.server import listen
from kvp_mlx.serve.service import Service

ROUTES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}]},
}
LIMITS = {"/v1/responses": "max_output_tokens"}
SILENT = {
    "/v1/responses": "event: response.in_progress",
    "/v1/messages": "event: ping",
}
"""What comes where nothing else does; elsewhere a comment."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that does not come to an end by itself."""
    return write_tool_model(tmp_path_factory.mktemp("streams") / "model", max_position_embeddings=100_000)


@pytest.fixture
def server(model: Path) -> Iterator[tuple[str, Service]]:
    with serving(model, max_batch=1, queue_limit=2, keep_alive_seconds=0.05) as served:
        yield served


def long(path: str, tokens: int = 90_000, **fields: object) -> dict:
    return {"model": "tiny", LIMITS.get(path, "max_tokens"): tokens, **ROUTES[path], **fields}


def is_idle(service: Service) -> bool:
    now = service.scheduler.statistics()
    return now["waiting"] == now["reading"] == now["running"] == 0


def stream(url: str, path: str, lines: list[str], **fields: object) -> None:
    """Read a stream's lines until it ends."""
    with httpx.stream("POST", url + path, json=long(path, stream=True, **fields), timeout=60) as answer:
        lines.extend(line for line in answer.iter_lines() if line)


def test_small_events_do_not_wait_for_acknowledgements() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("path", ROUTES)
def test_silence_is_broken_by_the_clock(path: str, server: tuple[str, Service]) -> None:
    url, service = server
    with httpx.stream("POST", url + path, json=long(path, stream=True), timeout=60) as first:
        pieces = first.iter_raw()
        next(pieces)  # whose generator closes the stream when nobody holds it
        with httpx.stream("POST", url + path, json=long(path, stream=True), timeout=60) as second:
            lines = second.iter_lines()
            begun = time.monotonic()
            found = [line for line, _ in zip(lines, range(30), strict=False) if line]
            assert time.monotonic() - begun > 0.25
    silent = SILENT.get(path, ": keep-alive")
    assert found.count(silent) > 5
    wait_until(lambda: is_idle(service))


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("streams", [True, False])
def test_who_goes_away_stops_the_work(path: str, streams: bool, server: tuple[str, Service]) -> None:
    url, service = server
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.5) as client:
        if streams:
            with client.stream("POST", url + path, json=long(path, stream=True)) as answer:
                next(answer.iter_raw())
                raise httpx.ReadTimeout("enough")
        client.post(url + path, json=long(path))
    wait_until(lambda: service.scheduler.statistics()["cancelled"] == 1)
    wait_until(lambda: is_idle(service))


def test_a_full_queue_says_when_to_come_again(server: tuple[str, Service]) -> None:
    url, service = server
    client = anthropic.Anthropic(base_url=url, api_key="any", max_retries=0, timeout=60)
    begun = [client.messages.create(**long("/v1/messages"), stream=True)]
    wait_until(lambda: service.scheduler.statistics()["running"] == 1)
    begun += [client.messages.create(**long("/v1/messages"), stream=True) for _ in range(2)]
    with pytest.raises(anthropic.RateLimitError) as refused:
        client.messages.create(**long("/v1/messages"))
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert refused.value.body["error"]["type"] == "rate_limit_error"
    answer = httpx.post(url + "/v1/chat/completions", json=long("/v1/chat/completions"), timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    for each in begun:
        each.close()
    wait_until(lambda: is_idle(service))
    assert client.messages.create(**long("/v1/messages", tokens=2)).usage.output_tokens == 2


def test_answers_that_the_end_cuts_off_are_told(model: Path) -> None:
    lines: dict[str, list[str]] = {path: [] for path in ROUTES}
    whole: list[httpx.Response] = []
    with serving(model, max_batch=1, queue_limit=9) as (url, service):
        threads = [threading.Thread(target=stream, args=(url, path, lines[path])) for path in ROUTES]
        body = long("/v1/messages")
        threads.append(
            threading.Thread(target=lambda: whole.append(httpx.post(url + "/v1/messages", json=body, timeout=60)))
        )
        for thread in threads:
            thread.start()
        wait_until(lambda: sum(service.scheduler.statistics()[name] for name in ("waiting", "running")) == 5)
        service.stopping.set()
        for thread in threads:
            thread.join(30)
    told = "the server is shutting down."
    assert all(told in each[-1] for each in lines.values())
    assert lines["/v1/messages"][-2] == "event: error"
    assert lines["/v1/responses"][-2] == "event: response.failed"
    assert json.loads(lines["/v1/responses"][-1].removeprefix("data: "))["response"]["status"] == "failed"
    assert (whole[0].status_code, whole[0].json()["error"]["type"]) == (503, "overloaded_error")
