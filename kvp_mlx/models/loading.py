"""Ordinary mlx-lm models and tokenisers: finding them, loading them, fitting them to the device."""

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model
from mlx_lm.utils import load_model as mlx_lm_load_model
from mlx_lm.utils import load_tokenizer as mlx_lm_load_tokenizer

from ..device import blas
from ..errors import BundleError, InputError
from .families import check_architecture, check_cache
from .hub import download
from .safetensors import weight_tensors


def model_directory(name: str, revision: str | None = None, *, known: str | None = None) -> Path:
    """Return the local directory of a model: a path, or a Hub id (downloaded once).

    Args:
        name: ``owner/name@revision`` pins a Hub id to a branch, tag or commit.
        revision: likewise, and wins over one in the name.
        known: a name that the caller knows besides, for the message.

    Raises:
        InputError: nothing of that name here, and no Hub to ask.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        named = f" or '{known}'" if known else ""
        raise InputError(f"{name} is no directory, Hub id (owner/name){named}.")
    hub_id, _, pinned = name.partition("@")
    return download(hub_id, revision or pinned or None)


def load_model(directory: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load an mlx-lm model directory lazily, with its config, checking that it is whole and supported.

    Raises:
        BundleError: missing or damaged files.
        UnsupportedModelError: an architecture that has no row in ``families``.
    """
    config_path = directory / "config.json"
    try:
        architecture = json.loads(config_path.read_text(encoding="utf-8"))["model_type"]
    except FileNotFoundError as error:
        raise BundleError(f"{directory} holds no config.json; it is not an mlx-lm model directory.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{config_path} states no model_type; convert or download the model again.") from error
    check_architecture(architecture)
    weight_tensors(directory)
    try:
        model, config = mlx_lm_load_model(directory, lazy=True)
    except Exception as error:  # mlx-lm raises whatever its model files raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__  # the names are on the second line
        raise BundleError(f"mlx-lm cannot load {directory}: {reason}") from error
    check_cache(model)
    return model, config


def fit_to_device(model: nn.Module) -> None:
    """Bring weights into the form that the device computes fast, in place, and evaluate them.

    CPUs have fast matmuls for fp32 only, so there everything is dequantised to fp32; GPUs run what is stored.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        if not blas.load_fast_blas():
            warnings.warn(f"{blas.OPENBLAS} not found, so matmuls run 30 times slower; {blas.REMEDY}", stacklevel=1)
        model.set_dtype(mx.float32)  # the scales too: dequantising is then exact, and much faster than in fp16
        dequantize_model(model)
    mx.eval(model.parameters())


def compute_dtype(model: nn.Module) -> mx.Dtype:
    """Return the dtype that the model's activations have."""
    norms = (module.weight for module in model.modules() if isinstance(module, nn.RMSNorm))
    return next(norms).dtype


def load_tokenizer(directory: Path, config: dict[str, Any]) -> TokenizerWrapper | None:
    """Load the tokeniser of a model directory, or None where it has none.

    Raises:
        BundleError: tokeniser files that the library cannot read.
    """
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        return mlx_lm_load_tokenizer(directory, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # tokenizers and transformers raise plain Exception
        raise BundleError(f"the tokeniser in {directory} cannot be loaded ({error}); get the model again.") from error


def context_length(config: dict[str, Any]) -> int | None:
    """Return the context window in tokens that a model's config states, if any."""
    for key in ("max_position_embeddings", "max_context_length"):
        if isinstance(config.get(key), int):
            return config[key]
    return None
