"""From which prompt length prediction pays, as ``kvp bench calibrate`` found it on this machine."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import __version__
from ..bundle.loading import KVPModel
from ..errors import InputError
from ..files import cache_dir, read_json, write_json

AUTO_MIN_PROMPT_TOKENS = 64  # where nothing was calibrated
NEVER = sys.maxsize


def auto_min_tokens(model: KVPModel) -> int:
    """Return how many tokens there must be to predict for ``prefill="auto"`` to predict them."""
    found = _read().get(_key(model))
    return found if isinstance(found, int) else AUTO_MIN_PROMPT_TOKENS


def store_auto_min(model: KVPModel, tokens: int | None) -> Path:
    """Keep a bundle's threshold in the user's cache (None: prediction never paid); returns the file."""
    path = calibration_path()
    write_json(path, _read() | {_key(model): NEVER if tokens is None else tokens})
    return path


def calibration_path() -> Path:
    """Return where thresholds are kept."""
    return cache_dir() / "calibration.json"


def _read() -> dict[str, Any]:
    try:
        data = read_json(calibration_path())
    except (OSError, InputError):
        return {}
    return data if isinstance(data, dict) else {}


def _key(model: KVPModel) -> str:
    """Return what a threshold holds for: this version's way of reading, this bundle's shapes, this device."""
    shapes = model.config.model_dump_json(include={"base", "auxiliary", "predictor"})
    device = mx.device_info().get("device_name", "")
    digest = hashlib.sha256(shapes.encode()).hexdigest()[:16]
    return f"{__version__} {mx.default_device().type.name} {device} {digest}"
