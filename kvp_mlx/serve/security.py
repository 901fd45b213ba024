"""Who may ask, and how much: the Host and Origin of a request, its key, the size of its body, and what it is told."""

import asyncio
import hmac
import ipaddress
import logging
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import APIError, as_api_error, error_response, shutting_down
from .service import Service

log = logging.getLogger(__name__)

PUBLIC_PATHS = ("/", "/health")
"""What needs no key: the page (it asks for one) and what its parts and watchdogs read."""
PUBLIC_FOLDER = "/static/"
DOCKER_HOST = "host.docker.internal"
DRAIN_SECONDS = 5.0


class Guard:
    """Stands around the application: refuses who may not ask, and turns every error into the API's own answer."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service, options = app, service, service.options
        self._hosts = known_hosts(options.host, options.allowed_hosts)
        self._origins = set(options.cors)
        self._key = None if options.api_key is None else options.api_key.encode()
        self._limit = options.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def sent(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._check(scope["path"], headers)
            await self._app(scope, self._bounded(receive), sent)
        except ClientDisconnect:
            return
        except Exception as error:
            told = as_api_error(error)
            if status:
                log.error("a started answer failed: %s", type(error).__name__)
                return
            if told.status == 413:
                await _drain(receive)
            is_anthropic = "anthropic-version" in headers
            await error_response(told, scope["path"], is_anthropic=is_anthropic)(scope, receive, sent)
        finally:
            self._service.metrics.count_response(getattr(scope.get("route"), "path", "none"), status)

    def _check(self, path: str, headers: Headers) -> None:
        """Refuse a request by its headers.

        Raises:
            APIError: 401, 403, 413 or 503.
        """
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not is_known_host(hosts[0], self._hosts):
            raise APIError(403, "this Host is not one of this server's names; see --allow-host.", code="unknown_host")
        origin = headers.get("origin")
        if origin is not None and not self._is_welcome(origin, hosts[0]):
            raise APIError(403, "pages of this origin may not call; see --cors.", code="unknown_origin")
        if self._key is not None and not (path in PUBLIC_PATHS or path.startswith(PUBLIC_FOLDER)):
            self._check_key(headers)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._limit:
            raise too_large(self._limit)
        if self._service.stopping.is_set():
            raise shutting_down()

    def _is_welcome(self, origin: str, host: str) -> bool:
        """Return whether a page may call: ours, an allowed one, or an application's own (not from the web)."""
        if "*" in self._origins or origin in self._origins:
            return True
        place = urlsplit(origin)
        return place.netloc == host if place.scheme in ("http", "https") else origin != "null"

    def _check_key(self, headers: Headers) -> None:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        brought = [headers.get("x-api-key"), bearer if scheme.lower() == "bearer" else None]
        matches = [hmac.compare_digest((key or "").strip().encode("latin-1"), self._key or b"") for key in brought]
        if not any(matches):
            raise APIError(
                401,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _bounded(self, receive: Receive) -> Receive:
        """Return ``receive``, which fails when a body of no stated length grows too large."""
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:
                raise too_large(self._limit)
            return message

        return bounded


def too_large(limit: int) -> APIError:
    """Return what a request with too large a body is told."""
    return APIError(413, f"the body is larger than {limit:,} bytes; see --max-body-mib.", code="request_too_large")


async def _drain(receive: Receive) -> None:
    """Read and drop the rest of a body for a moment, so that the client comes to read the answer."""
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass
    except TimeoutError:
        pass


def known_hosts(host: str, more: tuple[str, ...]) -> set[str]:
    """Return the names under which clients may know the server; addresses are none and need not be listed."""
    machine = socket.gethostname().lower()
    return {"localhost", DOCKER_HOST, host.lower(), machine, f"{machine}.local", *(name.lower() for name in more)}


def is_known_host(value: str, names: set[str]) -> bool:
    """Return whether a Host header is one of the names or an address: neither can be rebound by somebody's DNS."""
    try:
        place = urlsplit(f"//{value}")
        name = (place.hostname or "").rstrip(".")
        place.port  # noqa: B018 - raises where it is no number
    except ValueError:
        return False
    if place.netloc != value or "@" in value or not name:
        return False
    return name in names or is_address(name)


def is_address(host: str) -> bool:
    """Return whether this is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server that listens there."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)
