"""What a model directory's layers are and whether they can be predicted, told from its config alone."""

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from ..errors import BundleError, UnsupportedModelError
from .families import FAMILIES, layers_of, text_model
from .loading import check_arguments, read_config
from .pruning import prune_config


def describe_model(directory: Path) -> dict[str, Any]:
    """Return a model's ``architecture``, its ``layers`` by kind, and what is ``missing`` for it to be predicted.

    Raises:
        BundleError: a config that mlx-lm cannot make a model of.
    """
    config = read_config(directory)
    model = model_without_weights(config, directory)
    layers = layers_of(model)
    missing = sorted({f"a kind for layers with {name}" for kind, name in layers if kind is None})
    types = dict.fromkeys((config["model_type"], str(text_model(model).model_type)))
    missing += [f"a row for {name}" for name in types if name not in FAMILIES]
    return {
        "path": str(directory),
        "architecture": config["model_type"],
        "layers": dict(Counter(f"unknown ({name})" if kind is None else kind.title for kind, name in layers)),
        "missing": missing,
    }


def check_pruned(directory: Path, retained: list[int]) -> None:
    """Refuse to prune a model if that leaves no layer of some kind, or its config makes others of those that are kept.

    Raises:
        UnsupportedModelError: such a one, by its kinds of layer (their numbers tell them, or mlx-lm needs one of each).
    """
    config = read_config(directory)
    whole = _what_it_is(model_without_weights(config, directory))
    kept = [whole[layer] for layer in retained]
    try:
        found = _what_it_is(model_without_weights(prune_config(config, retained), directory))
    except BundleError:
        found = []
    kinds = {kind for kind, _ in whole}
    if found != kept or kinds != {kind for kind, _ in kept}:
        named = " and ".join(sorted({kind.title for kind in kinds if kind is not None}))
        raise UnsupportedModelError(
            f"{config['model_type']} cannot be pruned to layers {', '.join(map(str, retained))}, which would not stay "
            f"what they are, or be of each kind ({named}); use --layers K, or an --auxiliary of your own."
        )


def _what_it_is(model: nn.Module) -> list[Any]:
    """Return of every layer its kind and the shapes of its weights."""
    shapes = [
        {name: array.shape for name, array in tree_flatten(layer.parameters())} for layer in text_model(model).layers
    ]
    return list(zip([kind for kind, _ in layers_of(model)], shapes, strict=True))


def model_without_weights(config: dict[str, Any], where: Path) -> nn.Module:
    """Return a model whose weights are never made.

    Raises:
        BundleError: mlx-lm cannot make it.
    """
    try:
        model_class, arguments_class = _get_classes(config)
        arguments = arguments_class.from_dict(config)
        check_arguments(arguments, where)
        model: nn.Module = model_class(arguments)
    except BundleError:
        raise
    except Exception as error:  # mlx-lm raises whatever its model files raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BundleError(f"mlx-lm cannot make a model of {where}/config.json: {reason}") from error
    return model
