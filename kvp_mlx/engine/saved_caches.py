"""Saved caches: a document, a system prompt or a conversation that is read once and loaded the next time.

Each is a directory ``NAME/`` in the user's cache: ``cache.safetensors`` as mlx-lm writes it (``mlx_lm.generate
--prompt-cache-file`` reads it too) and ``cache.json``, which tells what it holds, of which model, and its SHA-256.
Directories are renamed into place when they are whole.
"""

import contextlib
import hashlib
import json
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache
from mlx_lm.utils import common_prefix_len
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from ..bundle.loading import KVPModel
from ..errors import BundleError, InputError, KVPError
from ..files import cache_dir, private_directory, read_json, sha256_of
from ..files.directories import atomic_directory, recover, remove_directory, sweep
from ..models.entries import one_token_cache
from ..models.families import Cache
from .context import Context, first_entries
from .dial import Dial
from .prefill import Progress
from .prompt import Message, check_size, check_text, check_window, render

FORMAT_VERSION = 1
DEFAULT_LIMIT_GB = 4.0
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

DOCUMENT_END = "\n\n"

Role = Literal["document", "system", "head", "conversation"]


class SavedCache(BaseModel):
    """The whole of cache.json.

    Attributes:
        role: what it was made of: the beginning of a user's message, a system message, the exact head of some
            prompt, or a conversation.
        text: of the document or system message, so that a chat can go on from it.
        tokens: what the cache holds.
        exact_tokens: how many of the first of them have full prefill's entries.
        base: fingerprint of the base's weights.
        predictor: fingerprint of what predicted, None where nothing is predicted.
        sha256: of cache.safetensors.
        dial: of the request that predicted any of it, where only the same may use that (``serve.shelf``).
        mark: SHA-256 of all the other fields; None in what older versions wrote.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: PositiveInt = FORMAT_VERSION
    role: Role
    text: str | None
    tokens: tuple[NonNegativeInt, ...]
    exact_tokens: NonNegativeInt
    base: str
    predictor: str | None
    sha256: str
    created: str
    dial: dict[str, Any] | None = None
    mark: str | None = None

    def own_mark(self) -> str:
        """Return the mark that goes with the other fields."""
        return hashlib.sha256(self.model_dump_json(exclude={"mark"}).encode()).hexdigest()

    @property
    def is_exact(self) -> bool:
        """Whether all of it is what full prefill gives."""
        return self.exact_tokens == len(self.tokens)

    def messages_with(self, text: str) -> list[Message]:
        """Return the messages of a conversation that begins with this cache and goes on with ``text``.

        Raises:
            InputError: it holds a conversation, or some prompt's head.
        """
        if self.role == "document":
            return [{"role": "user", "content": f"{self.text}{DOCUMENT_END}{text}"}]
        if self.role == "system":
            return [{"role": "system", "content": self.text or ""}, {"role": "user", "content": text}]
        raise InputError("this saved cache is no document or system prompt; build one from a file.")


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


def write_context(
    context: Context, place: Path, role: Role, text: str | None = None, *, dial: dict[str, Any] | None = None
) -> None:
    """Save a context as a directory that appears whole, and that nobody else can look into.

    Raises:
        InputError: the place cannot be written.
        KVPError: there is no room.
    """
    model, length = context.model, len(context.tokens)
    private_directory(place.parent)
    with atomic_directory(place, private=True) as work:
        file = work / "cache.safetensors"
        _write_entries(first_entries(context.cache, length), length, file)
        saved = SavedCache(
            role=role,
            text=text,
            dial=dial,
            tokens=tuple(context.tokens),
            exact_tokens=context.exact_tokens,
            base=base_fingerprint(model),
            predictor=None if context.exact_tokens == length else predictor_fingerprint(model),
            sha256=sha256_of(file),
            created=time.strftime("%Y-%m-%d %H:%M:%S"),
        )
        marked = saved.model_copy(update={"mark": saved.own_mark()})
        (work / "cache.json").write_text(marked.model_dump_json(), encoding="utf-8")


def _write_entries(cache: Cache, length: int, file: Path) -> None:
    try:
        save_prompt_cache(str(file), cache, {"tokens": str(length)})
    except RuntimeError as error:  # what mlx makes of a full disk
        raise KVPError(f"the cache cannot be written ({error}); make room, or set KVP_CACHE_DIR elsewhere.") from error


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


def read_context(model: KVPModel, place: Path, saved: SavedCache) -> Context:
    """Read the entries of a saved cache of this model, and note that it was used.

    Raises:
        BundleError: a damaged one.
    """
    context = Context(model)
    if saved.tokens:
        context.replace(list(saved.tokens), _read_entries(place, saved, model), saved.exact_tokens)
    with contextlib.suppress(OSError):  # a cache that may only be read can be used as well
        os.utime(place / "cache.json")
    return context


def _read_entries(place: Path, saved: SavedCache, model: KVPModel) -> Cache:
    path = place / "cache.safetensors"
    damaged = BundleError(f"the saved cache {place} is damaged; remove it ('kvp cache rm {place.name}') and go on.")
    try:
        if sha256_of(path) != saved.sha256:
            raise damaged
        cache = load_prompt_cache(str(path))
        mx.eval([layer.state for layer in cache])  # now, while the file is there
    except (OSError, RuntimeError, ValueError) as error:
        raise damaged from error
    if _shapes(cache, len(saved.tokens)) != _shapes(one_token_cache(model.base), 1):
        raise damaged
    return cache


def _shapes(cache: Cache, tokens: int) -> list[Any]:
    """Return what caches of a model have in common, whatever their length; not of one that lacks tokens."""
    shapes = []
    for layer in cache:
        counts = hasattr(layer, "offset")
        axes = (0, 1, 3) if counts else (0, 1, 2)  # (B, H, S, D), or a state
        arrays = [array for _, array in tree_flatten(layer.state) if isinstance(array, mx.array)]
        own = [tuple(array.shape[axis] for axis in axes if axis < array.ndim) for array in arrays]
        is_whole = not counts or layer.offset == tokens
        is_whole &= not isinstance(layer, KVCache) or (layer.keys is not None and layer.keys.shape[2] >= tokens)
        shapes.append((type(layer), own) if is_whole else None)
    return shapes


def read_saved(place: Path) -> SavedCache:
    """Read what a saved cache says of itself.

    Raises:
        BundleError: it is damaged, or of a newer version.
    """
    try:
        saved = SavedCache.model_validate(read_json(place / "cache.json"))
        if saved.mark not in (None, saved.own_mark()):
            raise InputError("the fields are not those that were marked")
    except (OSError, InputError, ValidationError) as error:
        raise BundleError(
            f"the saved cache {place} is damaged or of another version; remove it ('kvp cache rm {place.name}')."
        ) from error
    return saved


def saved_places() -> list[Path]:
    """Return the directories of all saved caches, least recently used first."""
    places = [place for place in _caches().glob("*") if place.is_dir() and NAME.fullmatch(place.name)]
    return sorted(places, key=_last_used)


def remove_cache(name: str) -> None:
    """Remove a saved cache.

    Raises:
        InputError: nothing of that name.
    """
    try:
        remove_directory(cache_place(name))
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
    if context.exact_tokens >= len(ids) and not cache_place(name := _head_name(context.model, ids)).exists():
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


def directory_bytes(place: Path) -> int:
    """Return the size of a directory's files, 0 where it has gone."""
    size = 0
    for file in place.glob("*"):
        with contextlib.suppress(OSError):
            size += file.stat().st_size
    return size


def base_fingerprint(model: KVPModel) -> str:
    """Return what identifies the base as it computes: its weights, and the fields of its config that reach it."""
    return _fingerprint(model.base)


def predictor_fingerprint(model: KVPModel) -> str:
    """Return what identifies everything that predicts: the maps and whatever reads the prompt."""
    return _fingerprint(model.predictor, model.auxiliary)


def _fingerprint(*modules: nn.Module) -> str:
    """Hash modules' settings, and names, types, shapes and beginnings of all weights; any training changes it.

    A model file's arguments are what its code reads of config.json: RoPE, norms, heads.
    """
    digest = hashlib.sha256()
    for module in modules:
        digest.update(json.dumps(vars(module.args) if "args" in vars(module) else {}, default=str).encode())
        for name, array in sorted(tree_flatten(module.parameters())):
            row = array[(0,) * (array.ndim - 1)] if array.ndim > 1 else array
            digest.update(f"{name}:{array.dtype}:{array.shape}\n".encode())
            digest.update(np.array(row.astype(mx.float32) if row.dtype == mx.bfloat16 else row).tobytes())
    return f"sha256:{digest.hexdigest()}"


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
