"""Models on this machine: bundles and bases, in folders and in the Hub's cache."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BundleError, InputError, KVPError
from ..files import expanded, read_json
from ..files.directories import check_removable, directory_bytes, remove_directory
from ..models.families import FAMILIES
from . import named
from .config import read_config


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        name: what ``--model`` takes.
        kind: ``bundle (prefix, 12 layers)`` or ``base (llama)``.
        where: ``shipped``, ``cache``, ``hub`` or ``folder``.
        path: its directory.
        size_bytes: of its files.
        base: what a bundle's base is called, None for a base.
        measured: what kvp.json says was measured on a bundle.
    """

    name: str
    kind: str
    where: str
    path: str
    size_bytes: int
    base: str | None
    measured: dict[str, Any]


def list_models(folders: list[Path]) -> tuple[list[Entry], list[str]]:
    """Return the models of this machine, and one line for each that is damaged.

    Args:
        folders: whose own and direct subfolders are looked at, beside the shipped default and the Hub's cache.
    """
    places = [(name, "shipped", place) for name in named.NAMED if (place := named.shipped_bundle(name))]
    bases = {name: named.base_path(name) for name in named.NAMED}
    places += [(f"{name} (its base)", "cache", base) for name, base in bases.items() if base.is_dir()]
    places += [(name, "hub", path) for name, path in _hub_snapshots()]
    for folder in folders:
        candidates = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
        places += [(str(path), "folder", path) for path in candidates if _is_model(path)]
    entries, damaged = [], []
    for name, where, path in places:
        try:
            if entry := _entry(name, where, path):
                entries.append(entry)
        except BundleError as error:
            damaged.append(str(error))
    return entries, damaged


def remove_model(name: str) -> tuple[Path, int]:
    """Remove a model's files: a named base and what was downloaded of it, a Hub id's download, or a folder.

    Returns:
        What was removed and how many bytes that freed.

    Raises:
        InputError: nothing of that name, or a folder that holds more than a model.
    """
    path = removable(name)
    parts = named.downloads(name) if name in named.NAMED else path
    size = sum(map(directory_bytes, {path, parts}))
    try:
        for place in {path, parts}:
            if place.is_dir():
                remove_directory(place)
    except OSError as error:
        left = error.filename or path
        raise KVPError(f"{left} cannot be removed ({error.strerror}); check who may write there.") from error
    return path, size


def removable(name: str) -> Path:
    """Return the directory that ``remove_model`` would remove; raises as it does."""
    if name in named.NAMED:
        path = named.base_path(name)
        if not path.is_dir() and named.downloads(name).is_dir():
            return named.downloads(name)  # of an interrupted 'kvp models pull'
        if not path.is_dir():
            ships = "ships with the package" if named.shipped_bundle(name) else "is known by name"
            raise InputError(f"{name} {ships}, and its base is not in the cache; nothing to remove.")
        check_removable(path, name)
        return path
    path = expanded(name)
    if path.is_symlink():
        raise InputError(f"{name} is a link; name the directory itself.")
    if path.is_dir():
        if not _is_model(path):
            raise InputError(f"{name} is neither a bundle nor a model directory, so it is not removed.")
        check_removable(path, name)
        return path
    repositories = {repo.repo_id: Path(repo.repo_path) for repo in _hub_repositories()}
    if name not in repositories:
        raise InputError(f"{name} is not on this machine; 'kvp models ls' lists what is.")
    return repositories[name]


def _is_model(path: Path) -> bool:
    return any(os.path.isfile(path / name) for name in ("kvp.json", "config.json"))  # no error where one may not look


def _entry(name: str, where: str, path: Path) -> Entry | None:
    """Describe one directory; None for a model of an architecture that is not ours."""
    size = directory_bytes(path)
    if (path / "kvp.json").is_file():
        config = read_config(path)
        kind = f"bundle ({config.auxiliary.kind}, {config.auxiliary.layers} layers)"
        base = config.base.alias or config.base.hub_id or config.base.path
        return Entry(name, kind, where, str(path), size, base, config.measured)
    try:
        architecture = read_json(path / "config.json").get("model_type")
    except (OSError, InputError, AttributeError) as error:
        raise BundleError(f"{path} has no readable config.json; get the model again.") from error
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        return None
    return Entry(name, f"base ({architecture})", where, str(path), size, None, {})


def _hub_repositories() -> list[Any]:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return [repo for repo in scan_cache_dir().repos if repo.repo_type == "model"]
    except CacheNotFound:
        return []


def _hub_snapshots() -> list[tuple[str, Path]]:
    """Return the newest snapshot of every model in the Hub's cache that looks like one of ours."""
    newest = {
        repo.repo_id: max(repo.revisions, key=lambda revision: revision.last_modified).snapshot_path
        for repo in _hub_repositories()
        if repo.revisions
    }
    return [(name, Path(path)) for name, path in sorted(newest.items()) if _is_model(Path(path))]
