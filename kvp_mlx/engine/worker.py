"""The one thread that runs MLX: it does jobs one after the other, and idle work in between.

mlx keeps its streams per thread, so whatever touches a model runs here. The thread that reads keys and prints, where
signals arrive, hands over jobs and receives what they emit; so Ctrl-C never strikes inside a computation.
"""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

KEY_PAUSE_SECONDS = 0.1
PATIENCE_SECONDS = 1.0
"""For a job that is to stop: its reader then goes on, and the job ends behind its back, before the next one."""

T = TypeVar("T")
Emit = Callable[[Any], None]


class StoppedError(Exception):
    """Raised by ``emit`` inside a job whose reader has gone, and to a reader who did not wait for its job's end."""


@dataclass
class _Job:
    """A function to run, and the queue that its reader watches: ("item" | "error" | "end" | "stop", value)."""

    function: Callable[[Emit], Any]
    messages: "queue.SimpleQueue[tuple[str, Any]]" = field(default_factory=queue.SimpleQueue)
    stopped: threading.Event = field(default_factory=threading.Event)

    def emit(self, item: Any) -> None:
        if self.stopped.is_set():
            raise StoppedError
        self.messages.put(("item", item))

    def run(self) -> None:
        try:
            self.messages.put(("end", self.function(self.emit)))
        except StoppedError:
            self.messages.put(("end", None))
        except BaseException as error:
            self.messages.put(("error", error))

    def last_message(self) -> tuple[str, Any]:
        """Return how the job ended, or an error where it has not after a while."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        try:
            while (message := self.messages.get(timeout=max(0.0, deadline - time.monotonic())))[0] in ("item", "stop"):
                continue
        except queue.Empty:
            return "error", StoppedError()
        return message


class Worker:
    """A thread for jobs, used from one other thread.

    Args:
        idle_work: called on the thread after every job; returns an iterator that is advanced, a step at a time, as
            long as there is no job and no key was pressed just now. It is closed when a job arrives.
    """

    def __init__(self, idle_work: Callable[[], Iterator[None]]):
        self._idle_work = idle_work
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._last_key = 0.0
        self._read_job: _Job | None = None
        self.idle_error: Exception | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="kvp-mlx", daemon=True).start()

    def run(self, function: Callable[[Emit], T]) -> Generator[Any, None, T]:
        """Run ``function(emit)`` on the thread, yielding what it emits; the iterator's value is its result.

        Closing the iterator, or an exception where it waits (Ctrl-C), makes the job's next ``emit`` raise
        ``StoppedError``, and returns when the job has ended.
        """
        job = self._read_job = _Job(function)
        self._jobs.put(job)
        kind = "item"
        try:
            while True:
                kind, value = job.messages.get()
                if kind == "stop":
                    kind, value = job.last_message()
                if kind == "error":
                    raise value
                if kind == "end":
                    return value
                yield value
        finally:
            self._read_job = None
            job.stopped.set()
            while kind == "item":
                try:
                    if (found := job.messages.get()[0]) != "stop":
                        kind = found
                except KeyboardInterrupt:  # once more, out of impatience: the job is ending already
                    continue

    def stop(self) -> bool:
        """Make the job that is being read stop, as closing its iterator would; may be called in a signal handler.

        Its reader gets ``StoppedError`` where that takes longer than ``PATIENCE_SECONDS``.

        Returns:
            Whether there is one.
        """
        if (job := self._read_job) is None:
            return False
        job.stopped.set()
        job.messages.put(("stop", None))
        return True

    def call(self, function: Callable[[], T]) -> T:
        """Run a function on the thread and return its result."""
        steps = self.run(lambda emit: function())
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value

    def note_key(self) -> None:
        """Let idle work pause for a moment, since somebody is typing."""
        self._last_key = time.monotonic()

    def close(self) -> None:
        """Return when the last job has ended; idle work ends with its next step."""
        self._jobs.put(None)
        self._ended.wait()

    def _run(self) -> None:
        """Do jobs until ``close``, then sleep.

        The thread never ends: what mlx keeps per thread takes the interpreter's lock when it goes, and where the
        interpreter is about to end as well, that aborts the process (ml-explore/mlx#4110).
        """
        while (job := self._next_job()) is not None:
            job.run()
            del job
        self._ended.set()
        threading.Event().wait()

    def _next_job(self) -> _Job | None:
        """Do idle work until there is a job."""
        steps = self._idle_work()
        try:
            while self._jobs.empty():
                pause = self._last_key + KEY_PAUSE_SECONDS - time.monotonic()
                if pause > 0:
                    time.sleep(min(pause, 0.01))
                elif next(steps, self) is self:  # nothing left to do
                    break
        except Exception as error:
            self.idle_error = error
        finally:
            if isinstance(steps, Generator):
                steps.close()
        return self._jobs.get()
