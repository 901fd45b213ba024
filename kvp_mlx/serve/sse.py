"""Answers that clients wait for, streamed or whole: kept alive, and ended by who goes away and by the server's end."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .errors import APIError, as_api_error, openai_error, shutting_down
from .service import CountedTicket, Service

Whole = TypeVar("Whole")

DONE = b"data: [DONE]\n\n"


def server_event(data: Any, name: str | None = None) -> bytes:
    """Return one event as bytes, its data as JSON."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + to_json(data, inf_nan_mode="null") + b"\n\n"


def comment() -> bytes:
    """Return what keeps a stream alive that has nothing to say."""
    return b": keep-alive\n\n"


def openai_failure(error: APIError) -> bytes:
    """Return the last event of an OpenAI stream that fails."""
    return server_event(openai_error(error))


class EventStream(StreamingResponse):
    """Server-sent events, with something to keep them alive whenever nothing came for a while.

    A client that goes away cancels the tickets; so does the end of the stream, whatever it is.

    Args:
        service: says how long silence may last, and when the server stops.
        tickets: what the events come from.
        events: encoded (``server_event``).
        keep_alive: what to send into silence.
        failed: the API's last event where something fails, encoded.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        service: Service,
        tickets: Sequence[CountedTicket],
        events: AsyncIterator[bytes],
        *,
        keep_alive: Callable[[], bytes] = comment,
        failed: Callable[[APIError], bytes] = openai_failure,
    ):
        stream = _without_silence(service, events, keep_alive, failed)
        super().__init__(stream, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._tickets = tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for ticket in self._tickets:
                ticket.cancel()


async def _without_silence(
    service: Service, events: AsyncIterator[bytes], keep_alive: Callable[[], bytes], failed: Callable[[APIError], bytes]
) -> AsyncIterator[bytes]:
    stopping = asyncio.ensure_future(service.stopping.wait())
    upcoming: asyncio.Future[bytes | None] | None = None
    try:
        while True:
            upcoming = upcoming or asyncio.ensure_future(anext(events, None))
            waiting: set[asyncio.Future[Any]] = {upcoming, stopping}
            await asyncio.wait(waiting, timeout=service.options.keep_alive_seconds, return_when=asyncio.FIRST_COMPLETED)
            if upcoming.done():
                if (event := upcoming.result()) is None:
                    return
                upcoming = None
                yield event
            elif stopping.done():
                raise shutting_down()
            else:
                yield keep_alive()
    except Exception as error:
        yield failed(as_api_error(error))
    finally:
        stopping.cancel()
        if upcoming is not None:
            upcoming.cancel()


async def whole(
    service: Service, request: Request, tickets: Sequence[CountedTicket], work: Coroutine[Any, Any, Whole]
) -> Whole:
    """Return what a coroutine makes of tickets; the client's going away, and the end of the server, cancel them.

    Raises:
        ClientDisconnect: the client has gone.
        APIError: the server stops.
    """
    result = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    stopping = asyncio.ensure_future(service.stopping.wait())
    try:
        await asyncio.wait({result, gone, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        raise ClientDisconnect if gone.done() else shutting_down()
    finally:
        for task in (result, gone, stopping):
            task.cancel()
        for ticket in tickets:
            ticket.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
