"""Pictures that appear whole or not at all."""

import importlib.util
import secrets
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import unfinished

SUFFIXES = (".png", ".svg", ".pdf")


def check_picture(out: Path | None) -> None:
    """Refuse a picture that could not be drawn, before any work is done; see ``check_writable`` for its place.

    Raises:
        InputError: its name ends in no kind of picture, or matplotlib is not installed.
    """
    if out is None:
        return
    if out.suffix.lower() not in SUFFIXES:
        raise InputError(f"{out} names no kind of picture; end it in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("pictures need matplotlib; pip install 'kvp-mlx[plot]', or leave out --plot.")


def save_figure(figure: Any, out: Path) -> None:
    """Write a matplotlib figure, of the kind that the file's name ends in (see ``check_picture``).

    Raises:
        InputError: the place cannot be written.
    """
    try:
        with unfinished(out.with_name(f".{secrets.token_hex(4)}{out.suffix}")) as work:
            figure.savefig(work, dpi=150)
            work.replace(out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; choose another place.") from error
