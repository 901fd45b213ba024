"""The caller's half of a request: events cross from the MLX thread to an event loop, and cancellation the other way."""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

from ..errors import KVPError
from .requests import Event, GenerationRequest


class QueueFullError(KVPError):
    """As many requests wait as may; ``retry_after_seconds`` says when it may be worth another try."""

    def __init__(self, retry_after_seconds: int):
        super().__init__(f"too many requests are waiting; try again in {retry_after_seconds} s.")
        self.retry_after_seconds = retry_after_seconds


class Ticket:
    """A request on its way: ``async for event in ticket`` yields its events and ends after ``Finished``.

    It is read once, in one event loop. A request that fails raises there; one that was cancelled just ends.

    Attributes:
        request: what was asked.
        submitted: when, by ``time.perf_counter()``.
        is_cancelled: whether anybody gave it up.
    """

    def __init__(self, request: GenerationRequest, on_cancel: Callable[[], None] = lambda: None):
        self.request = request
        self.submitted = time.perf_counter()
        self._messages: deque[Event | BaseException | None] = deque()
        self._cancelled = threading.Event()
        self._on_cancel = on_cancel
        self._wake: Callable[[], object] = lambda: None

    @property
    def is_cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Give the request up, from any thread; its iteration ends, and its work within a slice."""
        if not self._cancelled.is_set():
            self._cancelled.set()
            self.put(None)
            self._on_cancel()

    def put(self, message: Event | BaseException | None) -> None:
        """Hand over an event, an error or, with None, the end; called on the thread that does the work."""
        self._messages.append(message)
        with contextlib.suppress(RuntimeError):  # the loop that waited has closed
            self._wake()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield the events in order.

        Raises:
            KVPError: the work failed.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
        while True:
            while self._messages:
                message = self._messages.popleft()
                if message is None or self.is_cancelled:
                    return
                if isinstance(message, BaseException):
                    raise message
                yield message
            await arrived.wait()
            arrived.clear()
