"""Who may ask, and how much; every refusal in the shape of the API that was asked."""

import http.client
import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.chat_models import write_tool_model
from support.raw_http import ask, exchange
from support.serving import serving

KEY = "a-key-of-some-length"
HELLO = json.dumps({"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}).encode()
ROUTES = ("/v1/chat/completions", "/v1/messages")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tool_model(tmp_path_factory.mktemp("guarded") / "model")


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with serving(model, max_body_bytes=20_000) as (url, _):
        yield url


@pytest.fixture(scope="module")
def locked(model: Path) -> Iterator[str]:
    with serving(model, api_key=KEY, cors=("https://good.example",), allowed_hosts=("kvp.example",)) as (url, _):
        yield url


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nowhere", 404, "not_found_error"),
        ("GET", "/v1/messages/", 404, "not_found_error"),
        ("POST", "/v1/models", 405, "invalid_request_error"),
        ("GET", "/v1/chat/completions", 405, "invalid_request_error"),
        ("GET", "/v1/models/other", 404, "not_found_error"),
        ("GET", "/v1/models/../../etc/passwd", 404, "not_found_error"),
    ],
)
@pytest.mark.parametrize("version", [None, "2023-06-01"])
def test_what_is_not_there(method: str, path: str, status: int, kind: str, version: str | None, url: str) -> None:
    reply = ask(url, method, path, anthropic_version=version)
    assert (reply.status, reply.json()["error"]["type"]) == (status, kind)
    assert (reply.json().get("type") == "error") == (version is not None or path.startswith("/v1/messages"))


def test_who_finds_no_route_is_told_which_there_are(url: str) -> None:
    assert "/v1/chat/completions" in ask(url, "POST", "/v1/embeddings", HELLO).json()["error"]["message"]
    assert "POST" in ask(url, "GET", "/v1/messages").json()["error"]["message"]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "a@localhost", "localhost/x", "", "["],
)
@pytest.mark.parametrize("path", ["/health", *ROUTES])
def test_a_name_that_dns_could_rebind_is_no_host(host: str, path: str, url: str) -> None:
    assert ask(url, "POST", path, HELLO, host=host).status == 403


def test_the_hosts_that_it_has(url: str, locked: str) -> None:
    for host in (
        "localhost",
        "LOCALHOST:1",
        "localhost.",
        "127.0.0.1",
        "[::1]:8080",
        "192.168.0.7",
        socket.gethostname(),
    ):
        assert ask(url, "GET", "/health", host=host).status == 200, host
    assert ask(locked, "GET", "/health", host="kvp.example").status == 200
    assert ask(url, "GET", "/health", host="kvp.example").status == 403
    assert ask(url, "GET", "/health", host=["localhost", "evil.example"]).status in (400, 403)
    assert ask(url, "GET", "/health", host=None).status in (400, 403)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": "Bearer \xff\xfe"},
        {"x_api_key": KEY.upper()},
        {"x_api_key": ""},
    ],
)
def test_a_wrong_key(headers: dict[str, str], locked: str) -> None:
    for path in (*ROUTES, "/v1/models", "/metrics", "/nowhere"):
        reply = ask(locked, "POST", path, HELLO, **headers)
        assert (reply.status, reply.json()["error"]["type"]) == (401, "authentication_error")
        assert (reply.json().get("type") == "error") == path.startswith("/v1/messages")


def test_the_right_key(locked: str) -> None:
    assert ask(locked, "GET", "/health").status == 200
    for headers in ({"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"}, {"x_api_key": KEY}):
        assert ask(locked, "GET", "/v1/models", **headers).status == 200
        assert ask(locked, "POST", "/v1/messages", HELLO, **headers).status == 200


def test_pages_of_other_origins(url: str, locked: str) -> None:
    for origin in ("https://evil.example", "http://localhost.evil.example", "null", "http://127.0.0.1:1"):
        assert ask(url, "POST", ROUTES[0], HELLO, origin=origin).status == 403
        assert ask(locked, "POST", ROUTES[0], HELLO, origin=origin, x_api_key=KEY).status == 403
        assert "access-control-allow-origin" not in ask(url, "OPTIONS", ROUTES[0], origin=origin).headers
    for origin in (url, "vscode-webview://abc"):
        assert ask(url, "POST", ROUTES[0], HELLO, origin=origin).status == 200
    asked = {"origin": "https://good.example", "access_control_request_method": "POST"}
    allowed = ask(locked, "OPTIONS", ROUTES[0], **asked, access_control_request_headers="x-api-key,content-type")
    assert (allowed.status, allowed.headers["access-control-allow-origin"]) == (200, "https://good.example")
    reply = ask(locked, "POST", ROUTES[0], HELLO, origin="https://good.example", x_api_key=KEY)
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://good.example")


@pytest.mark.parametrize("path", ROUTES)
def test_a_body_that_is_too_large(path: str, url: str) -> None:
    large = b" " * 300_000 + HELLO
    told = ask(url, "POST", path, large)
    chunked = b"".join(b"%x\r\n%s\r\n" % (1000, large[at : at + 1000]) for at in range(0, 300_000, 1000)) + b"0\r\n\r\n"
    untold = ask(url, "POST", path, chunked, content_length=None, transfer_encoding="chunked")
    for reply in (told, untold):
        assert (reply.status, reply.json().get("type") == "error") == (413, path == "/v1/messages")
    assert ask(url, "POST", path, b" " * 19_000 + HELLO).status == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 2_000_000 + b"\r\n\r\n",
        b"GET \xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_what_is_hardly_http(request_bytes: bytes, url: str) -> None:
    answer = exchange(url, request_bytes)
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer
    assert ask(url, "GET", "/health").status == 200


def test_a_body_that_does_not_end_leaves_the_server_to_others(url: str) -> None:
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{")
        assert ask(url, "POST", "/v1/messages", HELLO).status == 200


def test_logs_hold_no_prompt_path_or_key(locked: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ask(locked, "POST", "/v1/messages/secret-path?key=secret", b'{"prompt": "secret"', x_api_key="secret")
        ask(locked, "POST", "/v1/messages", HELLO.replace(b"Hi", b"secret"), x_api_key=KEY)
        exchange(locked, b"secret\r\n\r\n")
    assert "secret" not in caplog.text
    assert KEY not in caplog.text


def test_metrics_tell_what_happened(model: Path) -> None:
    with serving(model) as (url, _):
        for _ in range(2):
            assert ask(url, "POST", "/v1/messages", HELLO).status == 200
        assert ask(url, "POST", "/v1/messages", b"{").status == 400
        for path in ("/a", "/b"):
            ask(url, "GET", path)
        lines = ask(url, "GET", "/metrics").body.decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert values['kvp_responses_total{route="/v1/messages",status="200"}'] == "2.0"
        assert values['kvp_responses_total{route="/v1/messages",status="400"}'] == "1.0"
        assert values['kvp_responses_total{route="none",status="404"}'] == "2.0"
        assert values['kvp_ttft_seconds_count{path="full"}'] == "2.0"
        assert values["kvp_queue_seconds_count"] == "2.0"
        counted = json.loads(ask(url, "POST", "/v1/messages/count_tokens", HELLO).body)["input_tokens"]
        assert float(values["kvp_prompt_tokens_total"]) == 2 * counted
        assert values["kvp_completion_tokens_total"] == "2.0"
        assert float(values["kvp_memory_bytes"]) > 0


def test_a_connection_serves_one_request_after_the_other(url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    for _ in range(3):
        connection.request("POST", "/v1/messages", HELLO)
        assert connection.getresponse().read()
        connection.request("POST", "/v1/messages", b"{")
        assert connection.getresponse().read().startswith(b'{"type":"error"')
