"""``--device``, which has to act before mlx-lm is imported: its stream stays on what is mlx's default device then.

So this file imports nothing that imports mlx-lm.
"""

import argparse
from enum import StrEnum
from typing import Annotated

import mlx.core as mx
import typer

from ..errors import InputError


class Device(StrEnum):
    """The values of ``--device``."""

    cpu = "cpu"
    gpu = "gpu"


DeviceOption = Annotated[Device | None, typer.Option("--device", help="Default: the GPU where there is one.")]


def use_device(device: Device | None) -> None:
    """Make a device mlx's default; None leaves it as it is.

    Raises:
        InputError: there is no such device.
    """
    if device is None:
        return
    wanted = getattr(mx, device.value)
    if not mx.is_available(wanted):
        raise InputError(f"this machine has no {device.value} that mlx can use; leave out --device.")
    mx.set_default_device(wanted)


def use_device_of(arguments: list[str]) -> None:
    """Make the device that a command line names mlx's default; a bad one is left for the command to refuse."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", nargs="?")
    named = parser.parse_known_args(arguments)[0].device
    if named in list(Device) and mx.is_available(getattr(mx, named)):
        use_device(Device(named))
