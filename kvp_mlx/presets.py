"""The 11 published OpenELM configurations (method.md section 3), as models with random weights.

Timing needs no checkpoint: a benchmark of a preset measures the real shapes. Shapes follow OpenELM's rule
(arXiv 2404.14619): query heads and FFN width grow linearly over depth.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import openelm

from .bundle import KVPModel, build_predictor
from .config import AuxiliaryConfig, BaseConfig, BundleConfig, PredictorConfig
from .errors import InputError
from .layer_map import pruned_layer_map, retained_layers, spread_layer_map
from .models import fit_to_device
from .predictor import KEYS_VALUES
from .train.auxiliary import prune_config

GQA_GROUPS = 4
QKV_MULTIPLIERS = (0.5, 1.0)
FFN_MULTIPLIERS = (0.5, 4.0)
FFN_DIVISOR = 256
PADDED_VOCABULARY = 32128
CONTEXT_LENGTH = 2048


@dataclass(frozen=True)
class Size:
    """What tells the four OpenELM models apart."""

    model_dim: int
    layers: int
    head_dim: int


SIZES = {
    "270m": Size(1280, 16, 64),
    "450m": Size(1536, 20, 64),
    "1_1b": Size(2048, 28, 64),
    "3b": Size(3072, 36, 128),
}
# name: (size of the base, size of the auxiliary or fraction of the base's layers that it keeps)
PRESETS: dict[str, tuple[str, str | float]] = {
    "openelm-1_1b-kvp-c-450m": ("1_1b", "450m"),
    "openelm-1_1b-kvp-c-270m": ("1_1b", "270m"),
    "openelm-1_1b-kvp-lp-0_75": ("1_1b", 0.75),
    "openelm-1_1b-kvp-lp-0_50": ("1_1b", 0.5),
    "openelm-1_1b-kvp-lp-0_25": ("1_1b", 0.25),
    "openelm-3b-kvp-c-1_1b": ("3b", "1_1b"),
    "openelm-3b-kvp-c-450m": ("3b", "450m"),
    "openelm-3b-kvp-c-270m": ("3b", "270m"),
    "openelm-3b-kvp-lp-0_75": ("3b", 0.75),
    "openelm-3b-kvp-lp-0_50": ("3b", 0.5),
    "openelm-3b-kvp-lp-0_25": ("3b", 0.25),
}


def openelm_config(size: str) -> dict[str, Any]:
    """Return mlx-lm's config.json of an OpenELM model, vocabulary padded as in CoreNet."""
    shape = SIZES[size]
    heads = [
        _multiple(shape.model_dim * multiplier, shape.head_dim * GQA_GROUPS) // shape.head_dim
        for multiplier in _ramp(QKV_MULTIPLIERS, shape.layers)
    ]
    return {
        "model_type": "openelm",
        "head_dim": shape.head_dim,
        "num_transformer_layers": shape.layers,
        "model_dim": shape.model_dim,
        "vocab_size": PADDED_VOCABULARY,
        "ffn_dim_divisor": FFN_DIVISOR,
        "num_query_heads": heads,
        "num_kv_heads": [count // GQA_GROUPS for count in heads],
        "ffn_multipliers": _ramp(FFN_MULTIPLIERS, shape.layers),
        "max_context_length": CONTEXT_LENGTH,
    }


def _ramp(ends: tuple[float, float], layers: int) -> list[float]:
    first, last = ends
    return [round(first + (last - first) * i / (layers - 1), 2) for i in range(layers)]


def _multiple(value: float, divisor: int) -> int:
    """Round to the nearest multiple of ``divisor``, at least one, never losing more than a tenth."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def preset_model(name: str, seed: int = 0) -> KVPModel:
    """Build a published configuration with seeded random weights, ready to run (no tokeniser).

    Raises:
        InputError: no preset of that name.
    """
    mx.random.seed(seed)
    base, auxiliary, config = preset_parts(name)
    predictor = build_predictor(base, auxiliary, config)
    for model in (base, auxiliary):
        fit_to_device(model)
    mx.eval(predictor.parameters())
    return KVPModel(base, auxiliary, predictor, None, config, {"max_context_length": CONTEXT_LENGTH})


def preset_parts(name: str) -> tuple[nn.Module, nn.Module, BundleConfig]:
    """Return a preset's base and auxiliary, not yet evaluated, and the configuration that joins them.

    Raises:
        InputError: no preset of that name.
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset '{name}'; known: {', '.join(PRESETS)}.")
    base_size, choice = PRESETS[name]
    base_config = openelm_config(base_size)
    depth = base_config["num_transformer_layers"]
    if isinstance(choice, str):
        auxiliary_config = openelm_config(choice)
        layers = auxiliary_config["num_transformer_layers"]
        layer_map = spread_layer_map(depth, layers)
        part = AuxiliaryConfig(kind="model", layers=layers)
    else:
        retained = retained_layers(depth, choice)
        auxiliary_config = prune_config(base_config, retained)
        layer_map = pruned_layer_map(depth, retained)
        part = AuxiliaryConfig(kind="pruned", layers=len(retained), retained_layers=tuple(retained))
    config = BundleConfig(
        base=BaseConfig(fingerprint="none: random weights", path="none"),
        auxiliary=part,
        predictor=PredictorConfig(input=KEYS_VALUES, layer_map=layer_map),
    )
    base, auxiliary = (openelm.Model(openelm.ModelArgs.from_dict(c)) for c in (base_config, auxiliary_config))
    return base, auxiliary, config
