"""How the tests call ``kvp train``."""

from pathlib import Path


def train_args(start: Path, base: Path, data: Path, *more: object) -> tuple:
    return ("train", base, "--start", start, "--data", data, "--window", 64, "--right", 16, *more)
