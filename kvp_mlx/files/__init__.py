"""Files that appear whole or not at all, JSON, hashes, and the user's cache."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import InputError

MAX_NESTING = 100
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as its own library has it
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def cache_dir() -> Path:
    """Return the per-user directory for converted models (``KVP_CACHE_DIR`` overrides it)."""
    if override := os.environ.get("KVP_CACHE_DIR"):
        return expanded(override)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "kvp-mlx"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvp-mlx"


def expanded(name: str | Path) -> Path:
    """Return the path that a name means, ``~`` being the user's home; one of an unknown user's stays as it is."""
    return Path(os.path.expanduser(name))


_unfinished: set[Path] = set()


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Hold a place of temporary files, which are removed at the end, however that comes."""
    _unfinished.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _unfinished.discard(path)


def remove_unfinished() -> None:
    """Remove what is only half written, where the program is about to end without its blocks."""
    for path in list(_unfinished):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def private_directory(path: Path) -> Path:
    """Make a directory that nobody but the user can look into, if it is missing, and return it.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; set KVP_CACHE_DIR elsewhere.") from error
    make_private(path)
    return path


def make_private(*paths: Path) -> None:
    """Take away everybody else's rights to files and directories, where they are the user's to give."""
    for path in paths:
        with contextlib.suppress(OSError):
            if path.stat().st_mode & 0o077:
                path.chmod(path.stat().st_mode & 0o700)


def read_json(path: Path) -> Any:
    """Return the document of a JSON file; see ``parse_json``.

    Raises:
        InputError: no JSON that can be used.
        OSError: the file cannot be read.
    """
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """Return what a JSON text says, whoever wrote it.

    Args:
        text: UTF-8, with or without a byte order mark.
        where: what an error calls it.

    Raises:
        InputError: no JSON, nested too deeply to be walked through, or with half a character (a lone surrogate).
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        data = json.loads(text)
        if text.count("[") + text.count("{") > MAX_NESTING:
            _check_nesting(data)
        if ESCAPED_SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start}); convert it first.") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half a character (a lone surrogate); write it anew as UTF-8.") from error
    except RecursionError as error:
        raise InputError(f"{where} is nested more than {MAX_NESTING} deep, which no file of this kind is.") from error
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}).") from error
    return data


def _check_nesting(data: Any) -> None:
    level = [data]
    for _ in range(MAX_NESTING):
        inside = (
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list)
        )
        level = [child for children in inside for child in children]
        if not level:
            return
    raise RecursionError


def tensor_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a safetensors file's header, as it says, and where the data begins.

    Raises:
        InputError: no safetensors file.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else MAX_HEADER_BYTES + 1
        header = parse_json(file.read(length), str(path)) if length <= min(size - 8, MAX_HEADER_BYTES) else None
    if not isinstance(header, dict):
        raise InputError(f"{path} is not a safetensors file.")
    return header, 8 + length


def claim(file: int | IO[Any]) -> bool:
    """Take the system's lock of an open file, which ends with the process, unless another process has it.

    On a file system without locks everybody gets it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: Any, *, private: bool = False) -> None:
    """Write ``data`` as indented JSON with a final newline; see ``write_text``."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n", private=private)


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a file that appears whole or not at all, and its folder where that is missing.

    Args:
        path: the file.
        text: what it is to hold.
        private: nobody but the user may read it, nor look into a folder that is made for it.

    Raises:
        InputError: the place cannot be written, or what it is to hold is no text: the name of a file, say.
    """
    place = Path(os.path.realpath(path))
    is_device = place.exists() and not place.is_file()  # /dev/stdout
    work = place if is_device else place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        with contextlib.nullcontext() if is_device else unfinished(work):
            if private:
                private_directory(place.parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(work, "w", encoding="utf-8", opener=_private_opener if private else None) as file:
                file.write(text)
            if not is_device:
                work.replace(place)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place.") from error
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 20) : error.end + 20]
        raise InputError(f"{path} cannot hold {near!a}, which is no text; if it names a file, rename that.") from error


def _private_opener(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def check_writable(*files: Path | None) -> None:
    """Refuse a file that could not be written, before any work is done.

    Raises:
        InputError: a folder, a file in no folder, or one file for two things.
    """
    named = [file for file in files if file is not None]
    for number, file in enumerate(named):
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise InputError(f"{file} is a folder or lies in none; name a file.")
        if file.resolve() in [other.resolve() for other in named[:number]] and not file.is_char_device():
            raise InputError(f"{file} is to be written twice; name two files.")
