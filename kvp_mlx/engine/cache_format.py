"""How a saved cache lies on disk.

A directory with ``cache.safetensors`` as mlx-lm writes it (``mlx_lm.generate --prompt-cache-file`` reads it too) and
``cache.json``, which tells what it holds, of which model, and its SHA-256; renamed into place when it is whole.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, Final, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from ..bundle.loading import KVPModel
from ..errors import BundleError, InputError, KVPError
from ..files import private_directory, read_json, sha256_of
from ..files.directories import atomic_directory
from ..models.cutting import first_entries
from ..models.entries import one_token_cache
from ..models.families import Cache
from .context import Context
from .prompt import Message

FORMAT_VERSION: Final = 1
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

    format_version: Literal[1] = FORMAT_VERSION
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
