"""The mark of a model: what tells it from another of the same shape, in whatever precision its weights come.

A predictor's maps were made for one model, not for one file: measured on Qwen2.5-Coder-0.5B (RECIPE.md of its bundle),
maps fitted on fp16 weights recover as much in 8 and 4 bits. So a bundle keeps a few rows of the weights, and a base
whose file is another is let in if it has the same arguments, the same vocabulary and, within what rounding to 4 bits
changes, the same rows. The output head is left aside: no prompt is read with it, and some files hold a tied one as a
matrix of its own.
"""

import hashlib
import json
import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import BundleError, InputError
from .config import ModelMark

HEAD, TIED = "lm_head", "tie_word_embeddings"
SAMPLED = 32
"""Numbers kept of each weight."""
MATRIX_TOLERANCE = 0.25
"""Relative error that is allowed of all matrices' rows together; 4 bits make 0.08 to 0.12, another model 1.4."""
NORM_TOLERANCE = 0.02
"""The same of norms, which nobody quantises; bfloat16 makes 0.002. Fine-tuning in full moves them."""


def mark_of(model: nn.Module, tokenizer: TokenizerWrapper | None) -> ModelMark:
    """Return a model's mark.

    Args:
        model: an mlx-lm model, quantised or not.
        tokenizer: its tokeniser.
    """
    return ModelMark(arguments=_arguments(model), vocabulary=_vocabulary(tokenizer), rows=_rows(model))


def check_mark(mark: ModelMark, model: nn.Module, tokenizer: TokenizerWrapper | None) -> None:
    """Refuse another model than the marked one.

    Args:
        mark: the bundle's.
        model: the base.
        tokenizer: its tokeniser.

    Raises:
        BundleError: other arguments, vocabulary or weights; says which.
    """
    arguments = _arguments(model)
    for name in mark.arguments.keys() & arguments.keys() - {TIED}:  # a newer mlx-lm may know more
        if mark.arguments[name] != arguments[name]:
            raise _other(f"its config.json says {name} is {arguments[name]}, not {mark.arguments[name]}")
    if _vocabulary(tokenizer) != mark.vocabulary:
        raise _other("its tokeniser has another vocabulary")
    expected, rows = (_without_head(rows) for rows in (mark.rows, _rows(model)))
    if {name: len(row) for name, row in rows.items()} != {name: len(row) for name, row in expected.items()}:
        raise _other("its tensors have other names or shapes")
    for kind, tolerance in (("norm", NORM_TOLERANCE), ("matrix", MATRIX_TOLERANCE)):
        names = [name for name in expected if ("," in name.partition("|")[2]) == (kind == "matrix")]
        errors = [_relative_error(expected[name], rows[name]) for name in names]
        if names and not np.mean(errors) <= tolerance:
            raise _other(f"its weights differ by {np.mean(errors):.0%}, more than rounding would")


def _without_head(rows: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    return {name: row for name, row in rows.items() if HEAD not in name.partition("|")[0].split(".")}


def _other(difference: str) -> BundleError:
    return BundleError(
        f"the base is not the model that this bundle was made for, in any precision (by fingerprint and mark): "
        f"{difference}; fit a bundle for it, or pass --allow-base-mismatch."
    )


def _relative_error(expected: tuple[float, ...], found: tuple[float, ...]) -> float:
    return math.dist(expected, found) / max(math.hypot(*expected), 1e-12)


def _arguments(model: nn.Module) -> dict[str, Any]:
    """Return what the model's code reads of config.json: RoPE, norms, heads."""
    arguments: dict[str, Any] = json.loads(json.dumps(vars(model.args), default=str))
    return arguments


def _vocabulary(tokenizer: TokenizerWrapper | None) -> str | None:
    if tokenizer is None:
        return None
    pairs = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _rows(model: nn.Module) -> dict[str, tuple[float, ...]]:
    """Return the beginning of one row of each weight, by name and shape, of the first, middle and last layer."""
    layers = len(model.layers)
    kept = {0, layers // 2, layers - 1}
    dropped = {id(layer) for number, layer in enumerate(model.layers) if number not in kept}
    rows: dict[str, tuple[float, ...]] = {}

    def visit(name: str, module: Any) -> None:
        if id(module) in dropped:
            return
        if isinstance(module, dict) and isinstance(module.get("weight"), mx.array):
            shape, row = _row(module)
            if not mx.isfinite(row).all().item():
                raise InputError(f"the model's {name} holds numbers that are not finite; get the model again.")
            rows[f"{name}|{','.join(map(str, shape))}"] = tuple(float(f"{value:.4g}") for value in np.array(row))
        children = module.items() if isinstance(module, dict) else enumerate(module)
        for key, child in children:
            if isinstance(child, dict | list):
                visit(f"{name}.{key}" if name else str(key), child)

    visit("", model)
    return rows


def _row(module: Any) -> tuple[tuple[int, ...], mx.array]:
    """Return the shape of a module's weight as it computes, and the beginning of its first row, fp32."""
    weight, first = module["weight"], (0,) * (module["weight"].ndim - 1)
    if "scales" not in module:
        return weight.shape, weight[first][:SAMPLED].astype(mx.float32)
    scheme = {name: getattr(module, name) for name in ("group_size", "bits", "mode") if hasattr(module, name)}
    biases = module["biases"][first][None] if "biases" in module else None
    row = mx.dequantize(weight[first][None], module["scales"][first][None], biases, **scheme)[0]
    return (*weight.shape[:-1], row.shape[0]), row[:SAMPLED].astype(mx.float32)
