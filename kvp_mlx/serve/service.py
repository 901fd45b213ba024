"""What every route stands on: the model, its scheduler, and what the server was told."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from ..bundle.loading import KVPModel
from .errors import APIError
from .metrics import Metrics
from .requests import Event, Finished, GenerationRequest
from .scheduler import Scheduler
from .ticket import Ticket


@dataclass(frozen=True)
class ServeOptions:
    """What holds for all requests.

    Attributes:
        quality: the dial of requests that ask for none.
        exact_for: which requests are read in full unless they say more; ``tools``: with tools or a JSON schema.
        host: where the server listens.
        api_key: what every request has to bring; None: nothing.
        allowed_hosts: names, beside the usual ones, under which clients may know this server.
        cors: origins whose pages may call; ``*``: all.
        max_body_bytes: the largest body.
        keep_alive_seconds: the longest silence in a stream.
        grace_seconds: how long running answers may go on when the server is to stop.
    """

    quality: str = "balanced"
    exact_for: Literal["tools"] | None = None
    host: str = "127.0.0.1"
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    max_body_bytes: int = 64 * 2**20
    keep_alive_seconds: float = 5.0
    grace_seconds: float = 10.0


@dataclass(frozen=True)
class Service:
    """What every route stands on.

    Attributes:
        model: the bundle that answers.
        scheduler: runs it.
        options: what holds for all requests.
        name: of the model, as clients see it.
        metrics: what is counted.
        stopping: set when answers that still run are to be told that the server ends.
    """

    model: KVPModel
    scheduler: Scheduler
    options: ServeOptions
    name: str
    metrics: Metrics = field(default_factory=Metrics)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def submit(self, request: GenerationRequest) -> "CountedTicket":
        """Queue a request; what it takes is counted when it ends.

        Raises:
            APIError: the prompt is longer than the context window.
            InputError: it cannot be answered.
            QueueFullError: too many wait.
        """
        window, tokens = self.model.context_length, len(request.ids)
        if window is not None and tokens >= window:
            raise APIError(
                400,
                f"prompt is too long: {tokens} tokens > {window - 1} maximum (the model's context window, less one).",
                code="context_length_exceeded",
            )
        return CountedTicket(self.scheduler.submit(request), self.metrics)


@dataclass(frozen=True)
class CountedTicket:
    """A ticket whose usage goes into the metrics."""

    ticket: Ticket
    metrics: Metrics

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield the ticket's events."""
        async for event in self.ticket:
            if isinstance(event, Finished):
                self.metrics.count(event.usage)
            yield event

    def cancel(self) -> None:
        """See ``Ticket.cancel``."""
        self.ticket.cancel()
