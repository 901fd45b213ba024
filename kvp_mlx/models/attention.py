"""The attention weights of a few tokens, which mlx-lm's fused attention does not hand out."""

import mlx.core as mx
import mlx.nn as nn

from .families import mixer_of
from .kinds.attention import queries


def last_attention(model: nn.Module, layer: int, hidden: mx.array, keys: mx.array, tokens: int = 1) -> mx.array:
    """Return the attention (B, query heads, tokens, S) that the newest tokens pay to all that a layer's cache holds.

    Args:
        model: an mlx-lm model or a ``section`` of one.
        layer: one of its layers.
        hidden: what the layer's projections read ``(B, T, hidden)``, the newest token last.
        keys: the layer's cached keys ``(B, H, S, D)``.
        tokens: how many of the newest tokens.
    """
    batch, heads, length, dim = keys.shape
    mixer = mixer_of(model, layer)
    own = queries(mixer, hidden[:, -tokens:], dim, length - tokens)  # (B, query heads, tokens, D)
    grouped = own.reshape(batch, heads, -1, dim)  # -> (B, H, queries per key head * tokens, D)
    scores = mixer.scale * grouped @ keys.swapaxes(-1, -2)
    scores = scores.reshape(batch, -1, tokens, length)  # -> (B, query heads, tokens, S)
    is_seen = mx.arange(length) <= mx.arange(length - tokens, length)[:, None]
    return mx.softmax(mx.where(is_seen, scores, -mx.inf), axis=-1, precise=True)
