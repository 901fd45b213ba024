"""Tokens at positions of their own, where those in between are left out."""

import contextlib
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from .families import attention_of


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


@contextlib.contextmanager
def rope_at(model: nn.Module, positions: mx.array) -> Iterator[None]:
    """Let all layers of a model turn what they read to ``positions`` (B, T) while the block runs."""
    attentions = [attention_of(model, layer) for layer in range(len(model.layers))]
    ropes = [attention.rope for attention in attentions]
    for attention, rope in zip(attentions, ropes, strict=True):
        attention.rope = _RoPEAt(rope, positions)
    try:
        yield
    finally:
        for attention, rope in zip(attentions, ropes, strict=True):
            attention.rope = rope
