"""How the tests call ``kvp train`` and read what it wrote."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np


def train_args(start: Path, base: Path, data: Path, *more: object) -> tuple:
    """The command of a small run; what ``more`` says of the same options counts."""
    own = {"--start": start, "--data": data, "--window": 64, "--right": 16}
    return ("train", base, *(part for pair in own.items() if pair[0] not in more for part in pair), *more)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (training(out) / "log.jsonl").read_text().splitlines()]


def steps_of(out: Path) -> list[dict[str, Any]]:
    """The log's steps, without what the clock says."""
    clock = ("minutes", "tokens_per_second")
    return [{k: v for k, v in entry.items() if k not in clock} for entry in log_of(out) if "loss" in entry]


def training(out: Path) -> Path:
    return out.with_name(f"{out.name}.training")


def state_of(out: Path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in mx.load(str(training(out) / "state.safetensors")).items()}
