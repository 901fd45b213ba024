"""The 11 published OpenELM configurations (arXiv 2410.08391) as bundles with random weights.

Timing needs no checkpoint: a benchmark of a preset measures the real shapes.
"""

import mlx.nn as nn
from mlx_lm.models import openelm

from ..errors import InputError
from ..models.openelm import openelm_config
from ..models.pruning import prune_config, retained_layers
from .config import AuxiliaryConfig, BaseConfig, BundleConfig, PredictorConfig
from .layer_map import pruned_layer_map, spread_layer_map
from .predictor import KEYS_VALUES

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
