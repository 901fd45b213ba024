"""The attention weights of a few tokens, which mlx-lm's fused attention does not hand out."""

import mlx.core as mx
import mlx.nn as nn

from .families import LayerCache, kinds_of, mixer_of


def last_attention(model: nn.Module, layer: int, hidden: mx.array, cache: LayerCache, tokens: int = 1) -> mx.array:
    """Return the attention (B, query heads, tokens, S) that the newest tokens pay to all that a layer's cache holds.

    Args:
        model: an mlx-lm model or a ``section`` of one.
        layer: one of its layers, of a kind that keeps entries.
        hidden: what the layer's projections read ``(B, T, hidden)``, the newest token last.
        cache: the layer's, of S positions.
        tokens: how many of the newest tokens.
    """
    entries = cache.keys_and_values()
    scores = kinds_of(model)[layer].scores(mixer_of(model, layer), hidden[:, -tokens:], entries)
    length = scores.shape[-1]
    is_seen = mx.arange(length) <= mx.arange(length - tokens, length)[:, None]
    return mx.softmax(mx.where(is_seen, scores, -mx.inf), axis=-1, precise=True)
