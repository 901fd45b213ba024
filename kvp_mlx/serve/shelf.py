"""Contexts on disk, in the format of saved caches; they are written beside all other work."""

import contextlib
import logging
import queue
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..bundle.loading import KVPModel
from ..engine.cache_format import (
    SavedCache,
    base_fingerprint,
    predictor_fingerprint,
    read_context,
    read_saved,
    write_context,
)
from ..engine.context import Context
from ..engine.dial import Dial
from ..errors import InputError, KVPError
from ..files import private_directory
from ..files.directories import directory_bytes, remove_directory, sweep

NAME = re.compile(r"[0-9a-f]{24}")
log = logging.getLogger(__name__)


class Shelf:
    """A directory of contexts; one at a time is written, by a thread that never ends (see ``engine.worker``).

    Args:
        model: whose contexts they are; those of others count, and are the first to go.
        directory: for these alone; nobody else can look into it.
        limit_bytes: what all may take.
    """

    def __init__(self, model: KVPModel, directory: Path, limit_bytes: int):
        self._model, self._directory, self._limit = model, private_directory(directory), limit_bytes
        self._sizes: dict[Path, int] = {}
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue()
        threading.Thread(target=self._work, name="kvp-shelf", daemon=True).start()

    @property
    def nbytes(self) -> int:
        """What is on disk."""
        return sum(self._sizes.copy().values())

    @property
    def is_writing(self) -> bool:
        """Whether anything is being written or removed."""
        return self._jobs.unfinished_tasks > 0

    def find(self) -> Iterator[tuple[Path, SavedCache]]:
        """Yield what earlier processes saved of this model, least recently used first."""
        sweep(self._directory)
        base, predictor = base_fingerprint(self._model), predictor_fingerprint(self._model)
        places = [place for place in self._directory.iterdir() if NAME.fullmatch(place.name) and place.is_dir()]
        self._sizes = {place: directory_bytes(place) for place in places}
        for place in sorted(places, key=_last_used):
            try:
                saved = read_saved(place)
            except KVPError:
                self._lose(place)
                continue
            if saved.base == base and saved.predictor in (None, predictor):
                yield place, saved
            elif self.nbytes > self._limit:
                self.remove(place)

    def load(self, place: Path) -> Context | None:
        """Return a context, or None where it is damaged or gone."""
        try:
            return read_context(self._model, place, read_saved(place))
        except (KVPError, OSError):
            self._lose(place)
            return None

    def write(self, context: Context, dial: Dial | None, *, replacing: Path | None) -> Path:
        """Begin to write a context as it is now; returns where.

        Args:
            context: see above.
            dial: that predicted any of it.
            replacing: an earlier state of it, removed when this one is on disk.
        """
        place = self._directory / secrets.token_hex(12)
        snapshot = context.copy(len(context.tokens)).compacted()
        self._jobs.put(lambda: self._write(snapshot, dial, place, replacing))
        return place

    def holds(self, place: Path | None) -> bool:
        """Return whether a context that is to be written there is on disk."""
        return place in self._sizes

    def remove(self, place: Path) -> None:
        """Remove what is on disk, or will be."""
        self._sizes.pop(place, None)
        self._jobs.put(lambda: self._remove(place))

    def _lose(self, place: Path) -> None:
        if self.holds(place) and place.exists():  # and is not on its way out
            log.warning("a saved conversation is damaged or of another version; it is removed")
        self.remove(place)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except Exception as error:
                log.warning("a conversation is not kept for the next start (%s)", type(error).__name__)
            finally:
                del job
                self._jobs.task_done()

    def _write(self, context: Context, dial: Dial | None, place: Path, replaced: Path | None) -> None:
        try:
            write_context(context, place, "conversation", dial=None if dial is None else asdict(dial))
            self._sizes[place] = directory_bytes(place)
        finally:  # of a state that could not be written nobody knows the earlier one any more
            if replaced is not None:
                self._remove(replaced)

    def _remove(self, place: Path) -> None:
        self._sizes.pop(place, None)  # first, so that nobody thinks it damaged meanwhile
        with contextlib.suppress(OSError):
            remove_directory(place)


def dial_from(saved: dict[str, Any] | None) -> Dial | None:
    """Return the dial that was saved with a context."""
    try:
        return None if saved is None else Dial(**saved)
    except (TypeError, InputError):  # of another version
        return None


def _last_used(place: Path) -> float:
    try:
        return (place / "cache.json").stat().st_mtime
    except OSError:
        return 0.0
