"""What to measure: a bundle or a published pair with random weights, in a chosen precision."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..bundle.loading import KVPModel, build_predictor, load
from ..bundle.presets import preset_parts
from ..errors import InputError
from ..models.families import QUANTISED
from ..models.loading import compute_dtype
from ..models.sections import prefix_model
from .capacity import require_memory

Q_GROUP_SIZE = 64


def preset_for_bench(
    name: str, dtype: str | None, q_bits: int | None, *, prompt_tokens: int, batch: int, step_size: int
) -> KVPModel:
    """Build a published pair with random weights, after asking whether it and its run fit into memory.

    Raises:
        InputError: no preset of that name, or too little memory.
    """
    mx.random.seed(0)
    base, auxiliary, config = preset_parts(name)
    model = KVPModel(base, auxiliary, build_predictor(base, auxiliary, config), None, config, {})
    model = in_precision(model, dtype or "float32", q_bits)
    require_memory(model, prompt_tokens, batch, step_size, loaded=False)
    for part in (model.base, model.auxiliary, model.predictor):
        for _, array in tree_flatten(part.parameters()):  # one by one: drawn in fp32, then converted
            mx.eval(array)
    return model


def bundle_for_bench(name: str, dtype: str | None, q_bits: int | None, **how: Any) -> KVPModel:
    """Load a bundle, ``how`` as ``load`` takes it; without ``dtype`` and ``q_bits`` as other commands would run it."""
    model = load(name, **how)
    if dtype is None and q_bits is None:
        return model
    model = in_precision(model, dtype, q_bits)
    mx.eval(model.base.parameters(), model.auxiliary.parameters(), model.predictor.parameters())
    return model


def in_precision(model: KVPModel, dtype: str | None, q_bits: int | None) -> KVPModel:
    """Return the bundle with its weights in another float type, base and auxiliary quantised on request; lazy.

    Raises:
        InputError: a prefix with low-rank updates cannot be quantised here.
    """
    if q_bits and model.config.auxiliary.adapter_rank is not None:
        raise InputError("a prefix with low-rank updates is not quantised here; leave out --q-bits.")
    if q_bits and model.hosts is not None:
        raise InputError("what is spread over hosts is not quantised here; quantise the base first ('kvp convert').")
    models = [model.base] if model.has_exact_prefix else [model.base, model.auxiliary]
    for part in models:
        if dtype is not None:
            part.set_dtype(getattr(mx, dtype))
        if q_bits:
            nn.quantize(part, group_size=Q_GROUP_SIZE, bits=q_bits, class_predicate=_fits)
    model.predictor.set_dtype(compute_dtype(model.base))
    if model.has_exact_prefix:  # again, now that the base's modules are others
        return replace(model, auxiliary=prefix_model(model.base, model.config.auxiliary.layers))
    return model


def _fits(_: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % Q_GROUP_SIZE == 0


def precision_name(model: KVPModel) -> str:
    """Return what the base computes in, such as ``float32`` or ``4-bit bfloat16``."""
    bits = {m.bits for m in model.base.modules() if isinstance(m, QUANTISED)}
    dtype = str(compute_dtype(model.base)).removeprefix("mlx.core.")
    return " ".join([*(f"{b}-bit" for b in sorted(bits)), dtype])
