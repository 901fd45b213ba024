"""``kvp info``."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..bundle.loading import describe
from .options import DEFAULT_MODEL, Json, ModelArgument
from .output import print_json


def info(model: ModelArgument = DEFAULT_MODEL, json: Json = False) -> None:
    """Show what a bundle is.

    Its parts, their sizes, how it was made, and what was measured on it.
    """
    result = describe(model)
    if json:
        print_json(result)
        return
    table = Table(show_header=False, title=Text(model))
    for _ in range(2):
        table.add_column(overflow="fold")
    for key, value in flatten(result):
        table.add_row(key, Text(value))
    Console().print(table)


def flatten(data: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested JSON as dotted rows."""
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", f"{value:,}" if isinstance(value, int) else str(value)))
    return rows
