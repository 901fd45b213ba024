"""The server on its socket: it begins to listen, says so, and ends in order."""

import asyncio
import logging
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from ..errors import InputError
from .app import create_app
from .service import Service

BACKLOG = 128
SWITCH_SECONDS = 0.0005
"""How long the thread that builds MLX's graphs keeps Python's lock while events wait to be sent; Python's own 5 ms are
waited for several times a request."""
AFTER_GRACE_SECONDS = 5
"""How long what was told of the end may take to be sent."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes a free one.

    Raises:
        InputError: no such host, or a port that is taken or not allowed.
    """
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(places, key=lambda place: place[0] != socket.AF_INET)
        listening = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise InputError(f"cannot listen on {host}, port {port}: {reason}; choose another (--host, --port).") from error
    # its connections inherit that; small events would wait 40 ms for the client's acknowledgement of those before
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def url_of(listening: socket.socket) -> str:
    """Return the URL of a socket that listens, as a client of the same machine may use it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, which lets running answers end for a while when it is to stop, and tells the others.

    Args:
        service: what it serves.
        ready: called when it does.
        is_verbose: log every request's route and status, and where unexpected errors come from.
    """

    def __init__(self, service: Service, ready: Callable[[], None] = lambda: None, *, is_verbose: bool = False):
        for name in ("uvicorn.error", "asyncio"):  # what they say comes with tracebacks, and of requests
            logging.getLogger(name).setLevel(logging.INFO if is_verbose else logging.CRITICAL)
        config = uvicorn.Config(
            create_app(service),
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=is_verbose,
            server_header=False,
            timeout_graceful_shutdown=round(service.options.grace_seconds) + AFTER_GRACE_SECONDS,
        )
        super().__init__(config)
        self._service, self._ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve."""
        sys.setswitchinterval(SWITCH_SECONDS)
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End: running answers may go on for a while, after a second signal they may not."""
        grace = 0.0 if self.should_exit else self._service.options.grace_seconds
        self.should_exit = True
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(loop.call_later, grace, self._service.stopping.set)
