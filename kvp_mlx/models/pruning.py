"""Layer pruning (KVP-LP): which layers are kept, and a copy of these as a model directory of its own."""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import InputError, UnsupportedModelError
from ..files import read_json, write_json
from .safetensors import weight_tensors, write_tensors

DEPTH_KEYS = ("num_hidden_layers", "num_transformer_layers")
LAYER_KEY = re.compile(r"^(.*\blayers)\.(\d+)\.(.*)$")


def retained_layers(base_layers: int, fraction: float) -> list[int]:
    """Return the base layers that a layer-pruned auxiliary keeps.

    Raises:
        InputError: a fraction other than 0.75, 0.5 and 0.25, the three that are defined.
    """
    keeps = {0.75: lambda i: i % 4 != 3, 0.5: lambda i: i % 2 == 0, 0.25: lambda i: i % 4 == 0}
    if fraction not in keeps:
        raise InputError(f"a layer-pruned auxiliary keeps 0.75, 0.5 or 0.25 of the layers, not {fraction}.")
    return [i for i in range(base_layers) if keeps[fraction](i)]


def write_pruned(base: Path, retained: list[int], out: Path) -> None:
    """Write an mlx-lm model directory with only the ``retained`` layers of ``base`` (weights as stored).

    Args:
        base: mlx-lm model directory.
        retained: layer indices to keep, rising.
        out: existing directory to write into.

    Raises:
        UnsupportedModelError: the base's config does not state its depth the usual way.
    """
    config = read_json(base / "config.json")
    write_json(out / "config.json", prune_config(config, retained))
    position = {layer: i for i, layer in enumerate(retained)}
    files: dict[Path, Any] = {path: mx.load(str(path)) for path in {path for _, path, _ in weight_tensors(base)}}
    kept = {}
    for name, path, _ in weight_tensors(base):
        if (moved := renumbered(name, position)) is not None:
            kept[moved] = files[path][name]
    write_tensors(kept, out / "model.safetensors")


def prune_config(config: dict[str, Any], retained: list[int]) -> dict[str, Any]:
    """Return a config of the retained layers: the depth, and every list that has one entry per layer."""
    key = next((key for key in DEPTH_KEYS if key in config), None)
    if key is None and isinstance(config.get("text_config"), dict):
        return config | {"text_config": prune_config(config["text_config"], retained)}
    if key is None:
        raise UnsupportedModelError(f"config.json states none of {', '.join(DEPTH_KEYS)}; it cannot be pruned.")
    depth = config[key]
    position = {layer: i for i, layer in enumerate(retained)}
    pruned: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == depth and not name.endswith("_token_id"):
            pruned[name] = [value[layer] for layer in retained]
        elif isinstance(value, dict):  # quantisation of single modules, by their names
            pruned[name] = {moved: v for k, v in value.items() if (moved := renumbered(k, position)) is not None}
        else:
            pruned[name] = value
    return pruned | {key: len(retained)}


def renumbered(name: str, position: dict[int, int]) -> str | None:
    """Return a module's or tensor's name in the pruned model; None if its layer is not retained."""
    match = LAYER_KEY.match(name)
    if match is None:
        return name
    layer = position.get(int(match[2]))
    return None if layer is None else f"{match[1]}.{layer}.{match[3]}"
