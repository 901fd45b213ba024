"""The table of architectures: where each mlx-lm model keeps its layers, and what a layer's keys and values measure.

A raw key stands straight after the K projection: before k_norm, before RoPE, heads merged ``(B, T, H*D)``. A raw value
likewise. mlx-lm's own modules do all the computing: ``sections`` cuts and listens, ``entries`` writes caches.
"""

from dataclasses import dataclass

import mlx.nn as nn
from mlx_lm.models.cache import ConcatenateKVCache, KVCache, make_prompt_cache

from ..errors import UnsupportedModelError

LayerCache = KVCache | ConcatenateKVCache
Cache = list[LayerCache]


@dataclass(frozen=True)
class Family:
    """Attribute names of one architecture.

    ``qkv_proj`` is set where one projection yields query heads, key heads and value heads in that order;
    otherwise ``q_proj``, ``k_proj`` and ``v_proj`` stand alone. ``n_heads``, ``n_kv_heads``, ``scale``, ``rope`` and,
    where there are any, ``q_norm`` and ``k_norm`` are attributes of the attention module everywhere.
    """

    inner: str = "model"
    embedding: str = "embed_tokens"
    attention: str = "self_attn"
    q_proj: str = "q_proj"
    k_proj: str = "k_proj"
    v_proj: str = "v_proj"
    qkv_proj: str | None = None

    @property
    def kv_projections(self) -> tuple[str, ...]:
        """The modules that raw keys and values come from: the fused one, or one each."""
        return (self.qkv_proj,) if self.qkv_proj else (self.k_proj, self.v_proj)


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "olmo2": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "smollm3": Family(),
    "phi3": Family(qkv_proj="qkv_proj"),
    "openelm": Family(inner="transformer", embedding="token_embeddings", attention="attn", qkv_proj="qkv_proj"),
}


@dataclass(frozen=True)
class KVShape:
    """Key/value heads of one layer."""

    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Features of one raw key or value, ``H*D``."""
        return self.heads * self.head_dim


def check_architecture(model_type: str) -> None:
    """Refuse an architecture that has no row.

    Raises:
        UnsupportedModelError: always for an unknown ``model_type``.
    """
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"architecture '{model_type}' is not supported; supported: {', '.join(sorted(FAMILIES))}."
        )


def is_listed(model: nn.Module) -> bool:
    """Return whether a model's architecture has a row; the others can only be run as a whole."""
    return getattr(model, "model_type", None) in FAMILIES


def check_cache(model: nn.Module) -> None:
    """Refuse a model whose cache is not a plain KV cache in every layer.

    Raises:
        UnsupportedModelError: a sliding-window, recurrent or latent cache.
    """
    odd = {type(cache).__name__ for cache in make_prompt_cache(model)} - {"KVCache"}
    if odd:
        raise UnsupportedModelError(
            f"this {model.model_type} model uses {', '.join(sorted(odd))} (a sliding-window, recurrent or latent "
            "cache), which cannot be predicted; choose a model with full attention in every layer."
        )


def family_of(model: nn.Module) -> Family:
    """Return the row of an mlx-lm model.

    Raises:
        UnsupportedModelError: an unknown architecture.
    """
    check_architecture(model.model_type)
    return FAMILIES[model.model_type]


def inner_model(model: nn.Module) -> nn.Module:
    """Return the part between token ids and the final norm, without the output head."""
    return model[family_of(model).inner]


def hidden_size(model: nn.Module) -> int:
    """Return the width of the residual stream."""
    return inner_model(model).norm.weight.shape[0]


def linear_size(module: nn.Module) -> int:
    """Return the number of weights in a module's linear maps, quantised ones as if they were not."""
    size = 0
    for part in module.modules():
        if isinstance(part, nn.QuantizedLinear):
            size += part.weight.size * 32 // part.bits
        elif isinstance(part, nn.Linear):
            size += part.weight.size
    return size


def kv_shapes(model: nn.Module) -> list[KVShape]:
    """Return the key/value shape of every layer (they differ from layer to layer in OpenELM)."""
    family = family_of(model)
    return [kv_shape(layer[family.attention], family) for layer in model.layers]


def kv_shape(attention: nn.Module, family: Family) -> KVShape:
    """Return the key/value shape of one attention module."""
    heads = attention.n_kv_heads
    if family.qkv_proj:
        return KVShape(heads, _rows(attention[family.qkv_proj]) // (attention.n_heads + 2 * heads))
    return KVShape(heads, _rows(attention[family.k_proj]) // heads)


def _rows(projection: nn.Module) -> int:
    """Return a projection's output features, be it plain, quantised or with a low-rank update around it."""
    return projection.get("linear", projection).weight.shape[0]


def attention_of(model: nn.Module, layer: int) -> nn.Module:
    """Return a layer's attention module."""
    return model.layers[layer][family_of(model).attention]
