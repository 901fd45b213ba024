"""The arithmetic of every arm (``kvp_mlx.arms``), counted as in ``cost``.

The few queries that choose tokens, and sorting them, are left out.
"""

from dataclasses import replace

import mlx.nn as nn

from ..arms import Arm, answering_model
from ..baselines import kept_count, lazy_retention, static_layers
from ..bundle import KVPModel
from ..families import attention_of, kv_shapes, section
from .cost import Work, kv_work, kvp_work, layer_work, prefill_work, step_work


def arm_work(model: KVPModel, arm: Arm, prompt_tokens: int, batch: int = 1) -> Work:
    """Return the work of an arm's first token: reading the prompt, and the answering model's first step."""
    base, read = model.base, prompt_tokens - 1
    kept = kept_count(read, arm.numbers[0]) if arm.kind in ("random", "static", "spec") else 0
    match arm.kind:
        case "kvp":
            if len(arm.numbers) > 1:
                model = replace(model, recompute=arm.numbers[1])
            tail = int(arm.numbers[0]) if arm.numbers else 0
            if tail < read:
                return kvp_work(model, prompt_tokens, batch, tail)
            return prefill_work(base, read, batch) + step_work(base, prompt_tokens, batch)
        case "random":
            choice = Work()
        case "static":
            choice = prefill_work(section(base, 0, static_layers(base)), prompt_tokens, batch)
        case "spec":
            choice = prefill_work(model.auxiliary, prompt_tokens, batch)
        case "lazy":
            return lazy_work(base, read, arm.numbers, batch)
        case _:
            alone = answering_model(model, arm)
            return prefill_work(alone, read, batch) + step_work(alone, prompt_tokens, batch)
    return choice + prefill_work(base, kept, batch) + step_work(base, kept + 1, batch)


def lazy_work(base: nn.Module, read: int, retention: tuple[float, ...], batch: int) -> Work:
    """Return LazyLLM's work: every layer over its own share of the prompt, the last token among them."""
    depth, work = len(base.layers), step_work(base, 0, batch)
    for layer in range(depth):
        kept = kept_count(read, lazy_retention(layer, depth, *retention))
        layer_or_kv = layer_work if layer + 1 < depth else kv_work
        work += layer_or_kv(base, layer, kept + 1, batch)
        work += Work(batch * attention_flops(base, layer, 1, kept + 1))  # of the step
    return work


def attention_flops(model: nn.Module, layer: int, queries: int, keys: int) -> float:
    """Return the FLOPs of scores and weighted values of ``queries`` tokens over ``keys`` entries of one layer."""
    return 4.0 * queries * keys * attention_of(model, layer).n_heads * kv_shapes(model)[layer].head_dim
