"""Work in slices: prompts are read by generators that pause between groups of layers, so that others get a turn."""

import time
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work that pauses at every yield and ends with a value."""


class Pace:
    """How often work pauses: about every ``slice_ms``, as far as whole layers allow.

    Attributes:
        slice_ms: may be changed at any pause.
    """

    def __init__(self, slice_ms: float):
        self.slice_ms = slice_ms
        self._ms_per_row: float | None = None  # of one layer, as it was last measured
        self._rows = 0  # times layers, that were handed out for the step which runs

    def advance(self, steps: Iterator[None]) -> bool:
        """Run work up to its next pause; returns whether it goes on."""
        start = time.perf_counter()
        goes_on = next(steps, self) is not self
        if self._rows:
            self._ms_per_row = 1e3 * (time.perf_counter() - start) / self._rows
            self._rows = 0
        return goes_on

    def share(self, count: int, rows: int) -> int:
        """Return how many of ``count`` layers, which read ``rows`` tokens each, to run before the next pause."""
        fitting = 1 if self._ms_per_row is None else int(self.slice_ms / (self._ms_per_row * rows))
        share = max(1, min(count, fitting))
        self._rows = share * rows
        return share


def groups(pace: Pace | None, layers: int, rows: int) -> Iterator[slice]:
    """Cut layers into groups with a pause behind each; without a pace they are one.

    Args:
        pace: of the work.
        layers: how many there are.
        rows: tokens that each reads.
    """
    first = 0
    while first < layers:
        last = layers if pace is None else first + pace.share(layers - first, rows)
        yield slice(first, last)
        first = last


def finish(steps: Steps[T]) -> T:
    """Run work to its end, and return its value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
