"""Directories that appear whole or not at all, what may be replaced or removed, and what killed commands left."""

import contextlib
import ctypes
import errno
import glob
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import InputError, KVPError
from . import make_private, read_json, tensor_header, unfinished

STALE_SECONDS = 24 * 3600
OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


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
    if place == place.parent or Path.cwd().is_relative_to(place):
        raise InputError(f"{out or '--out'} is the folder you are in, or above it; choose another --out.")
    recover(place)
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not (place / marker).exists():
        kind = "a bundle" if marker == "kvp.json" else "a model directory"
        raise InputError(f"{out} exists and is not {kind}, so it is not replaced; choose another --out.")
    if found := strangers(place):
        raise InputError(
            f"{out} holds {found[0]}, which is no sound part of a bundle or model, so nothing is replaced; move it, or "
            "choose another --out."
        )
    if not force:
        raise InputError(f"{out} already exists; choose another --out or pass --force to replace it.")


def strangers(directory: Path, *, by_name: bool = False) -> list[str]:
    """Return what in a directory is not of our making, by name: only a directory without any may be removed.

    Of our making are the files that bundles, mlx-lm models, saved caches and training runs consist of, where they can
    be read as what their names say. A link never is, wherever it leads.

    Args:
        directory: whose entries are looked at.
        by_name: a name is enough, damaged files are ours as well.
    """
    found = []
    for path in sorted(directory.iterdir()):
        if path.is_symlink():
            found.append(path.name)
        elif path.is_dir():
            inside = strangers(path, by_name=by_name) if path.name in OUR_FOLDERS else [""]
            found += [f"{path.name}/{name}" for name in inside]
        elif not _is_ours(path, by_name=by_name):
            found.append(path.name)
    return found


def _is_ours(path: Path, *, by_name: bool = False) -> bool:
    """Return whether a file has one of our names and, unless that is enough, can be read as what it says."""
    checks = (is_sound for pattern, is_sound in OUR_FILES.items() if fnmatchcase(path.name, pattern))
    try:
        return path.is_file() and any(by_name or is_sound(path) for is_sound in checks)
    except (InputError, OSError):
        return False


def _holds(*keys: str) -> Callable[[Path], bool]:
    """Return a check for JSON objects that have these keys, none of them null."""

    def check(path: Path) -> bool:
        data = read_json(path)
        return isinstance(data, dict) and all(data.get(key) is not None for key in keys)

    return check


def _is_safetensors(path: Path) -> bool:
    try:
        header, start = tensor_header(path)
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        return start + max(ends, default=0) <= path.stat().st_size
    except (KeyError, TypeError, IndexError):
        return False


def _is_card(path: Path) -> bool:
    """Return whether a README is a model's card: those begin with data for the Hub."""
    with open(path, "rb") as file:
        return file.read(4) in (b"---\n", b"---\r")


def _is_known(path: Path) -> bool:
    """Return true: the name is enough."""
    return True


OUR_FOLDERS = ("base", "auxiliary", "start")
OUR_FILES: dict[str, Callable[[Path], bool]] = {
    "kvp.json": _holds("format_version", "base", "auxiliary", "predictor"),
    "config.json": _holds("model_type"),
    "cache.json": _holds("tokens", "base", "sha256"),
    "README.md": _is_card,
    **dict.fromkeys(
        ["model*.safetensors", *(f"{name}.safetensors" for name in ("predictor", "adapter", "cache", "state"))],
        _is_safetensors,
    ),
    **dict.fromkeys(
        ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"], _holds()
    ),
    **dict.fromkeys(["vocab.json", "generation_config.json", "model.safetensors.index.json"], _holds()),
    **dict.fromkeys(["tokenizer.model", "merges.txt", "vocab.txt", "chat_template.jinja"], _is_known),
    **dict.fromkeys(["RECIPE.md", "LICENSE", ".gitattributes"], _is_known),
    **dict.fromkeys(["log.jsonl", "loss.png", ".state.safetensors"], _is_known),
}
"""The files of a model, a bundle, a saved cache or a training run, and how each is told from another of its name."""


def copy_ours(source: Path, out: Path) -> None:
    """Copy the files of a model directory that are of our making, and no code or notes beside them."""
    out.mkdir()
    for path in sorted(source.iterdir()):
        if _is_ours(path):
            shutil.copyfile(path, out / path.name)


def check_removable(directory: Path, name: str) -> None:
    """Refuse to remove a directory that is not of our making in every part.

    Args:
        directory: what is to be removed.
        name: what an error calls it.

    Raises:
        InputError: a link, the folder that one stands in, or something in it that is not ours.
    """
    if directory.is_symlink():
        raise InputError(f"{name} is a link; name the directory itself.")
    place, here = Path(os.path.realpath(directory)), Path(os.path.realpath("."))
    if place == here or place in here.parents:
        raise InputError(f"{name} is the folder that you are in; go elsewhere, and name it from there.")
    if found := strangers(place):
        raise InputError(
            f"{name} also holds {found[0]}, which is no sound part of a bundle or model; move or remove it yourself."
        )


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """Yield a directory in the system's temporary one, for as long as the block lasts."""
    with unfinished(Path(tempfile.mkdtemp(prefix="kvp-"))) as place:
        yield place


@contextlib.contextmanager
def atomic_directory(out: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of ``out`` that takes its place when the block ends without an error.

    Args:
        out: directory to be written.
        private: nobody but the user may read it.

    Raises:
        InputError: the place cannot be written.
        KVPError: there is no room for what is written.
    """
    out = Path(out).resolve()
    work = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    with unfinished(work):  # named before it is made, so that no moment is left in which a signal could orphan it
        try:
            recover(out)
            sweep(out.parent, out.name)
            out.parent.mkdir(parents=True, exist_ok=True)
            work.mkdir(mode=0o700 if private else 0o777)
        except OSError as error:
            raise InputError(f"cannot write {out}: {error.strerror}; choose another place.") from error
        try:
            yield work
        except shutil.Error as error:  # of several files that were copied
            reason = error.args[0][-1][-1]
            raise KVPError(f"cannot write {out} ({reason}); make room or choose another place.") from error
        except OSError as error:
            if error.errno not in OUT_OF_ROOM:
                raise
            raise KVPError(f"cannot write {out} ({error.strerror}); make room or choose another place.") from error
        if private:
            make_private(*work.iterdir())
        _exchange(work, out)


def _exchange(work: Path, out: Path) -> None:
    """Move ``work`` to ``out``; what was there is removed, or kept aside if anything in it is not ours."""
    if not out.exists():
        work.replace(out)
        return
    old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
    if _swap(work, out):
        work.replace(old)
    else:  # a kill between these two is mended by ``recover``
        out.replace(old)
        try:
            work.replace(out)
        except OSError:
            old.replace(out)
            raise
    if found := strangers(old, by_name=True):
        kept = out.with_name(f"{out.name}.{secrets.token_hex(4)}.old")
        old.replace(kept)
        warnings.warn(
            f"the old {out.name} holds {found[0]}, which is not kvp's, so it is kept as {kept}.", stacklevel=1
        )
    else:
        shutil.rmtree(old.replace(work))  # under a name that ``recover`` does not take for the only copy


def remove_directory(path: Path) -> None:
    """Remove a directory of ours in one step: whoever looks, after a kill too, finds all of it or nothing.

    Raises:
        OSError: it is not there, or cannot be removed.
    """
    path = Path(os.path.realpath(path))  # "." has no name
    for old in _replaced(path):  # which ``recover`` would put in its place
        shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(path.replace(path.with_name(f".{path.name}.{secrets.token_hex(4)}")))


def _swap(first: Path, second: Path) -> bool:
    """Exchange two directories in one step, where system and file system can; returns whether that was done."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin":
        return bool(library.renamex_np(*names, 2) == 0)  # RENAME_SWAP
    if not hasattr(library, "renameat2"):
        return False
    here = -100  # AT_FDCWD
    return bool(library.renameat2(here, names[0], here, names[1], 2) == 0)  # RENAME_EXCHANGE


def recover(out: Path) -> None:
    """Put back a directory that a kill in the middle of its replacement left aside, if nothing took its place."""
    if os.path.lexists(out) or not out.parent.is_dir():
        return
    for old in _replaced(out):
        with contextlib.suppress(OSError):
            old.rename(out)
            return


def _replaced(out: Path) -> list[Path]:
    """Return what kills in the middle of replacements left aside."""
    return sorted(out.parent.glob(f".{glob.escape(out.name)}.????????.old"))


def sweep(folder: Path, name: str | None = None, *, older_than: float = STALE_SECONDS) -> None:
    """Remove what killed commands left half written, half removed or replaced; not what may be the only copy.

    Args:
        folder: in which it was left.
        name: of the directory that it was to be, or None for all.
        older_than: seconds; less than a day only where nobody else can be writing.
    """
    for left in folder.glob(".*.????????*"):
        found = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}(\.old)?", left.name)
        if found is None or name not in (None, found[1]) or (found[2] and not (folder / found[1]).exists()):
            continue
        with contextlib.suppress(OSError):  # another command may be sweeping, too
            if left.is_dir() and time.time() - left.lstat().st_mtime > older_than:
                shutil.rmtree(left)


def directory_bytes(place: Path) -> int:
    """Return the size of all files in a directory, each once, 0 where it has gone."""
    sizes: dict[tuple[int, int], int] = {}  # a Hub's snapshots are links to its blobs
    for folder, _, names in os.walk(place):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.stat(os.path.join(folder, name))
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())
