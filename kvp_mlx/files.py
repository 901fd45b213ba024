"""Files: outputs that appear whole or not at all, hashes, and where the user's cache lives."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import InputError

STALE_SECONDS = 24 * 3600


def cache_dir() -> Path:
    """Return the per-user directory for converted models (``KVP_CACHE_DIR`` overrides it)."""
    if override := os.environ.get("KVP_CACHE_DIR"):
        return Path(override).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "kvp-mlx"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvp-mlx"


def require_free(out: Path, force: bool, *, sources: Iterable[Path] = (), marker: str = "kvp.json") -> None:
    """Refuse to write a directory where something else would be lost; call it before any work is done.

    Args:
        out: directory to be written.
        force: an existing directory of the same kind may be replaced (nothing else ever is).
        marker: the file that tells this kind: kvp.json for a bundle, config.json for a model.
        sources: files and directories that the work reads, which must not be the output, inside it or around it.

    Raises:
        InputError: ``out`` exists and may not be replaced, or overlaps a source.
    """
    place = Path(os.path.realpath(out))  # unlike resolve(), calm about links that lead in circles
    for source in (Path(os.path.realpath(path)) for path in sources):
        if place == source or place in source.parents or source in place.parents:
            raise InputError(f"{out} overlaps {source}, which is read; choose another --out.")
    if place.is_symlink():
        raise InputError(f"{out} is a link that leads in circles; choose another --out.")
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not (place / marker).exists():
        kind = "a bundle" if marker == "kvp.json" else "a model directory"
        raise InputError(f"{out} exists and is not {kind}, so it is not replaced; choose another --out.")
    if not force:
        raise InputError(f"{out} already exists; choose another --out or pass --force to replace it.")


@contextlib.contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``out`` that takes its place when the block ends without an error.

    Raises:
        InputError: the place cannot be written.
    """
    out = Path(out).resolve()
    work, old = (out.with_name(f".{out.name}.{secrets.token_hex(4)}") for _ in range(2))
    try:  # named before it is made, so that no moment is left in which a signal could orphan it
        try:
            if out.exists():  # otherwise what a kill left aside may be the only copy
                _sweep(out)
            work.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"cannot write {out}: {error.strerror}; choose another place.") from error
        yield work
        _exchange(work, out, old)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _exchange(work: Path, out: Path, old: Path) -> None:
    """Move ``work`` to ``out``, and what was there to ``old``, putting it back if that fails."""
    if not out.exists():
        work.replace(out)
        return
    out.replace(old)
    try:
        work.replace(out)
    except OSError:
        old.replace(out)
        raise
    shutil.rmtree(old)


def _sweep(out: Path) -> None:
    """Remove what killed commands left beside ``out`` more than a day ago."""
    for left in out.parent.glob(f".{out.name}.????????"):
        if left.is_dir() and time.time() - left.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON with a final newline; see ``write_text``."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all, and its folder where that is missing.

    Raises:
        InputError: the place cannot be written.
    """
    place = Path(os.path.realpath(path))
    is_device = place.exists() and not place.is_file()  # /dev/stdout
    work = place if is_device else place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        work.write_text(text, encoding="utf-8")
        if not is_device:
            work.replace(place)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place.") from error
    finally:
        if not is_device:
            with contextlib.suppress(OSError):
                work.unlink()


def check_writable(*files: Path | None) -> None:
    """Refuse a file that could not be written, before any work is done.

    Raises:
        InputError: a folder, or a file in no folder.
    """
    for file in files:
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise InputError(f"{file} is a folder or lies in none; name a file.")
