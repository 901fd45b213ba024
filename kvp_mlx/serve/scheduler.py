"""Requests from many callers on the one thread that runs MLX: read in slices between the steps of those that decode."""

import logging
import math
import queue
import threading
import time
from collections.abc import Generator
from pathlib import Path

from ..bundle.loading import KVPModel
from ..device.streams import release_buffers
from ..engine.pace import Pace
from ..engine.prompt import check_window
from ..errors import InputError, KVPError
from .decoding import Decoded, decoder_for
from .grammar import Grammar, Grammars
from .prefixes import Prefixes
from .requests import GenerationRequest
from .ticket import QueueFullError, Ticket
from .work import Work

__all__ = ["QueueFullError", "Scheduler", "Ticket"]

PREPARE_AFTER_SECONDS = 2.0
"""Of nothing to do."""
LONE_SLICE_MS = 250.0
"""Where nothing decodes, a slice keeps only newcomers and cancellations waiting."""
log = logging.getLogger(__name__)


class Scheduler:
    """Answers requests, several at a time; everything but ``submit``, ``statistics`` and ``close`` is its thread's.

    Args:
        model: the bundle; it needs a tokeniser.
        max_batch: requests that are read or decoded at a time.
        queue_limit: requests that may wait beyond those.
        slice_ms: how long, about, reading holds up those that decode.
        cache_bytes: what past requests' contexts may take in memory, and again on disk.
        cache_dir: where they outlive the process.

    Raises:
        InputError: no tokeniser, or a ``cache_dir`` that cannot be written.
    """

    def __init__(
        self,
        model: KVPModel,
        *,
        max_batch: int = 8,
        queue_limit: int = 64,
        slice_ms: float = 200.0,
        cache_bytes: int = 4_000_000_000,
        cache_dir: Path | None = None,
    ):
        self._model, self._max_batch, self._limit, self._slice_ms = model, max_batch, queue_limit, slice_ms
        self._grammars = Grammars(model.text_tokenizer)
        self._inbox: queue.SimpleQueue[tuple[Ticket, Grammar | None]] = queue.SimpleQueue()
        self._arrived = threading.Event()
        self._lock = threading.Lock()
        self._mean_seconds = 1.0  # that a request takes, its queue left out
        self._deadline: float | None = None  # of the work that is there when the scheduler closes
        self._waiting: list[Work] = []
        self._reading: list[Work] = []
        self._counts = dict.fromkeys(("requests", "finished", "cancelled", "failed", "slices", "steps"), 0)
        self._published: dict[str, int] = {}
        self._pace = Pace(slice_ms)
        self._ended = threading.Event()
        self._prefixes = Prefixes(model, cache_bytes, cache_dir)
        self._decoder = decoder_for(model.base, max_batch)
        self._publish()
        threading.Thread(target=self._run, name="kvp-mlx", daemon=True).start()

    def submit(self, request: GenerationRequest) -> Ticket:
        """Queue a request; may be called from any thread.

        Raises:
            InputError: a prompt that is empty, too long or of other tokens than the model's, a schema that cannot be
                followed, or a dial that the bundle cannot follow.
            QueueFullError: as many wait as may.
            KVPError: the scheduler is closing.
        """
        self._check(request)
        grammar = None if request.grammar is None else self._grammars.compile(request.grammar)
        ticket = Ticket(request, on_cancel=self._arrived.set)
        with self._lock:
            if self._deadline is not None:
                raise KVPError("the server is stopping.")
            if (waiting := self._published["waiting"]) >= self._limit:
                raise QueueFullError(min(60, max(1, math.ceil(self._mean_seconds * waiting / self._max_batch))))
            self._published["waiting"] += 1
            self._counts["requests"] += 1
            self._inbox.put((ticket, grammar))
        self._arrived.set()
        return ticket

    def _check(self, request: GenerationRequest) -> None:
        if not request.ids:
            raise InputError("the prompt is empty; give it at least one token.")
        check_window(self._model, len(request.ids), request.max_tokens)
        request.dial.share(self._model.config)
        words = getattr(self._model.base.args, "vocab_size", None) or len(self._model.text_tokenizer.vocab)
        for name, ids in (("the prompt", request.ids), ("logit_bias", request.sampling.logit_bias)):
            if ids and not 0 <= min(ids) <= max(ids) < words:
                raise InputError(f"{name} holds a token id outside 0 to {words - 1}, the model's vocabulary.")

    def statistics(self) -> dict[str, int]:
        """Return what is going on and what has been, in numbers that fit together; may be called from any thread."""
        with self._lock:
            return dict(self._published)

    def close(self, grace_seconds: float = 0.0) -> None:
        """Refuse new requests, let the others end within the grace, tell those that do not, and save what was read."""
        with self._lock:
            if self._deadline is None:
                self._deadline = time.monotonic() + grace_seconds
        self._arrived.set()
        self._ended.wait()

    # On the MLX thread

    def _run(self) -> None:
        """Work until the end, then sleep; see ``engine.worker.Worker``."""
        try:
            while not self._is_over():
                self._publish()
                if not self._is_busy():
                    self._idle()
                self._receive()
                try:
                    self._turn()
                except Exception as error:
                    log.exception("a step failed, and with it the requests that were at work")
                    self._fail_all(error)
                    self._decoder = decoder_for(self._model.base, self._max_batch)
            self._receive()
            self._fail_all(KVPError("the server is stopping."))
            self._prefixes.save_all()
            self._publish()
        finally:
            self._ended.set()
        threading.Event().wait()

    def _is_over(self) -> bool:
        return self._deadline is not None and (not self._is_busy() or time.monotonic() >= self._deadline)

    def _is_busy(self) -> bool:
        return bool(self._waiting or self._reading or len(self._decoder) or not self._inbox.empty())

    def _publish(self) -> None:
        """Tell other threads how things stand."""
        cached = {
            "cached_bytes": self._prefixes.nbytes,
            "saved_bytes": self._prefixes.disk_bytes,
            "conversations": len(self._prefixes),
        }
        with self._lock:
            self._published = {
                "waiting": len(self._waiting) + self._inbox.qsize(),
                "reading": len(self._reading),
                "running": len(self._decoder),
                **self._counts,
                **cached,
            }

    def _idle(self) -> None:
        """Do what the next requests gain from until anything arrives."""
        steps = self._idle_work()
        try:
            while not self._arrived.is_set():
                self._arrived.wait(next(steps, None))
        except Exception:
            log.exception("idle work failed")
            self._arrived.wait()
        finally:
            steps.close()

    def _idle_work(self) -> Generator[float, None, None]:
        """Refine and save what was read, then get ready for schemas; see ``Prefixes.idle_work``."""
        yield from self._prefixes.idle_work()
        yield PREPARE_AFTER_SECONDS
        self._grammars.prepare()

    def _receive(self) -> None:
        """Take in what has arrived."""
        self._arrived.clear()
        while not self._inbox.empty():
            ticket, grammar = self._inbox.get()
            try:
                self._waiting.append(Work(ticket, self._model, grammar, self._prefixes))
            except Exception as error:
                self._counts["failed"] += 1
                ticket.put(error)

    def _turn(self) -> None:
        """Drop what was cancelled, decode one step, read one slice."""
        for work in [work for work in [*self._waiting, *self._reading, *self._decoder] if work.ticket.is_cancelled]:
            self._drop(work)
            self._counts["cancelled"] += 1
        if len(self._decoder):
            self._counts["steps"] += 1
            for decoded in self._decoder.step():
                self._answer(decoded)
        self._read()
        release_buffers()

    def _read(self) -> None:
        """Read a slice of the prompt that is most urgent; after its last, choose the answer's first token."""
        has_room = len(self._reading) + len(self._decoder) < self._max_batch
        candidates = [*self._reading, *(self._waiting if has_room else [])]
        if not candidates:
            return
        work = max(candidates, key=Work.urgency)
        try:
            if work not in self._reading:
                self._waiting.remove(work)
                self._reading.append(work)
                work.begin(self._pace)
            self._counts["slices"] += 1
            self._pace.slice_ms = self._slice_ms if len(self._decoder) else max(self._slice_ms, LONE_SLICE_MS)
            if not self._slice(work):
                self._reading.remove(work)
                self._begin_answer(work)
        except Exception as error:
            self._fail(work, error)

    def _slice(self, work: Work) -> bool:
        """Read for as long as a slice lasts; returns whether anything is left."""
        end = time.perf_counter() + self._pace.slice_ms / 4e3  # one step fills a slice, but for those that are tiny
        while goes_on := work.advance(self._pace):
            if time.perf_counter() > end:
                break
        return goes_on

    def _begin_answer(self, work: Work) -> None:
        first = work.first_step()
        (token,) = first.tokens
        goes_on = work.answer(token, first.logprobs)
        work.keep()
        if goes_on:
            self._decoder.insert(work, token, first.cache)
        else:
            self._count_finished(work)

    def _answer(self, decoded: Decoded) -> None:
        """Hand over a token; when its answer ends, keep what its cache holds."""
        work = decoded.work
        try:
            if work.answer(decoded.token, decoded.logprobs):
                return
            cache, tokens = self._decoder.remove(work) or (decoded.cache, decoded.tokens)
            work.keep(cache, tokens)
            self._count_finished(work)
        except Exception as error:
            self._fail(work, error)

    def _drop(self, work: Work) -> None:
        """End a request wherever it is, and keep what was read."""
        if work in self._waiting:
            self._waiting.remove(work)
        elif work in self._reading:
            self._reading.remove(work)
            work.stop_reading()
        else:
            work.keep(*(self._decoder.remove(work) or (None, None)))

    def _fail(self, work: Work, error: BaseException) -> None:
        try:
            self._drop(work)
        except Exception:
            log.exception("what a failed request had read is not kept")
        self._counts["failed"] += 1
        work.ticket.put(error)

    def _fail_all(self, error: BaseException) -> None:
        for work in [*self._waiting, *self._reading, *self._decoder]:
            self._fail(work, error)

    def _count_finished(self, work: Work) -> None:
        self._counts["finished"] += 1
        self._mean_seconds += 0.2 * (work.seconds() - self._mean_seconds)
