"""Pictures that appear whole or not at all."""

import secrets
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import unfinished


def save_figure(figure: Any, out: Path) -> None:
    """Write a matplotlib figure, of the kind that the file's name ends in.

    Raises:
        InputError: it names no kind of picture, or the place cannot be written.
    """
    if out.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise InputError(f"{out} names no kind of picture; end it in .png, .svg or .pdf.")
    try:
        with unfinished(out.with_name(f".{secrets.token_hex(4)}{out.suffix}")) as work:
            figure.savefig(work, dpi=150)
            work.replace(out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; choose another place.") from error
