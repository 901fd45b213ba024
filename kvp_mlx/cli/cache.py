"""``kvp cache``: documents and system prompts that are read once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundle.loading import load_any
from ..engine.cache_format import Role, read_saved
from ..engine.saved_caches import (
    build_cache,
    cache_place,
    limit_from_environment,
    remove_cache,
    save_cache,
    saved_places,
)
from ..errors import BundleError, InputError
from ..files.directories import directory_bytes
from ..models.families import is_listed
from .options import DEFAULT_MODEL, AllowMismatch, AnyModel, Json, OtherBase, open_model
from .output import clean_stdout, plural, print_json, progress_bar, progress_lines, read_text, say, show

app = typer.Typer()


@app.command()
def build(
    file: Annotated[str, typer.Argument(help="Text to read, - for stdin.")],
    name: Annotated[str | None, typer.Option("--name", help="Default: the file's name without its ending.")] = None,
    system: Annotated[bool, typer.Option("--system", help="It is a system prompt, not a document.")] = False,
    predicted: Annotated[
        bool, typer.Option("--predicted", help="Predict it: sooner, but it answers for no exact one.")
    ] = False,
    model: AnyModel = DEFAULT_MODEL,
    base: OtherBase = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Read a file and keep the cache, for 'kvp generate --cache NAME' and 'kvp chat --cache NAME'.

    All saved caches together take up to 4 GB (KVP_CACHE_LIMIT_GB); the least recently used ones make room.
    """
    text = read_text(file, "check the path")
    if name is None:
        name = "stdin" if file == "-" else Path(file).stem
    place = cache_place(name)
    limit_from_environment()
    role: Role = "system" if system else "document"
    with clean_stdout(json):
        loaded = open_model(model, load_any, base_name=base, allow_base_mismatch=allow_base_mismatch)
        if not is_listed(loaded.base):
            raise InputError(f"the cache of {model} cannot be saved: its architecture is not of a supported family.")
        if predicted and not loaded.config.has_predictor:
            raise InputError(f"{model} has no predictor, which --predicted needs; leave it out.")
        with progress_bar(f"reading {file}, tokens") as progress:
            context = build_cache(loaded, text, role, predicted=predicted, progress=progress)
        with progress_lines(f"saving '{name}'"):
            removed = save_cache(context, name, role, text)
    result: dict[str, Any] = {
        "name": name,
        "role": role,
        "tokens": len(context.tokens),
        "exact_tokens": context.exact_tokens,
        "bytes": directory_bytes(place),
        "path": str(place),
        "removed": removed,
    }
    if json:
        print_json(result)
        return
    for old in removed:
        say(f"to make room, '{old}' went")
    kind = "predicted" if predicted else "exact"
    show(f"{name}: {plural(result['tokens'], 'token')}, {kind}, {result['bytes'] / 1e6:.1f} MB")


@app.command("ls")
def list_caches(json: Json = False) -> None:
    """List the saved caches, most recently used first."""
    rows: list[dict[str, Any]] = []
    damaged: list[str] = []
    for place in reversed(saved_places()):
        try:
            saved = read_saved(place)
        except BundleError as error:
            damaged.append(str(error))
            continue
        rows.append(
            {
                "name": place.name,
                "role": saved.role,
                "tokens": len(saved.tokens),
                "exact_tokens": saved.exact_tokens,
                "bytes": directory_bytes(place),
                "created": saved.created,
                "base": saved.base,
            }
        )
    for message in damaged:
        say(message, "yellow")
    if json:
        print_json({"caches": rows, "damaged": damaged})
        return
    for row in rows:
        exact = "exact" if row["exact_tokens"] == row["tokens"] else f"{row['exact_tokens']:,} exact"
        show(
            f"{row['name']:32} {row['role']:12} {row['tokens']:>7,} tokens  {exact:>12}  {row['bytes'] / 1e6:8.1f} MB"
            f"  {row['created']}"
        )


@app.command("rm")
def remove(
    names: Annotated[list[str], typer.Argument(help="Saved caches.")],
) -> None:
    """Remove saved caches."""
    missing = [name for name in names if not cache_place(name).is_dir()]
    if missing:
        raise InputError(f"there is no saved cache '{missing[0]}'; 'kvp cache ls' lists them.")
    for name in dict.fromkeys(names):
        remove_cache(name)
        say(f"removed the saved cache '{name}'.")
