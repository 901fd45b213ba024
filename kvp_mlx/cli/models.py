"""``kvp models``."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundle import library
from ..bundle.config import read_config
from ..bundle.loading import base_directory, bundle_directory
from ..bundle.named import find_model
from ..errors import InputError
from .options import Json
from .output import print_json, progress_lines, say, show
from .screen import visible

app = typer.Typer()


@app.command("ls")
def list_models(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders to look into; default: this one.")] = None,
    json: Json = False,
) -> None:
    """List bundles and bases with their sizes and measured quality.

    The shipped default, the Hub's cache, and the folders named with their direct subfolders.
    """
    folders = folders or [Path()]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise InputError(f"{missing[0]} is no folder; name one that holds models.")
    with progress_lines("looking for models"):
        entries, damaged = library.list_models(folders)
    for line in damaged:
        say(line, "yellow")
    if json:
        print_json({"models": [vars(entry) for entry in entries], "damaged": damaged})
        return
    for entry in entries:
        base = f"on {entry.base}" if entry.base else ""
        show(f"{entry.name:32} {entry.kind:28} {entry.where:8} {entry.size_bytes / 1e6:9.1f} MB  {base}")
        if quality := measured_line(entry.measured):
            show(f"    {quality}")


def measured_line(measured: dict[str, Any]) -> str:
    """Return the recoveries and separations found anywhere in what kvp.json says was measured."""
    found = []

    def collect(data: Any, name: str) -> None:
        if not isinstance(data, dict):
            return
        numbers = [f"{key} {data[key]:.2f}" for key in ("recovery", "separation") if _is_number(data.get(key))]
        if numbers:
            found.append(f"{name}: {', '.join(numbers)}" if name else ", ".join(numbers))
        for key, value in data.items():
            collect(value, key)

    collect(measured, "")
    return "; ".join(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < sys.float_info.max


@app.command()
def pull(name: Annotated[str, typer.Argument(help="Hub id (owner/name, owner/name@revision) or alias.")]) -> None:
    """Get a bundle with its models, or a base, so that it works offline."""
    with progress_lines(f"getting {name}"):
        directory = bundle_directory(name)
        places = [directory]
        if (directory / "kvp.json").is_file():
            config = read_config(directory)
            places.append(base_directory(config.base, directory))
            if config.auxiliary.alias is not None:
                places.append(find_model(config.auxiliary.alias))
    for place in places:
        show(str(place))


@app.command("rm")
def remove(
    name: Annotated[str, typer.Argument(help="Folder, Hub id, or the alias (its converted base).")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a bundle or base from this machine."""
    path = library.removable(name)
    if not yes:
        if not sys.stdin.isatty():
            raise InputError(f"this would remove {path}; say --yes.")
        typer.confirm(visible(f"Remove {path}?"), abort=True)
    path, size = library.remove_model(name)
    show(f"removed {path} ({size / 1e6:.1f} MB)")
