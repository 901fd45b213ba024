"""HTTP as clients should not speak it: bytes to a socket, and what comes back."""

import contextlib
import json
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Reply:
    """An answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict:
        return json.loads(self.body)


def exchange(url: str, request: bytes, timeout: float = 30) -> bytes:
    """Send bytes to a server and return all that it answers until it closes the connection."""
    place = urlsplit(url)
    pieces = []
    with (
        socket.create_connection((place.hostname, place.port), timeout=timeout) as connection,
        contextlib.suppress(ConnectionError),  # it may refuse before it has read all
    ):
        connection.sendall(request)
        while piece := connection.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def ask(url: str, method: str, path: str, body: bytes = b"", **headers: str | list[str] | None) -> Reply:
    """Ask as told: ``headers`` (``_`` for ``-``) replace the usual ones; None leaves one out, a list sends several."""
    usual: dict[str, str | list[str] | None] = {
        "host": urlsplit(url).netloc,
        "content-length": str(len(body)),
        "connection": "close",
    }
    lines = [f"{method} {path} HTTP/1.1"]
    for name, value in (usual | {name.replace("_", "-"): value for name, value in headers.items()}).items():
        lines += [f"{name}: {each}" for each in ([value] if isinstance(value, str) else value or [])]
    head, _, rest = exchange(url, "\r\n".join([*lines, "", ""]).encode("latin-1") + body).partition(b"\r\n\r\n")
    status, *fields = head.decode("latin-1").split("\r\n")
    return Reply(int(status.split()[1]), dict(field.lower().split(": ", 1) for field in fields), rest)
