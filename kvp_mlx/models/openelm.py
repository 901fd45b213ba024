"""OpenELM's four sizes as mlx-lm configurations, vocabulary padded as in CoreNet.

Shapes follow OpenELM's rule (arXiv 2404.14619): query heads and FFN width grow linearly over depth.
"""

from dataclasses import dataclass
from typing import Any

GQA_GROUPS = 4
QKV_MULTIPLIERS = (0.5, 1.0)
FFN_MULTIPLIERS = (0.5, 4.0)
FFN_DIVISOR = 256
PADDED_VOCABULARY = 32128
CONTEXT_LENGTH = 2048


@dataclass(frozen=True)
class Size:
    """What tells the four OpenELM models apart."""

    model_dim: int
    layers: int
    head_dim: int


SIZES = {
    "270m": Size(1280, 16, 64),
    "450m": Size(1536, 20, 64),
    "1_1b": Size(2048, 28, 64),
    "3b": Size(3072, 36, 128),
}


def openelm_config(size: str) -> dict[str, Any]:
    """Return mlx-lm's config.json of an OpenELM model, vocabulary padded as in CoreNet."""
    shape = SIZES[size]
    heads = [
        _multiple(shape.model_dim * multiplier, shape.head_dim * GQA_GROUPS) // shape.head_dim
        for multiplier in _ramp(QKV_MULTIPLIERS, shape.layers)
    ]
    return {
        "model_type": "openelm",
        "head_dim": shape.head_dim,
        "num_transformer_layers": shape.layers,
        "model_dim": shape.model_dim,
        "vocab_size": PADDED_VOCABULARY,
        "ffn_dim_divisor": FFN_DIVISOR,
        "num_query_heads": heads,
        "num_kv_heads": [count // GQA_GROUPS for count in heads],
        "ffn_multipliers": _ramp(FFN_MULTIPLIERS, shape.layers),
        "max_context_length": CONTEXT_LENGTH,
    }


def _ramp(ends: tuple[float, float], layers: int) -> list[float]:
    first, last = ends
    return [round(first + (last - first) * i / (layers - 1), 2) for i in range(layers)]


def _multiple(value: float, divisor: int) -> int:
    """Round to the nearest multiple of ``divisor``, at least one, never losing more than a tenth."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
