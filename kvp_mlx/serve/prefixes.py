"""What was read before: the contexts of past requests, found again by their longest common prefix with a prompt.

mlx-lm's ``LRUPromptCache`` has the same task, but its entries are either there or not: here a context is exact up to
some token and predicted behind it, is refined while nothing else runs, and may be on disk only.
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bundle.loading import KVPModel
from ..engine.context import Context
from ..engine.dial import Dial
from ..engine.refining import idle_work
from .shelf import Shelf, dial_from

SAVE_AFTER_SECONDS = 1.0
"""Of quiet: a turn that follows at once replaces what would be saved."""
POLL_SECONDS = 0.05


@dataclass(eq=False)
class Entry:
    """One conversation as it was read, in memory, on disk or both.

    Attributes:
        tokens: what it holds (T,).
        exact_tokens: how many of the first have full prefill's entries.
        dial: what asked for the prediction of the others; no other dial's request gets to see those.
        stable_tokens: how many of the first belong to every turn, and outlive the others.
        can_be_cut: whether a beginning of it can be used as well.
        context: None where it is on disk only.
        place: a directory that holds it, or an earlier state of it.
        is_saved: whether that is as it is in memory.
        nbytes: what it takes in memory.
    """

    tokens: np.ndarray
    exact_tokens: int
    dial: Dial | None = None
    stable_tokens: int = 0
    can_be_cut: bool = True
    context: Context | None = None
    place: Path | None = None
    is_saved: bool = False
    nbytes: int = 0

    def __post_init__(self) -> None:
        """Measure the context."""
        self.hold(self.context)

    def hold(self, context: Context | None) -> None:
        """Take over a context, or let it go."""
        self.context, self.nbytes = context, 0 if context is None else context.nbytes

    def shared(self, ids: np.ndarray, dial: Dial | None) -> int:
        """Return how many tokens of a prompt can be taken from here: exact ones, or what the same dial predicted."""
        length = min(len(self.tokens), len(ids))
        differs = self.tokens[:length] != ids[:length]
        common = int(differs.argmax()) if differs.any() else length
        usable = common if dial == self.dial else min(common, self.exact_tokens)
        return usable if self.can_be_cut or usable == len(self.tokens) else 0

    def covers(self, other: "Entry") -> bool:
        """Return whether nothing is lost without the other."""
        is_whole = self.can_be_cut or len(self.tokens) == len(other.tokens)
        is_longer = is_whole and self.shared(other.tokens, other.dial) == len(other.tokens)
        return is_longer and self.exact_tokens >= other.exact_tokens

    @property
    def can_be_refined(self) -> bool:
        """Whether some of it was predicted and can be read exactly."""
        return self.exact_tokens < len(self.tokens) and (self.context is None or self.context.can_be_saved)


class Prefixes:
    """Contexts of past requests, bounded in bytes in memory and again on disk; used on the MLX thread alone.

    Args:
        model: the bundle.
        cache_bytes: what all may take in memory, and likewise on disk; the least recently used go first.
        cache_dir: where they outlive the process, or None.
    """

    def __init__(self, model: KVPModel, cache_bytes: int, cache_dir: Path | None = None):
        self._model, self._limit = model, cache_bytes
        self._entries: list[Entry] = []  # least recently used first
        self._used = time.monotonic()
        self._shelf = None if cache_dir is None else Shelf(model, cache_dir, cache_bytes)
        if self._shelf is not None:
            can_be_cut = Context(model).is_plain
            for place, saved in self._shelf.find():
                tokens, dial = np.array(saved.tokens, np.int64), dial_from(saved.dial)
                entry = Entry(tokens, saved.exact_tokens, dial, 0, can_be_cut, place=place, is_saved=True)
                self._entries.append(entry)
            self._make_room_on_disk()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """What all take in memory."""
        return sum(entry.nbytes for entry in self._entries)

    @property
    def disk_bytes(self) -> int:
        """What all take on disk."""
        return 0 if self._shelf is None else self._shelf.nbytes

    def shared(self, ids: list[int], dial: Dial) -> int:
        """Return how many of a prompt's first tokens ``take`` would find."""
        prompt = np.array(ids)
        return max((entry.shared(prompt, dial) for entry in self._entries), default=0)

    def take(self, ids: list[int], dial: Dial) -> Context:
        """Return a context of its own that holds as much of the beginning of a prompt as is known.

        Args:
            ids: the prompt, without the tokens that are to be read in any case.
            dial: of the request; what another dial predicted, and what was read on top of that, is left out.
        """
        self._used, prompt = time.monotonic(), np.array(ids)
        found = [(length, entry) for entry in self._entries if (length := entry.shared(prompt, dial))]
        for _, entry in sorted(found, key=lambda each: each[0], reverse=True):
            if (context := self._context_of(entry)) is not None:
                self._touch(entry)
                return context.copy(entry.shared(prompt, dial))
        return Context(self._model)

    def put(self, context: Context, dial: Dial, stable_tokens: int = 0) -> None:
        """Keep a context, which nobody else may use any more; what it makes superfluous goes.

        Args:
            context: see above.
            dial: of the request that predicted any of it.
            stable_tokens: see ``Entry``.
        """
        self._used = time.monotonic()
        if context.tokens:
            tokens = np.array(context.tokens)
            self._insert(Entry(tokens, context.exact_tokens, dial, stable_tokens, context.is_plain, context))
            self._make_room()

    def _insert(self, entry: Entry) -> None:
        """Add an entry unless another covers it; it takes the place on disk of those that it covers."""
        if (other := next((other for other in self._entries if other.covers(entry)), None)) is not None:
            other.stable_tokens = max(other.stable_tokens, entry.stable_tokens)
            self._touch(other)
            return
        for other in [other for other in self._entries if entry.covers(other)]:
            entry.stable_tokens = max(entry.stable_tokens, other.stable_tokens)
            entry.place, other.place = other.place or entry.place, entry.place if other.place else None
            self._remove(other)
        self._entries.append(entry)

    def _touch(self, entry: Entry) -> None:
        self._entries.remove(entry)
        self._entries.append(entry)

    def _remove(self, entry: Entry) -> None:
        self._entries.remove(entry)
        if self._shelf is not None and entry.place is not None:
            self._shelf.remove(entry.place)

    def _make_room(self) -> None:
        """Let the least recently used go: from memory, where they are on disk, or but for their stable part."""
        while self.nbytes > self._limit:
            entry = next(entry for entry in self._entries if entry.context is not None)
            stable = min(entry.stable_tokens, entry.exact_tokens)
            if entry.is_saved and self._shelf is not None and self._shelf.holds(entry.place):
                entry.hold(None)
                continue
            self._remove(entry)
            if entry.context is not None and entry.can_be_cut and 0 < stable < len(entry.tokens):
                context = entry.context.copy(stable).compacted()
                self._insert(Entry(entry.tokens[:stable], stable, entry.dial, stable, context=context))

    def _make_room_on_disk(self) -> None:
        while self.disk_bytes > self._limit and any(entry.place for entry in self._entries):
            self._remove(next(entry for entry in self._entries if entry.place))

    def _context_of(self, entry: Entry) -> Context | None:
        """Return an entry's context, from disk where it must be; a damaged one goes.

        What is on disk may be an earlier state, less of it exact.
        """
        if entry.context is None and self._shelf is not None and entry.place is not None:
            entry.hold(self._shelf.load(entry.place))
            if entry.context is None:
                self._remove(entry)
                return None
            entry.exact_tokens = entry.context.exact_tokens
            self._touch(entry)
            self._make_room()
        return entry.context

    def idle_work(self) -> Generator[float, None, None]:
        """Refine and save, as long as nothing else runs; yields how many seconds the next step may wait."""
        for _ in self._refining():
            self._save_next()
            yield 0.0
        while self._save_next():
            yield POLL_SECONDS

    def _refining(self) -> Iterator[None]:
        """Make exact what was predicted, first the conversation that has waited longest; see ``engine.refining``."""
        while (entry := next((entry for entry in self._entries if entry.can_be_refined), None)) is not None:
            if (context := self._context_of(entry)) is None:
                continue
            try:
                yield from idle_work(context)
            finally:
                entry.exact_tokens, entry.nbytes = context.exact_tokens, context.nbytes
                if context.exact_tokens == len(entry.tokens):
                    entry.is_saved = False

    def save_all(self) -> None:
        """Write what is not on disk yet, remove what has no room there, and wait for both."""
        self._used = 0.0
        while self._save_next() or (self._shelf is not None and self._shelf.is_writing):
            time.sleep(0.01)

    def _save_next(self) -> bool:
        """Begin to write the next entry, unless one is being written; returns whether anything is left to do."""
        if self._shelf is None:
            return False
        if self._shelf.is_writing:
            return True
        self._make_room_on_disk()
        entry = next((entry for entry in self._entries if not entry.is_saved), None)
        if entry is None or entry.context is None or not entry.context.can_be_saved:
            return False
        if time.monotonic() > self._used + SAVE_AFTER_SECONDS:
            entry.place, entry.is_saved = self._shelf.write(entry.context, entry.dial, replacing=entry.place), True
        return True
