"""What a model directory's layers are and whether they can be predicted, told from its config alone."""

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import _get_classes

from ..errors import BundleError
from .families import FAMILIES, layers_of, text_model
from .loading import check_arguments, read_config


def describe_model(directory: Path) -> dict[str, Any]:
    """Return a model's ``architecture``, its ``layers`` by kind, and what is ``missing`` for it to be predicted.

    Raises:
        BundleError: a config that mlx-lm cannot make a model of.
    """
    config = read_config(directory)
    model = _without_weights(config, directory)
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


def _without_weights(config: dict[str, Any], where: Path) -> nn.Module:
    """Return a model whose weights are never made."""
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
