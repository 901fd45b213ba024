"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one latent and one rotated key for all heads."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import ConcatenateKVCache, KVCache

from .kind import Kind, Target, rows

PROJECTION = "kv_a_proj_with_mqa"


class Latent(Kind):
    """Latent attention; the key that is to be rotated stands behind the latent."""

    title = "latent attention"
    is_rewritable = keeps_entries = True

    @classmethod
    def of(cls, layer: nn.Module, cache: Any) -> "Latent | None":
        """See ``Kind.of``."""
        return cls("self_attn") if type(cache) is KVCache and PROJECTION in layer.get("self_attn", ()) else None

    def targets(self, mixer: nn.Module) -> tuple[Target, ...]:
        """See ``Kind.targets``."""
        return (Target("latent", PROJECTION, rows(mixer[PROJECTION])),)

    def scores(self, mixer: nn.Module, hidden: mx.array, entries: tuple[mx.array, mx.array]) -> mx.array:
        """See ``Kind.scores``; a head's query is brought to the latents, as in decoding."""
        latents, keys = entries  # (B, 1, S, rank), (B, 1, S, RoPE features)
        if "q_proj" in mixer:
            queries = mixer.q_proj(hidden)
        else:
            queries = mixer.q_b_proj(mixer.q_a_layernorm(mixer.q_a_proj(hidden)))
        queries = queries.reshape(*hidden.shape[:2], mixer.num_heads, -1).swapaxes(1, 2)  # -> (B, query heads, T, D)
        plain, turned = mx.split(queries, [mixer.qk_nope_head_dim], axis=-1)
        turned = mixer.rope(turned, keys.shape[2] - hidden.shape[1])
        scores = mixer.embed_q(plain) @ latents.swapaxes(-1, -2) + turned @ keys.swapaxes(-1, -2)
        return mixer.scale * scores

    def pair_flops(self, mixer: nn.Module) -> float:
        """Return the FLOPs of one score and one weighted value in all heads, as in prefill."""
        return 2.0 * mixer.num_heads * (mixer.q_head_dim + mixer.v_head_dim)

    def mask(self, x: mx.array, cache: Any) -> Any:
        """See ``Kind.mask``."""
        return create_attention_mask(x, cache, return_array=True)

    def new_cache(self) -> Any:
        """See ``Kind.new_cache``."""
        return KVCache()

    def open_cache(self) -> Any:
        """See ``Kind.open_cache``."""
        return ConcatenateKVCache()
