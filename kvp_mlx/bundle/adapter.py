"""Low-rank updates (LoRA, arXiv 2106.09685, as mlx-lm has them) of whatever reads the prompt.

The base decodes with its own weights; only the pass over the prompt takes the update. A prefix and a named model keep
it in the bundle's adapter.safetensors, an auxiliary in the bundle has taken it up into its weights.
"""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..models.families import inner_model
from ..models.sections import prefix_model

LORA_PARAMETERS = ["lora_a", "lora_b"]
SCALE = 2.0


def adapted_prefix(base: nn.Module, layers: int, rank: int) -> nn.Module:
    """Return a ``prefix_model`` with low-rank updates that the base does not see; at first they change nothing."""
    view = prefix_model(base, layers)
    inner = inner_model(view)
    inner.layers = [_with_own_modules(layer) for layer in inner.layers]
    add_adapter(view, rank)
    return view


def add_adapter(model: nn.Module, rank: int) -> None:
    """Give every linear map of a model's layers a low-rank update, and make nothing else trainable."""
    linear_to_lora_layers(model, len(model.layers), {"rank": rank, "scale": SCALE, "dropout": 0.0})
    model.freeze()
    model.unfreeze(keys=LORA_PARAMETERS, strict=False)


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """Return the updates alone, by their names in the model."""
    parameters = dict(tree_flatten(model.parameters()))
    return {name: array for name, array in parameters.items() if name.split(".")[-1] in LORA_PARAMETERS}


def take_up(model: nn.Module) -> None:
    """Replace every map that has a low-rank update by one that has taken it up."""
    model.update_modules(tree_unflatten(list(_fused(model).items())))


def fused_weights(model: nn.Module) -> dict[str, mx.array]:
    """Return a model's weights with the updates taken up, under the names they have without any."""
    fused = _fused(model)
    weights: dict[str, Any] = {
        name: array
        for name, array in tree_flatten(model.parameters())
        if not any(name.startswith(f"{owner}.") for owner in fused)
    }
    for owner, linear in fused.items():
        weights |= {f"{owner}.{name}": array for name, array in tree_flatten(linear.parameters())}
    return weights


def _fused(model: nn.Module) -> dict[str, nn.Module]:
    """Return what takes the place of each map that has an update, by its name."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    return {name: module.fuse(dequantize=True) for name, module in adapted.items()}


def _with_own_modules(module: nn.Module) -> nn.Module:
    """Copy a tree of modules, sharing the arrays."""
    twin = copy.copy(module)
    for name, child in module.items():
        if isinstance(child, nn.Module):
            twin[name] = _with_own_modules(child)
    return twin
