"""Requests from many callers on the one thread that runs MLX: read in slices between the steps of those that decode."""

import logging
import math
import queue
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..bundle.loading import KVPModel
from ..device.streams import release_buffers
from ..engine.pace import Pace
from ..engine.prompt import check_window
from ..engine.speculative import NO_DRAFTS, Drafting
from ..errors import InputError, KVPError
from .decoding import Decoded, Decoder, decoder_for
from .grammar import Grammar, Grammars
from .prefixes import Prefixes
from .requests import GenerationRequest
from .ticket import QueueFullError, Ticket
from .work import Work, read_together

__all__ = ["QueueFullError", "Scheduler", "Ticket"]

CACHE_BYTES = 4 << 30
"""Of past requests' contexts, in memory and again on disk, unless told otherwise."""
REFINE_AFTER_SECONDS = 0.25
"""Of nothing to do: an agent's next request comes at once, and would wait for what was begun."""
PREPARE_AFTER_SECONDS = 2.0
"""Of nothing to do."""
LONE_SLICE_MS = 250.0
"""Where nothing decodes, a slice keeps only newcomers and cancellations waiting."""
BURST_TOKENS = 1280
"""Prompts that wait together and have no more tokens than that in all are read together and begin their answers
together, where nothing decodes: matmuls of more rows are quicker, and a step of eight answers costs two of one."""
PREPARED_SECONDS = 0.03
"""How long a short prompt waits, to be read together with them, for requests that are being prepared."""
log = logging.getLogger(__name__)


class Scheduler:
    """Answers requests, several at a time; everything but its public methods is its thread's.

    Args:
        model: the bundle; it needs a tokeniser.
        max_batch: requests that are read or decoded at a time.
        queue_limit: requests that may wait beyond those.
        slice_ms: how long, about, reading holds up those that decode; or as long as a step of theirs takes.
        cache_bytes: what past requests' contexts may take in memory, and again on disk.
        cache_dir: where they outlive the process.
        drafting: of answers that are decoded alone.

    Raises:
        InputError: no tokeniser, a ``cache_dir`` that cannot be written, or an auxiliary that cannot draft.
    """

    def __init__(
        self,
        model: KVPModel,
        *,
        max_batch: int = 8,
        queue_limit: int = 64,
        slice_ms: float = 200.0,
        cache_bytes: int = CACHE_BYTES,
        cache_dir: Path | None = None,
        drafting: Drafting = NO_DRAFTS,
    ):
        self._model, self._max_batch, self._limit, self._slice_ms = model, max_batch, queue_limit, slice_ms
        self._drafting = drafting.settled(model, is_quantised=False)
        self._grammars = Grammars(model.text_tokenizer)
        self._inbox: queue.SimpleQueue[tuple[Ticket, Grammar | None]] = queue.SimpleQueue()
        self._arrived = threading.Event()
        self._expected = 0  # requests that are being prepared
        self._lock = threading.Lock()
        self._mean_seconds = 1.0  # that a request takes, its queue left out
        self._deadline: float | None = None  # of the work that is there when the scheduler closes
        self._waiting: list[Work] = []
        self._reading: list[Work] = []
        self._ready: list[Work] = []  # read, their answers not begun
        self._counts = dict.fromkeys(("requests", "finished", "cancelled", "failed", "slices", "steps"), 0)
        self._published: dict[str, int] = {}
        self._pace, self._step_ms = Pace(slice_ms), 0.0
        self._ended = threading.Event()
        self._prefixes = Prefixes(model, cache_bytes, cache_dir)
        self._decoder = self._new_decoder()
        self._publish()
        threading.Thread(target=self._run, name="kvp-mlx", daemon=True).start()

    def _new_decoder(self) -> Decoder:
        return decoder_for(self._model, self._max_batch, self._drafting, self._slice_ms)

    @property
    def capacity(self) -> int:
        """How many requests may be there at a time: those at work, and those that wait."""
        return self._max_batch + self._limit

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Let idle work rest while a request is being prepared, or it waits for a step; on any thread."""
        with self._lock:
            self._expected += 1
        try:
            yield
        finally:
            with self._lock:
                self._expected -= 1
            self._arrived.set()

    def submit(self, request: GenerationRequest) -> Ticket:
        """Queue a request; may be called from any thread.

        Raises:
            InputError: a prompt that is empty, too long or of other tokens than the model's, a schema that cannot be
                followed, or a dial that the bundle cannot follow.
            QueueFullError: as many wait as may.
            KVPError: the scheduler is closing.
        """
        self._check(request)
        request = replace(request, dial=request.dial.at(self._model.config, len(request.ids)))
        grammar = None if request.grammar is None else self._grammars.compile(request.grammar)
        ticket = Ticket(request, on_cancel=self._arrived.set)
        with self._lock:
            if self._deadline is not None:
                raise KVPError("the server is stopping.")
            there = sum(self._published[name] for name in ("waiting", "reading", "running"))
            if there >= self.capacity:
                waiting = self._published["waiting"]
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
        words = self._model.vocabulary_size
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
                    self._decoder = self._new_decoder()
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
        return bool(self._at_work() or not self._inbox.empty())

    def _at_work(self) -> list[Work]:
        return [*self._waiting, *self._reading, *self._ready, *self._decoder]

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
                "reading": len(self._reading) + len(self._ready),
                "running": len(self._decoder),
                **self._counts,
                **cached,
            }

    def _idle(self) -> None:
        """Do what the next requests gain from until anything arrives."""
        steps = self._idle_work()
        try:
            while not self._arrived.is_set():
                self._arrived.wait(None if self._expected else next(steps, None))
        except Exception:
            log.exception("idle work failed")
            self._arrived.wait()
        finally:
            steps.close()

    def _idle_work(self) -> Generator[float, None, None]:
        """Refine and save what was read, then get ready for schemas; see ``Prefixes.idle_work``."""
        yield REFINE_AFTER_SECONDS
        yield from self._prefixes.idle_work()
        yield PREPARE_AFTER_SECONDS
        self._grammars.prepare()

    def _receive(self) -> None:
        """Take in what has arrived."""
        self._arrived.clear()
        while not self._inbox.empty():
            ticket, grammar = self._inbox.get()
            try:
                self._waiting.append(self._new_work(ticket, grammar))
            except Exception as error:
                self._counts["failed"] += 1
                ticket.put(error)

    def _new_work(self, ticket: Ticket, grammar: Grammar | None) -> Work:
        return Work(ticket, self._model, grammar, self._prefixes)

    def _turn(self) -> None:
        """Drop what was cancelled, decode one step, read one slice."""
        for work in [work for work in self._at_work() if work.ticket.is_cancelled]:
            self._drop(work)
            self._counts["cancelled"] += 1
        self._decode()
        self._read()
        if self._ready and not self._awaits_others():
            self._begin_answers()
        release_buffers()

    def _decode(self) -> None:
        if len(self._decoder):
            self._counts["steps"] += 1
            start = time.perf_counter()
            for decoded in self._decoder.step():
                self._answer(decoded)
            self._step_ms = 1e3 * (time.perf_counter() - start)

    def _next_to_read(self) -> Work | None:
        """Return the work whose prompt is most urgent."""
        has_room = len(self._reading) + len(self._ready) + len(self._decoder) < self._max_batch
        return max([*self._reading, *(self._waiting if has_room else [])], key=Work.urgency, default=None)

    def _read(self) -> None:
        """Read a slice of the prompt that is most urgent."""
        if (work := self._next_to_read()) is None:
            return
        try:
            if work not in self._reading:
                self._begin(work)
            self._counts["slices"] += 1
            least = self._step_ms if len(self._decoder) else LONE_SLICE_MS  # who refines leaves half the time
            self._pace.slice_ms = max(self._slice_ms, least)
            if not self._slice(work):
                self._reading.remove(work)
                self._ready.append(work)
                if self._waiting:  # and may have the same beginning
                    work.keep()
        except Exception as error:
            self._fail(work, error)

    def _await_prepared(self) -> None:
        """Take in what is being prepared, unless that takes long."""
        end = time.monotonic() + PREPARED_SECONDS
        while self._expected and (seconds := end - time.monotonic()) > 0:
            self._arrived.wait(seconds)
            self._receive()

    def _begin(self, work: Work) -> None:
        """Begin to read a prompt; where nothing decodes, in one batch with others that wait and are about as short."""
        if not len(self._decoder) and 2 * work.left <= BURST_TOKENS:
            self._await_prepared()
        together, room = [work], self._max_batch - len(self._reading) - len(self._ready)
        for other in sorted(self._waiting, key=Work.urgency, reverse=True) if not len(self._decoder) else []:
            fits = len(together) < room and sum(each.left for each in [*together, other]) <= BURST_TOKENS
            if fits and other is not work and all(each.goes_with(other) for each in together):
                together.append(other)
        for each in together:
            self._waiting.remove(each)
            self._reading.append(each)
            each.begin(self._pace)
        if len(together) > 1:
            self._read_together(together)

    def _read_together(self, works: list[Work]) -> None:
        read_together(works, self._pace)

    def _slice(self, work: Work) -> bool:
        """Read for as long as a slice lasts; returns whether anything is left."""
        end = time.perf_counter() + self._pace.slice_ms / 4e3  # one step fills a slice, but for those that are tiny
        while goes_on := work.advance(self._pace):
            if time.perf_counter() > end:
                break
        return goes_on

    def _awaits_others(self) -> bool:
        """Return whether what is read waits for the next prompt, to begin with it; it never waits for a long one."""
        if len(self._decoder) or (work := self._next_to_read()) is None:
            return False
        return sum(ready.new_tokens for ready in self._ready) + work.left <= BURST_TOKENS

    def _begin_answers(self) -> None:
        """Let what is read join those that decode; one that is alone gets its first token at once."""
        ready, self._ready = self._ready, []
        is_alone = len(ready) == 1 and not len(self._decoder)
        for work in ready:
            try:
                goes_on = not (is_alone or work.is_whole or work.is_refined) or work.first_step()
                work.keep()
                if goes_on:
                    self._decoder.insert(work)
                else:
                    self._count_finished(work)
            except Exception as error:
                self._fail(work, error)
        self._decode()  # newcomers join behind this step, so that their next tokens come with the next one

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
        elif reading := next((works for works in (self._reading, self._ready) if work in works), None):
            reading.remove(work)
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
        for work in self._at_work():
            self._fail(work, error)

    def _count_finished(self, work: Work) -> None:
        self._counts["finished"] += 1
        self._mean_seconds += 0.2 * (work.seconds() - self._mean_seconds)
