"""The directory beside a bundle in which a training run keeps its log, its state and its start; one run at a time."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from ..errors import InputError
from ..files import claim
from ..files.directories import atomic_directory, require_free
from .state import STATE_FILE

LOCK = "lock"


def training_directory(out: Path) -> Path:
    """Return where a run keeps its log, its state and its picture: beside the bundle that it writes."""
    place = out if out.name not in ("", "..") else Path(os.path.abspath(out))
    return place.parent / f"{place.name}.training"


def starting_bundle(out: Path) -> Path:
    """Return where a run keeps a copy of the bundle that it began with."""
    return training_directory(out) / "start"


@contextlib.contextmanager
def sole_run(out: Path) -> Iterator[None]:
    """Keep other processes from training into ``out`` while the block lasts.

    The lock is the system's, so it ends with the process, however that ends. A run's own processes share it.

    Raises:
        InputError: another process has it, or the place cannot be written.
    """
    if mx.distributed.init().rank() > 0:
        yield
        return
    directory = training_directory(out)
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / LOCK, "a", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error.strerror}; choose another --out.") from error
    with file:
        if not (claim(file) and _is_still(directory / LOCK, file.fileno())):
            raise InputError(f"another process is training into {out}; wait for its end, or choose another --out.")
        try:
            yield
        finally:
            (directory / LOCK).unlink(missing_ok=True)
            for place in missing:
                with contextlib.suppress(OSError):  # something is in it
                    place.rmdir()


def _is_still(path: Path, file: int) -> bool:
    """Return whether a path leads to an open file, which another process may have removed."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def begin(start: Path, directory: Path) -> None:
    """Begin a run's directory, with a copy of what it starts from, which ``--resume`` needs and ``fit`` may remove."""
    for name in (STATE_FILE, f".{STATE_FILE}", "log.jsonl", "loss.png"):
        (directory / name).unlink(missing_ok=True)
    with atomic_directory(directory / "start") as work:
        shutil.copytree(start, work, dirs_exist_ok=True)


def check_begun(out: Path, resume: bool, force: bool) -> None:
    """Refuse to resume what was not begun, and to begin where something is.

    Raises:
        InputError: see ``require_unstarted``.
    """
    directory = training_directory(out)
    if not resume:
        require_unstarted(out, force)
        return
    if not (directory / STATE_FILE).is_file():
        raise InputError(f"{directory} holds no unfinished run; leave --resume out to start one.")
    require_free(out, force=True)


def require_unstarted(out: Path, force: bool) -> None:
    """Refuse to begin where a bundle is, or a run that was not finished.

    Raises:
        InputError: one of the two, and no ``force``; or something else in the run's place.
    """
    directory = training_directory(out)
    if os.path.lexists(directory) and not _is_run(directory):
        raise InputError(f"{directory} is in the way and no training run; move it, or choose another --out.")
    if (directory / STATE_FILE).exists() and not force:
        raise InputError(f"{directory} holds a run already; go on with --resume, or start again with --force.")
    require_free(out, force)


def _is_run(directory: Path) -> bool:
    """Return whether a directory is a run's, or one that a kill left before it was."""
    if not directory.is_dir():
        return False
    names = {path.name for path in directory.iterdir() if not path.name.startswith(".start.")}
    return names <= {LOCK} or (directory / "start").is_dir()
