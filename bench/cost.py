"""The arithmetic: FLOPs and weight bytes of a first token, by each arm.

Counted: every matmul that is evaluated, attention over the causal half, the predictor, the first step.
Not counted: embedding look-up and output head, norms, softmax. The last layer of a model that only fills a
cache contributes its K and V projections (all of a fused projection) and nothing else: that is so for mlx-lm's
own prefill too, since nothing asks for the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..arms import Arm, answering_model
from ..baselines import kept_count, lazy_retention, static_layers
from ..bundle import KVPModel
from ..families import family_of, kv_shapes, linear_size, section


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of weights read."""

    flops: float = 0.0
    weight_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.weight_bytes + other.weight_bytes)


def arm_work(model: KVPModel, arm: Arm, prompt_tokens: int, batch: int) -> Work:
    """Return the work of an arm up to its first token (``full`` for kinds that are not listed here)."""
    read, base = prompt_tokens - 1, model.base
    match arm.kind:
        case "kvp":
            return kvp_work(model, prompt_tokens, batch, int(arm.numbers[0]) if arm.numbers else 0)
        case "random" | "static" | "spec":
            kept = kept_count(read, arm.numbers[0])
            choosing = {
                "random": Work(),
                "static": prefill_work(section(base, 0, static_layers(base)), read, batch),
                "spec": prefill_work(model.auxiliary, read, batch),
            }
            return choosing[arm.kind] + prefill_work(base, kept, batch) + step_work(base, kept + 1, batch)
        case "lazy":
            depth = len(base.layers)
            shares = [lazy_retention(layer, depth, *arm.numbers) for layer in range(depth)]
            kept_by_layer = [kept_count(read, share) for share in shares]
            return prefill_work(base, kept_by_layer, batch) + step_work(base, kept_by_layer[-1] + 1, batch)
        case "auxiliary" | "layers":
            return _alone_work(answering_model(model, arm), prompt_tokens, batch)
        case _:
            return full_work(model, prompt_tokens, batch)


def full_work(model: KVPModel, prompt_tokens: int, batch: int) -> Work:
    """Return the work of mlx-lm's own prefill and first step."""
    return _alone_work(model.base, prompt_tokens, batch)


def kvp_work(model: KVPModel, prompt_tokens: int, batch: int, exact_tail: int = 0) -> Work:
    """Return the work of auxiliary prefill, prediction, the exact tail and the base's first step."""
    read = prompt_tokens - 1 - exact_tail
    work = prefill_work(model.auxiliary, read, batch) + predictor_work(model, read, batch)
    if exact_tail:
        work += prefill_work(model.base, exact_tail, batch, past=read)
    return work + step_work(model.base, prompt_tokens, batch)


def predictor_work(model: KVPModel, tokens: int, batch: int) -> Work:
    """Return the work of the predictor's maps on ``batch * tokens`` positions."""
    sizes = sum(block.in_width * block.out_width for block in model.predictor.blocks)
    return Work(2.0 * batch * tokens * sizes, _bytes(model.predictor))


def prefill_work(model: nn.Module, tokens: int | Sequence[int], batch: int, *, past: int = 0) -> Work:
    """Return the work of filling a cache; the last layer only projects K and V.

    Args:
        model: an mlx-lm model.
        tokens: positions to read, one number or one per layer.
        batch: prompts at once.
        past: positions that the cache holds already.
    """
    family, work = family_of(model), Work()
    counts = [tokens] * len(model.layers) if isinstance(tokens, int) else tokens
    for index, (layer, count) in enumerate(zip(model.layers, counts, strict=True)):
        attention = layer[family.attention]
        if index < len(model.layers) - 1:
            work += Work(2.0 * batch * count * linear_size(layer), _bytes(layer))
            width = attention.n_heads * kv_shapes(model)[index].head_dim
            work += Work(4.0 * batch * width * count * (past + (count + 1) / 2))
        else:
            names = [family.qkv_proj] if family.qkv_proj else [family.k_proj, family.v_proj]
            for projection in (attention[name] for name in names):
                work += Work(2.0 * batch * count * linear_size(projection), _bytes(projection))
    return work


def step_work(model: nn.Module, context: int, batch: int) -> Work:
    """Return the work of one decoding step that attends to ``context`` positions; bytes include the head."""
    family = family_of(model)
    work = Work(0.0, _bytes(model))
    for layer, shape in zip(model.layers, kv_shapes(model), strict=True):
        attention = 4.0 * batch * context * layer[family.attention].n_heads * shape.head_dim
        work += Work(2.0 * batch * linear_size(layer) + attention)
    return work


def parameters_of(module: nn.Module) -> int:
    """Return the number of parameters, embeddings included."""
    return sum(array.size for _, array in tree_flatten(module.parameters()))


def _alone_work(model: nn.Module, prompt_tokens: int, batch: int) -> Work:
    return prefill_work(model, prompt_tokens - 1, batch) + step_work(model, prompt_tokens, batch)


def _bytes(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()) if isinstance(array, mx.array))
