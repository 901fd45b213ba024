"""Tokens at positions of their own, where those in between are left out."""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE

from .families import inner_model, kinds_of
from .sections import StandIn, with_mixers


class _RoPEAt(nn.Module):
    """Stands in for a RoPE module and turns every token to a position of its own."""

    def __init__(self, rope: nn.Module, positions: mx.array):
        super().__init__()
        self.rope = rope
        self.positions = positions

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        batch, heads, length, dim = x.shape
        alone = x.transpose(0, 2, 1, 3).reshape(batch * length, heads, 1, dim)  # (B, H, T, D) -> (B*T, H, 1, D)
        turned = self.rope(alone, offset=self.positions.reshape(-1))
        return turned.reshape(batch, length, heads, dim).transpose(0, 2, 1, 3)  # -> (B, H, T, D)


class _ScaledAt(StandIn):
    """Stands in for an attention whose queries grow with their positions (Ministral 3), as mlx-lm's own call has it."""

    def __init__(self, attention: nn.Module, positions: mx.array):
        super().__init__(attention)
        step = attention.original_max_position_embeddings
        scale = 1 + attention.scaling_beta * mx.log(1 + mx.floor(positions / step))  # (B, T)
        self._attention, self._scale = attention, scale[:, None, :, None]

    def __call__(self, x: mx.array, _: mx.array | None, *rest: Any, **options: Any) -> mx.array:
        output: mx.array = self._attention(x, self._scale.astype(x.dtype), *rest, **options)
        return output


def at_positions(model: nn.Module, positions: mx.array) -> nn.Module:
    """Return a model whose layers turn what they read to ``positions`` (B, T), sharing everything else."""
    mixers = {}
    for number, (layer, kind) in enumerate(zip(inner_model(model).layers, kinds_of(model), strict=True)):
        mixers[number] = copy.copy(layer[kind.mixer])
        mixers[number].rope = _RoPEAt(settled(mixers[number].rope, positions), positions)
        if "scaling_beta" in vars(mixers[number]):
            mixers[number] = _ScaledAt(mixers[number], positions)
    return with_mixers(model, mixers)


def settled(rope: nn.Module, positions: mx.array) -> nn.Module:
    """Return a RoPE module that turns to ``positions`` as this one does in a sequence that ends with the last of them.

    Dynamic scaling takes its base from the sequence's length, which mlx-lm works out for one offset only.
    """
    if not isinstance(rope, DynamicNTKScalingRoPE):
        return rope
    length: Any = positions.max().item()
    stretch = max(length + 1, rope.max_position_embeddings) / rope.max_position_embeddings
    base = rope.base * (rope.factor * stretch - (rope.factor - 1)) ** (rope.dims / (rope.dims - 2))
    return nn.RoPE(rope.dims, rope.traditional, base)
