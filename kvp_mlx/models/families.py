"""The table of architectures: where each mlx-lm model keeps its parts, and of what kind each of its layers is.

mlx-lm's own modules do all the computing: ``kinds`` says what a layer's cache is made of, ``sections`` cuts and
listens, ``entries`` writes caches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx.nn.layers import distributed
from mlx_lm.models.cache import ConcatenateKVCache, KVCache, make_prompt_cache
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..errors import UnsupportedModelError
from .kinds import Kind, Target, kind_of
from .kinds.attention import kv_heads

EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
SUMMING = (distributed.ShardedToAllLinear, distributed.QuantizedShardedToAllLinear)
"""Linear maps whose outputs hosts add up."""
SHARDED = (distributed.AllToShardedLinear, distributed.QuantizedAllToShardedLinear, *SUMMING)
QUANTISED = (nn.QuantizedLinear, distributed.QuantizedAllToShardedLinear, distributed.QuantizedShardedToAllLinear)
LINEAR = (nn.Linear, nn.QuantizedLinear, MultiLinear, QuantizedMultiLinear, *EXPERTS, *SHARDED)
CHOSEN = ("top_k", "num_experts_per_tok", "top_k_experts", "k")
"""What mixtures (or their ``config``) call the number of experts that a token goes through."""
LayerCache = KVCache | ConcatenateKVCache
Cache = list[LayerCache]


@dataclass(frozen=True)
class Family:
    """Attribute names of one architecture: of the part between token ids and output head, and within it."""

    inner: str = "model"
    embedding: str = "embed_tokens"
    norm: str = "norm"


FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "ministral3", "mistral3"), Family()),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), Family()),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), Family()),
    **dict.fromkeys(("gemma3", "gemma3_text", "gemma4", "gemma4_text", "gpt_oss", "cohere2", "exaone4"), Family()),
    **dict.fromkeys(("olmo2", "olmo3", "olmoe", "smollm3", "phi3", "granite", "seed_oss"), Family()),
    **dict.fromkeys(
        ("glm4", "glm4_moe", "glm4_moe_lite", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe"), Family()
    ),
    **dict.fromkeys(("lfm2", "lfm2_moe"), Family(norm="embedding_norm")),
    "openelm": Family(inner="transformer", embedding="token_embeddings"),
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


def check_architecture(model_type: str, text_type: str | None = None) -> None:
    """Refuse an architecture that has no row.

    Args:
        model_type: of a model.
        text_type: of the language model within it.

    Raises:
        UnsupportedModelError: always for an unknown one.
    """
    if unknown := [name for name in (model_type, text_type) if name is not None and name not in FAMILIES]:
        model_type = unknown[0]
        raise UnsupportedModelError(
            f"architecture '{model_type}' is not supported; supported: {', '.join(sorted(FAMILIES))}."
        )


def is_listed(model: nn.Module) -> bool:
    """Return whether a model's layers are known, so that it can be cut; the others can only be run as a whole."""
    if getattr(text_model(model), "model_type", None) not in FAMILIES:
        return False
    try:
        return bool(kinds_of(model))
    except UnsupportedModelError:
        return False


def check_cache(model: nn.Module) -> None:
    """Refuse a model with a layer of a kind that cannot be predicted.

    Raises:
        UnsupportedModelError: such a one, by the name of its cache.
    """
    kinds_of(model)


def text_model(model: nn.Module) -> nn.Module:
    """Return the language model within one that has other parts beside it (for images), else the model itself."""
    return model.get("language_model", model)


def family_of(model: nn.Module) -> Family:
    """Return the row of an mlx-lm model.

    Raises:
        UnsupportedModelError: an unknown architecture.
    """
    check_architecture(text_model(model).model_type)
    return FAMILIES[text_model(model).model_type]


def inner_model(model: nn.Module) -> nn.Module:
    """Return the part between token ids and the final norm, without the output head."""
    return text_model(model)[family_of(model).inner]


def kinds_of(model: nn.Module) -> tuple[Kind, ...]:
    """Return the kind of every layer.

    Raises:
        UnsupportedModelError: an unknown architecture, or a layer of a kind that cannot be predicted.
    """
    inner = inner_model(model)
    if "kinds" in inner:  # a cut one
        kinds: tuple[Kind, ...] = inner["kinds"]
        return kinds
    layers = layers_of(model)
    if odd := sorted({name for kind, name in layers if kind is None}):
        raise UnsupportedModelError(
            f"this {text_model(model).model_type} model uses {', '.join(odd)}, which belongs to no kind of layer that "
            "can be predicted; choose another model."
        )
    return tuple(kind for kind, _ in layers if kind is not None)


def layers_of(model: nn.Module) -> list[tuple[Kind | None, str]]:
    """Return for every layer of any mlx-lm model its kind, if it is one of ours, and its cache's name."""
    text = text_model(model)
    caches = [*make_prompt_cache(text)]
    caches += [None] * (len(text.layers) - len(caches))
    names = ["another layer's cache" if cache is None else type(cache).__name__ for cache in caches]
    kinds = [None if cache is None else kind_of(layer, cache) for layer, cache in zip(text.layers, caches, strict=True)]
    return list(zip(kinds, names, strict=True))


def fixed_kinds(model: nn.Module) -> list[str]:
    """Return the kinds of a model's layers whose caches can be continued, but not computed anew in places."""
    return sorted({kind.title for kind in kinds_of(model) if not kind.is_rewritable})


def mixer_of(model: nn.Module, layer: int) -> nn.Module:
    """Return the module of a layer that looks at other positions."""
    return inner_model(model).layers[layer][kinds_of(model)[layer].mixer]


def targets_of(model: nn.Module) -> list[tuple[Target, ...]]:
    """Return what feeds the cache of every layer."""
    layers = zip(inner_model(model).layers, kinds_of(model), strict=True)
    return [kind.targets(layer[kind.mixer]) for layer, kind in layers]


def hidden_size(model: nn.Module) -> int:
    """Return the width of the residual stream."""
    inner = inner_model(model)
    width: int = inner.width if "kinds" in inner else inner[family_of(model).norm].weight.shape[0]
    return width


def linear_size(module: nn.Module, chosen: int | None = None) -> float:
    """Return the number of weights in a module's linear maps that one token uses, quantised ones as if they were not.

    Args:
        module: any.
        chosen: how many experts a token goes through, where the module is within a mixture.
    """
    if isinstance(module, LINEAR):
        size = module.weight.size * 32 // module.bits if "scales" in module else module.weight.size
        return size * chosen / module.weight.shape[0] if chosen and isinstance(module, EXPERTS) else size
    places = (module, getattr(module, "config", None))
    found = (getattr(place, name, None) for place in places for name in CHOSEN)
    chosen = next((count for count in found if isinstance(count, int)), chosen)
    children = [child for value in module.children().values() for child in _modules(value)]
    return sum(linear_size(child, chosen) for child in children)


def _modules(value: Any) -> Iterator[nn.Module]:
    """Yield the modules in a module's attribute: itself, or those in lists and dictionaries."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _modules(part)


def kv_shapes(model: nn.Module) -> list[KVShape]:
    """Return the key/value shape of every layer of a model of attention layers (they differ in OpenELM)."""
    mixers = [layer[kind.mixer] for layer, kind in zip(inner_model(model).layers, kinds_of(model), strict=True)]
    widths = [targets[0].width for targets in targets_of(model)]
    return [KVShape(kv_heads(mixer), width // kv_heads(mixer)) for mixer, width in zip(mixers, widths, strict=True)]
