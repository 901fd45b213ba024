"""Layer by layer, how far predicted entries are from the true ones, and how much of that attention gets to see.

Closed-form fit quality says little about the answer; the cosine of attention's outputs does (arXiv 2609.00891).
"""

from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..bundle.loading import KVPModel
from ..engine.prefill import base_prefill, predict_base_cache
from ..models.sections import mixer_outputs


def measure_layers(
    model: KVPModel, windows: list[list[int]], continuation_tokens: int, *, recompute: float | None = None
) -> list[dict[str, Any]]:
    """Compare the predicted with the true cache on documents, a mean over them.

    Args:
        model: the bundle.
        windows: token ids, each a prompt followed by ``continuation_tokens`` whose queries read the cache.
        continuation_tokens: how many.
        recompute: share of the tokens that the base reads itself (default: the bundle's).

    Returns:
        Per predicted layer: ``layer``; ``key_error`` and ``value_error``, the distance of the entries (keys after
        RoPE) relative to the true entries' norm; ``attention_cosine`` of the attention block's outputs for the
        true queries on both caches.
    """
    rows = [document_rows(model, window, continuation_tokens, recompute) for window in windows]
    layers = [layer for layer, sources in enumerate(model.config.predictor.layer_map) if sources is not None]
    means = np.mean(rows, axis=0)
    names = ("key_error", "value_error", "attention_cosine")
    return [{"layer": layer, **dict(zip(names, map(float, means[layer]), strict=True))} for layer in layers]


def document_rows(model: KVPModel, window: list[int], continuation_tokens: int, recompute: float | None) -> np.ndarray:
    """Return (layers, 3): key error, value error and attention cosine of one document."""
    split = len(window) - continuation_tokens
    prompt, rest = mx.array([window[:split]]), mx.array([window[split:]])
    true, predicted = base_prefill(model, prompt), predict_base_cache(model, prompt, recompute=recompute)
    pairs = [(one.keys_and_values(), other.keys_and_values()) for one, other in zip(true, predicted, strict=True)]
    errors = [[relative_error(b[part], a[part]) for part in (0, 1)] for a, b in pairs]
    streams, on_true = mixer_outputs(model.base, rest, true)
    _, on_predicted = mixer_outputs(model.base, rest, predicted, streams)
    cosines = [cosine(a, b) for a, b in zip(on_true, on_predicted, strict=True)]
    return np.array([[*error, close] for error, close in zip(errors, cosines, strict=True)])


def relative_error(x: mx.array, true: mx.array) -> float:
    """Return ||x - true|| / ||true||."""
    x, true = x.astype(mx.float32), true.astype(mx.float32)
    return cast(float, mx.sqrt(mx.square(x - true).sum() / mx.square(true).sum()).item())


def cosine(x: mx.array, y: mx.array) -> float:
    """Return the cosine between vectors (..., features), a mean over them."""
    x, y = x.astype(mx.float32), y.astype(mx.float32)
    norms = mx.sqrt(mx.square(x).sum(axis=-1) * mx.square(y).sum(axis=-1))
    return cast(float, ((x * y).sum(axis=-1) / norms).mean().item())
