"""``kvp info`` and ``kvp doctor``."""

from typing import Annotated, Any

import typer

from .options import DEFAULT_MODEL, Json
from .output import print_json


def info(
    model: Annotated[str, typer.Argument(help="Bundle directory, Hub id or alias.")] = DEFAULT_MODEL,
    json: Json = False,
) -> None:
    """Show what a bundle is.

    Its parts, their sizes, how it was made, and what was measured on it.
    """
    from ..bundle.loading import describe

    result = describe(model)
    if json:
        print_json(result)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

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


def doctor(json: Json = False) -> None:
    """Check this machine.

    OK, WARN or FAIL, each with its remedy; exit code 1 on FAIL.
    """
    from .doctor import run_checks

    checks = run_checks()
    if json:
        print_json({"checks": [vars(check) for check in checks]})
    else:
        for check in checks:
            print(f"{check.status:4}  {check.name}: {check.detail}" + (f"  -> {check.remedy}" if check.remedy else ""))
    if any(check.status == "FAIL" for check in checks):
        raise typer.Exit(1)
