"""Files: outputs that appear whole or not at all, hashes, and where the user's cache lives."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError


def cache_dir() -> Path:
    """Return the per-user directory for converted models (``KVP_CACHE_DIR`` overrides it)."""
    if override := os.environ.get("KVP_CACHE_DIR"):
        return Path(override).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "kvp-mlx"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvp-mlx"


def require_free(out: Path, force: bool) -> None:
    """Refuse to overwrite ``out`` unless ``force``; call it before any work is done.

    Raises:
        InputError: ``out`` exists and ``force`` is false, or it is no directory that we could replace.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} exists and is not a directory; choose another --out.")
    if out.exists() and any(out.iterdir()) and not force:
        raise InputError(f"{out} already exists; choose another --out or pass --force to replace it.")
    if force and out.exists() and not {"kvp.json", "config.json"} & {p.name for p in out.iterdir()}:
        raise InputError(f"{out} holds neither kvp.json nor config.json, so --force will not replace it.")


@contextlib.contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``out`` that takes its place when the block ends without an error."""
    out = Path(out).absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; choose another place.") from error
    try:
        yield work
        work.chmod(0o755)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            out.replace(old)
            work.replace(out)
            shutil.rmtree(old)
        else:
            work.replace(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON with a final newline."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
