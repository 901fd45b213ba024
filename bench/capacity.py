"""Whether a run fits into memory, asked before it starts."""

import math
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..bundle.loading import KVPModel
from ..device.machine import free_bytes
from ..errors import InputError
from ..models.entries import one_token_cache
from ..models.families import LINEAR, kinds_of
from ..models.kinds.attention import query_heads
from ..models.loading import compute_dtype, is_norm

CACHE_STEP = 256  # positions that mlx-lm's KVCache grows by
SCORE_COPIES = 3  # scores, masked scores and their softmax, where attention is not fused


def require_memory(model: KVPModel, prompt_tokens: int, batch: int, step_size: int, *, loaded: bool) -> None:
    """Refuse a measurement that will not fit.

    Args:
        model: the bundle, evaluated or not.
        prompt_tokens: the longest prompt.
        batch: prompts at once.
        step_size: tokens per chunk.
        loaded: whether the weights are in memory already.

    Raises:
        InputError: the estimate exceeds what is free.
    """
    free = free_bytes()
    weights = 0 if loaded else weight_bytes([model.base, model.auxiliary, model.predictor])
    needed = weights + run_bytes(model, prompt_tokens, batch, step_size)
    if free is not None and needed > free:
        raise InputError(
            f"{batch} x {prompt_tokens} tokens need about {needed / 2**30:.1f} GiB"
            f"{'' if loaded else ' with the weights'}, {free / 2**30:.1f} GiB are free; lower --prompt-tokens, "
            "--batch-size or --prefill-step-size, or pass --dtype or --q-bits."
        )


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Return the bytes of all weights of some modules, those that they share counted once."""
    found = (array for module in modules for _, array in tree_flatten(module.parameters()))
    arrays = {id(array): array for array in found if isinstance(array, mx.array)}
    return sum(array.nbytes for array in arrays.values())


def run_bytes(model: KVPModel, prompt_tokens: int, batch: int, step_size: int) -> int:
    """Estimate the most that any arm holds beside the weights: its caches and one chunk's activations."""
    chunk = min(step_size, prompt_tokens)
    caches = cache_bytes(model.base, prompt_tokens, batch)
    if not model.is_prefix:
        caches += cache_bytes(model.auxiliary, prompt_tokens, batch)
    return caches + max(
        activation_bytes(model.base, chunk, prompt_tokens, batch), 3 * batch * 4 * model.base.args.vocab_size
    )


def cache_bytes(model: nn.Module, tokens: int, batch: int) -> int:
    """Return the bytes of a model's KV cache as mlx-lm allocates it, growing a layer included."""
    sizes = [layer_cache_bytes(layer, tokens) for layer in one_token_cache(model)]
    return batch * (sum(sizes) + max(sizes))


def layer_cache_bytes(layer: Any, tokens: int) -> int:
    """Return the bytes of one layer's cache of so many tokens, told from that of a single one."""
    if not hasattr(layer, "offset"):  # a state
        return int(layer.nbytes)
    positions = min(-(-tokens // CACHE_STEP) * CACHE_STEP, getattr(layer, "max_size", math.inf))
    return int(positions) * sum(array.nbytes // array.shape[2] for array in (layer.keys, layer.values))


def activation_bytes(model: nn.Module, chunk: int, context: int, batch: int) -> int:
    """Estimate one layer's activations: scores (whole, unless a GPU fuses attention), FFN and residual."""
    hidden = _stream_width(model.layers[0])
    is_fused = mx.default_device().type == mx.DeviceType.gpu
    kinds = zip(model.layers, kinds_of(model), strict=True)
    mixers = [layer[kind.mixer] for layer, kind in kinds if kind.keeps_entries]
    heads = 0 if is_fused else max(map(query_heads, mixers), default=0)
    ffn = max((_ffn_width(layer) for layer in model.layers), default=hidden)
    return batch * chunk * float_bytes(model) * (SCORE_COPIES * heads * context + 3 * ffn + 8 * hidden)


def float_bytes(model: nn.Module) -> int:
    """Return the bytes of one activation."""
    return compute_dtype(model).size


def _ffn_width(layer: nn.Module) -> int:
    linears = (part for part in layer.modules() if isinstance(part, LINEAR))
    return max(int(part.weight.shape[-2]) for part in linears)


def _stream_width(layer: nn.Module) -> int:
    """Return the width of the residual stream; a part of a model has no final norm to ask."""
    return int(next(part.weight.shape[0] for part in layer.values() if isinstance(part, nn.Module) and is_norm(part)))
