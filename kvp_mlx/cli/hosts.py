"""The command line under ``mlx.launch``: every host runs the same command, and the first one talks.

Nothing here imports mlx-lm, see ``device``.
"""

import os
import sys
from collections.abc import Sequence

from ..device.hosts import LAUNCHED, LOST, gone, joined, launched_rank
from ..errors import InputError

COMMANDS = (["generate"], ["chat"], ["serve"], ["fit"], ["train"], ["bench", "ttft"])
SAME_ERROR_SECONDS = 5.0
"""In which the first host finds the same wrong: it may be slower, and would be ended by this one's end."""


def join(arguments: Sequence[str]) -> None:
    """Join the other hosts before a command runs; all but the first fall silent.

    Raises:
        InputError: a command that is one machine's, or a host without a number.
        KVPError: they did not all come.
    """
    if not os.environ[LAUNCHED].isdecimal():
        raise InputError(f"{LAUNCHED} is '{os.environ[LAUNCHED]}', no number of a host; unset it, or use mlx.launch.")
    if launched_rank():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end
    if {"--help", "-h"} & {*arguments}:
        return
    if not any(list(arguments[: len(command)]) == command for command in COMMANDS):
        known = ", ".join(" ".join(command) for command in COMMANDS)
        raise InputError(f"'kvp {arguments[0]}' runs on one machine; mlx.launch starts {known}.")
    joined()


def leave(error: BaseException | None) -> None:
    """Tell the other hosts how this one ends."""
    if joined.cache_info().currsize and (hosts := joined()) is not None:
        hosts.leave(has_finished=isinstance(error, SystemExit) and not error.code)


def line_of(message: str, error: BaseException | None, code: int) -> str | None:
    """Return what this host says of an error; None where another one does."""
    hosts = joined() if joined.cache_info().currsize else None
    if isinstance(error, RuntimeError) and str(error).startswith(LOST):
        return None if hosts is None or hosts.is_told() else gone("another host")
    if not (rank := launched_rank()):
        return message
    is_common = code == 2 and (hosts is None or hosts.is_told(SAME_ERROR_SECONDS))  # bad input, also for the first host
    return None if is_common else f"host {rank}: {message}"
