"""Gated delta nets (arXiv 2412.06464): a convolution's tail and a state in place of entries."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_ssm_mask
from mlx_lm.models.cache import ArraysCache

from .kind import Kind, Target


class DeltaNet(Kind):
    """A gated delta net: keys and values go into the state, ``a`` and ``b`` say how much of it and of them stays.

    Queries only read the state; but the convolution before it goes on from the last ones.
    """

    title = "gated delta net"

    @classmethod
    def of(cls, layer: nn.Module, cache: Any) -> "DeltaNet | None":
        """See ``Kind.of``."""
        return cls("linear_attn") if type(cache) is ArraysCache and "conv1d" in layer.get("linear_attn", ()) else None

    def targets(self, mixer: nn.Module) -> tuple[Target, ...]:
        """See ``Kind.targets``; Qwen3-Next keeps what belongs to one key head together."""
        keys, values, heads = mixer.key_dim, mixer.value_dim, mixer.num_v_heads
        tail = mixer.conv_kernel_size - 1
        if "in_proj_qkv" in mixer:
            return (
                Target("queries", "in_proj_qkv", keys, last=tail),
                Target("keys", "in_proj_qkv", keys, keys),
                Target("values", "in_proj_qkv", values, 2 * keys),
                Target("a", "in_proj_a", heads),
                Target("b", "in_proj_b", heads),
            )
        groups = mixer.num_k_heads
        return (
            Target("queries", "in_proj_qkvz", keys, 0, groups, last=tail),
            Target("keys", "in_proj_qkvz", keys, keys // groups, groups),
            Target("values", "in_proj_qkvz", values, 2 * keys // groups, groups),
            Target("b", "in_proj_ba", heads, 0, groups),
            Target("a", "in_proj_ba", heads, heads // groups, groups),
        )

    def state_flops(self, mixer: nn.Module) -> float:
        """Return the convolution's, and of each number of the state its decay, reading and update."""
        state = mixer.num_v_heads * mixer.head_k_dim * mixer.head_v_dim
        return 2.0 * mixer.conv_kernel_size * mixer.conv_dim + 7.0 * state

    def mask(self, x: mx.array, cache: Any) -> Any:
        """See ``Kind.mask``."""
        return create_ssm_mask(x, cache)

    def new_cache(self) -> Any:
        """See ``Kind.new_cache``."""
        return ArraysCache(size=2)
