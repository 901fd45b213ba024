"""A server over several hosts: the first one's scheduler decides, and tells the others each step before it takes it.

Hosts exchange sums in the midst of a model, so all have to run the same operations in the same order. The others hold
the same prompts, prefixes and batch, and do with them what they are told. How tokens are chosen and when an answer
ends, only the first host knows: of a request that was given up, the others hear that it is dropped.
"""

import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from ..bundle.loading import KVPModel
from ..device.hosts import Hosts
from ..engine.dial import Dial
from ..engine.pace import Pace
from ..errors import KVPError, UnsupportedModelError
from ..models.families import Cache
from .decoding import Batch, Decoded
from .grammar import Grammar
from .prefixes import Prefixes
from .requests import GenerationRequest
from .scheduler import PREPARE_AFTER_SECONDS, Scheduler
from .ticket import Ticket
from .work import Work, read_together


class Line:
    """Where the first host tells the others of its steps: a name, and what else they need to know."""

    def __init__(self, hosts: Hosts):
        self._hosts, self._is_within = hosts, False

    def tell(self, step: str, *what: Any) -> None:
        """Tell of a step that needs no other host."""
        self._hosts.tell({"step": step, "what": what})

    @contextmanager
    def step(self, name: str, *what: Any) -> Iterator[None]:
        """Tell of a step, unless it is part of another, and end all hosts where it fails.

        The others may wait for what does not come any more. A ``KVPError`` is about one answer, and they know nothing
        of it.
        """
        if self._is_within:
            yield
            return
        self._is_within = True
        try:
            self.tell(name, *what)
            yield
        except KVPError:
            raise
        except Exception as error:
            self._hosts.end(error)
        finally:
            self._is_within = False


class LedPace(Pace):
    """The first host's pace: the others cut where it does."""

    def __init__(self, slice_ms: float, hosts: Hosts):
        super().__init__(slice_ms)
        self._hosts = hosts

    def share(self, count: int, rows: int) -> int:
        """See ``Pace.share``."""
        share = super().share(count, rows)
        self._hosts.tell({"share": share})
        return share


class LedWork(Work):
    """A request whose steps the other hosts take as well.

    Attributes:
        number: what they know it by.
    """

    def __init__(self, number: int, line: Line, hosts: Hosts, ticket: Ticket, *own: Any):
        super().__init__(ticket, *own)
        self.number, self._line = number, line
        self.sampler = hosts.first_choice(self.sampler)

    def begin(self, pace: Pace) -> None:
        """See ``Work.begin``."""
        super().begin(pace)
        request = self.ticket.request
        self._line.tell(
            "begin",
            self.number,
            {
                "ids": self.ids,
                "dial": asdict(request.dial),
                "settled": asdict(self.dial),
                "cached": len(self.context.tokens),
                "max_tokens": self.max_tokens,
                "stable_tokens": request.stable_tokens,
                "reuse": request.reuse,
            },
        )

    def advance(self, pace: Pace) -> bool:
        """See ``Work.advance``."""
        with self._line.step("advance", self.number):
            return super().advance(pace)

    def stop_reading(self) -> None:
        """See ``Work.stop_reading``."""
        with self._line.step("stop_reading", self.number):
            super().stop_reading()

    def first_step(self) -> bool:
        """See ``Work.first_step``."""
        with self._line.step("first_step", self.number):
            return super().first_step()

    def keep(self, cache: Cache | None = None, tokens: list[int] | None = None) -> None:
        """See ``Work.keep``."""
        with self._line.step("keep", self.number, cache is not None):
            super().keep(cache, tokens)


class LedBatch(Batch):
    """A batch whose steps the other hosts take as well."""

    def __init__(self, line: Line, *own: Any):
        super().__init__(*own)
        self._line = line
        line.tell("new_batch")

    def insert(self, work: Work) -> None:
        """See ``Batch.insert``."""
        with self._line.step("insert", number_of(work)):
            super().insert(work)

    def step(self) -> list[Decoded]:
        """See ``Batch.step``."""
        with self._line.step("decode"):
            return super().step()

    def remove(self, work: Work) -> tuple[Cache, list[int]] | None:
        """See ``Batch.remove``."""
        with self._line.step("remove", number_of(work)):
            return super().remove(work)


def number_of(work: Work) -> int:
    """Return what the other hosts know a work by."""
    assert isinstance(work, LedWork)
    return work.number


class LeadingScheduler(Scheduler):
    """The first host's scheduler, which does without drafts, idle refinement and a place on disk.

    Args:
        model: this host's part of it.
        hosts: all of them.
        slice_ms: see ``Scheduler``.
        how: see there.

    Raises:
        UnsupportedModelError: caches that no batch can hold.
    """

    def __init__(self, model: KVPModel, hosts: Hosts, *, slice_ms: float, **how: Any):
        check_servable(model)
        self._hosts, self._line, self._numbers = hosts, Line(hosts), itertools.count()
        super().__init__(model, slice_ms=slice_ms, **how)
        self._pace = LedPace(slice_ms, hosts)  # no request can have come yet

    def _new_decoder(self) -> LedBatch:
        return LedBatch(self._line, self._model.base, self._max_batch)

    def _new_work(self, ticket: Ticket, grammar: Grammar | None) -> Work:
        return LedWork(next(self._numbers), self._line, self._hosts, ticket, self._model, grammar, self._prefixes)

    def _read_together(self, works: list[Work]) -> None:
        with self._line.step("read_together", list(map(number_of, works))):
            super()._read_together(works)

    def _idle_work(self) -> Generator[float, None, None]:
        yield PREPARE_AFTER_SECONDS
        self._grammars.prepare()

    def _count_finished(self, work: Work) -> None:
        super()._count_finished(work)
        self._line.tell("forget", number_of(work))

    def _drop(self, work: Work) -> None:
        super()._drop(work)
        self._line.tell("forget", number_of(work))


def check_servable(model: KVPModel) -> None:
    """Refuse a model whose answers several hosts cannot decode in one batch."""
    if not all(hasattr(layer, "merge") for layer in make_prompt_cache(model.base)):
        raise UnsupportedModelError("answers of this model cannot be decoded in a batch, as hosts do; use one host.")


class FollowingPace(Pace):
    """Another host's pace."""

    def __init__(self, hosts: Hosts):
        super().__init__(0.0)
        self._hosts = hosts

    def share(self, count: int, rows: int) -> int:
        """See ``Pace.share``."""
        message = self._hosts.hear() or {}
        return int(message["share"])


class Follower:
    """What another host holds of the first one's requests.

    Args:
        model: this host's part of it.
        hosts: all of them.
        max_batch: as the first host's.
        cache_bytes: likewise.
    """

    def __init__(self, model: KVPModel, hosts: Hosts, *, max_batch: int, cache_bytes: int):
        check_servable(model)
        self._model, self._hosts, self._max_batch = model, hosts, max_batch
        self._pace, self._prefixes = FollowingPace(hosts), Prefixes(model, cache_bytes)
        self._works: dict[int, Work] = {}
        self._grown: dict[Work, tuple[Cache, list[int]]] = {}  # caches of answers that ended, and what these hold

    def follow(self) -> None:
        """Take the first host's steps until it has finished."""
        steps: dict[str, Callable[..., Any]] = {
            "new_batch": self._new_batch,
            "begin": self._begin,
            "read_together": self._read_together,
            "advance": lambda number: self._works[number].advance(self._pace),
            "stop_reading": lambda number: self._works[number].stop_reading(),
            "first_step": lambda number: self._works[number].first_step(),
            "insert": lambda number: self._batch.insert(self._works[number]),
            "decode": self._decode,
            "remove": self._remove,
            "keep": self._keep,
            "forget": self._forget,
        }
        while (message := self._hosts.hear()) is not None:
            steps[message["step"]](*message["what"])

    def _new_batch(self) -> None:
        self._batch = Batch(self._model.base, self._max_batch)

    def _begin(self, number: int, what: dict[str, Any]) -> None:
        """Begin a request; the first host has settled how it is read, since calibration is each machine's own."""
        settled, cached = Dial(**what.pop("settled")), what.pop("cached")
        request = GenerationRequest(**what | {"dial": Dial(**what["dial"])})
        work = self._works[number] = Work(Ticket(request), self._model, None, self._prefixes)
        work.sampler = self._hosts.first_choice(work.sampler)
        work.begin(self._pace)
        if (known := len(work.context.tokens)) != cached:
            raise KVPError(f"{known} tokens of a prompt are known here, {cached} on the first host; please report it.")
        work.dial = settled

    def _read_together(self, numbers: list[int]) -> None:
        read_together([self._works[number] for number in numbers], self._pace)

    def _decode(self) -> None:
        for decoded in self._batch.step():
            if decoded.cache is not None and decoded.tokens is not None:
                self._grown[decoded.work] = decoded.cache, decoded.tokens

    def _remove(self, number: int) -> None:
        if (grown := self._batch.remove(self._works[number])) is not None:
            self._grown[self._works[number]] = grown

    def _keep(self, number: int, is_grown: bool) -> None:
        work = self._works[number]
        work.keep(*(self._grown.pop(work) if is_grown else ()))

    def _forget(self, number: int) -> None:
        if work := self._works.pop(number, None):  # a request that never began is unknown
            self._grown.pop(work, None)
