"""Saved caches by name: a document, a system prompt or a conversation that is read once and loaded the next time.

Each is a directory ``NAME/`` in the user's cache (``cache_format``); all together stay within a limit.
"""

import contextlib
import hashlib
import os
import re
import warnings
from pathlib import Path

from mlx_lm.utils import common_prefix_len

from ..bundle.loading import KVPModel
from ..errors import BundleError, InputError, KVPError
from ..files import cache_dir
from ..files.directories import directory_bytes, recover, remove_directory, sweep
from ..models.cutting import first_entries
from .cache_format import (
    Role,
    SavedCache,
    base_fingerprint,
    predictor_fingerprint,
    read_context,
    read_saved,
    write_context,
)
from .context import Context
from .dial import Dial
from .prefill import Progress
from .prompt import check_size, check_text, check_window, render

DEFAULT_LIMIT_GB = 4.0
FILES = {"cache.json", "cache.safetensors"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def build_cache(
    model: KVPModel, text: str, role: Role, *, predicted: bool = False, progress: Progress | None = None
) -> Context:
    """Read a document or system message as the beginning of a conversation.

    Args:
        model: the bundle.
        text: what to read.
        role: ``document`` (a user's message that goes on with a question) or ``system``.
        predicted: predict it instead of letting the base read it.
        progress: called with (tokens done, tokens to do) after every chunk.

    Raises:
        InputError: it does not fit the context window, or is no text.
    """
    check_text(text)
    check_size(model, text, "the text")
    saved = SavedCache(role=role, text=text, tokens=(), exact_tokens=0, base="", predictor=None, sha256="", created="")
    a, b = (render(model.text_tokenizer, saved.messages_with(end), asks=False) for end in ("a", "1"))
    ids = a[: common_prefix_len(a, b)]
    check_window(model, len(ids))
    context = Context(model)
    dial = Dial("kvp" if predicted else "full", 0, 0)
    context.read([*ids, ids[-1]], dial, progress=progress)  # all but the last are read
    return context


def save_cache(
    context: Context, name: str, role: Role, text: str | None = None, limit_bytes: int | None = None
) -> list[str]:
    """Save a context under a name, in place of what may be there.

    Args:
        context: what to save.
        name: letters, digits, ``.``, ``_`` and ``-``.
        role: see ``SavedCache``.
        text: likewise.
        limit_bytes: what all saved caches may take together (default: ``limit_from_environment()``).

    Returns:
        The names of the caches, least recently used first, that were removed to stay within the limit.

    Raises:
        InputError: a bad name, or a cache that the limit does not allow even alone.
    """
    place, limit = cache_place(name), limit_from_environment() if limit_bytes is None else limit_bytes
    size = sum(layer.nbytes for layer in first_entries(context.cache, len(context.tokens)))
    if size > limit:
        raise InputError(f"this cache takes {size / 1e9:.2f} GB, all may take {limit / 1e9:.2f} (KVP_CACHE_LIMIT_GB).")
    write_context(context, place, role, text)
    return _remove_oldest(limit, keep=name)


def load_cache(model: KVPModel, name: str, *, exact: bool = False) -> tuple[SavedCache, Context]:
    """Load a saved cache.

    Args:
        model: the bundle that is to go on from it.
        name: as it was saved.
        exact: refuse one of which anything was predicted.

    Raises:
        InputError: nothing of that name, a cache of another model, or a predicted one where an exact one is needed.
        BundleError: a damaged one.
    """
    place = cache_place(name)
    recover(place)
    if model.hosts is not None:
        raise InputError("a saved cache is whole, and each of several hosts needs a part of it; leave it out.")
    if not place.is_dir():
        raise InputError(f"there is no saved cache '{name}'; 'kvp cache ls' lists them, 'kvp cache build' makes one.")
    found = _identity(place)
    try:
        return _load(model, place, name, exact=exact)
    except BundleError:
        if _identity(place) == found:
            raise
    return load_cache(model, name, exact=exact)  # another process has removed or replaced it meanwhile


def _identity(place: Path) -> tuple[int, int] | None:
    """Return what tells a directory from another one of its name."""
    try:
        status = place.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _load(model: KVPModel, place: Path, name: str, *, exact: bool) -> tuple[SavedCache, Context]:
    saved = read_saved(place)
    if saved.base != base_fingerprint(model):
        raise InputError(f"the saved cache '{name}' is another model's; build it again for this one.")
    if saved.predictor not in (None, predictor_fingerprint(model)):
        raise InputError(f"the saved cache '{name}' was predicted by another bundle; build it again for this one.")
    if exact and not saved.is_exact:
        raise InputError(f"the saved cache '{name}' was predicted; build it without --predicted, or leave out 'exact'.")
    return saved, read_context(model, place, saved)


def saved_places() -> list[Path]:
    """Return the directories of all saved caches, least recently used first."""
    places = [place for place in _caches().glob("*") if NAME.fullmatch(place.name) and _is_cache(place)]
    return sorted(places, key=_last_used)


def _is_cache(place: Path) -> bool:
    """Return whether a directory holds a cache, sound or damaged, and nothing else."""
    with contextlib.suppress(OSError):
        return not place.is_symlink() and {path.name for path in place.iterdir()} <= FILES
    return False


def remove_cache(name: str) -> None:
    """Remove a saved cache.

    Raises:
        InputError: nothing of that name, or something else.
    """
    place = cache_place(name)
    if place.exists() and not _is_cache(place):
        raise InputError(f"{place} is no saved cache, or holds more than one; move or remove it yourself.")
    try:
        remove_directory(place)
    except FileNotFoundError as error:  # another process may have removed it since it was listed
        raise InputError(f"there is no saved cache '{name}'; 'kvp cache ls' lists them.") from error


def load_head(context: Context, ids: list[int]) -> bool:
    """Let a context take over the saved exact entries of a prompt's head; returns whether there were any.

    Damaged ones are named in a warning and removed.
    """
    name = _head_name(context.model, ids)
    if not cache_place(name).is_dir():
        return False
    try:
        _, loaded = load_cache(context.model, name, exact=True)
    except InputError as error:
        if isinstance(error, BundleError):
            warnings.warn(str(error), stacklevel=1)
            with contextlib.suppress(OSError, InputError):
                remove_cache(name)
        return False
    context.replace(loaded.tokens, loaded.cache, loaded.exact_tokens)
    return True


def save_head(context: Context, ids: list[int]) -> None:
    """Save the entries of a prompt's head, if the context holds exact ones; where that fails, a warning says so.

    It comes after the answer, which stands whether or not the next one will come sooner.
    """
    if (
        context.can_be_saved
        and context.exact_tokens >= len(ids)
        and not cache_place(name := _head_name(context.model, ids)).exists()
    ):
        head = context.copy(len(ids))
        if len(head.tokens) < len(ids):  # a cache that cannot be cut there
            return
        try:
            save_cache(head, name, "head")
        except (KVPError, OSError) as error:
            warnings.warn(f"the exact head is not kept for the next time: {error}", stacklevel=1)


def _head_name(model: KVPModel, ids: list[int]) -> str:
    digest = hashlib.sha256(f"{base_fingerprint(model)}:{ids}".encode())
    return f"head-{digest.hexdigest()[:24]}"


def limit_from_environment() -> int:
    """Return what saved caches may take together, in bytes: ``KVP_CACHE_LIMIT_GB`` or the default.

    Raises:
        InputError: it is no positive number.
    """
    text = os.environ.get("KVP_CACHE_LIMIT_GB") or str(DEFAULT_LIMIT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise InputError(f"KVP_CACHE_LIMIT_GB is a number of gigabytes, not '{text}'.")
    return int(min(limit, 1e9) * 1e9)


def cache_place(name: str) -> Path:
    """Return the directory of a saved cache, whether or not it is there.

    Raises:
        InputError: a name that could not be one.
    """
    return _caches() / checked_name(name)


def _remove_oldest(limit_bytes: int, keep: str) -> list[str]:
    """Remove caches, least recently used first, until the rest fits; returns their names."""
    sweep(_caches())
    places = saved_places()
    sizes = {place.name: directory_bytes(place) for place in places}
    removed = []
    for place in places:
        if sum(sizes.values()) <= limit_bytes:
            break
        if place.name != keep:
            with contextlib.suppress(OSError):
                remove_directory(place)
                del sizes[place.name]
                removed.append(place.name)
    return removed


def _last_used(place: Path) -> float:
    try:
        return (place / "cache.json").stat().st_mtime
    except OSError:
        return 0.0


def _caches() -> Path:
    return cache_dir() / "prompts"


def checked_name(name: str) -> str:
    """Return a name that may be one.

    Raises:
        InputError: it may not.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"'{name}' is no name; use letters, digits, '.', '_' and '-'.")
    return name
