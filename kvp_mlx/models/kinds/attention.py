"""Attention over all positions: K and V projections, standing alone or fused with Q's."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import ConcatenateKVCache, KVCache

from .kind import Kind, Layer, RawOutputs, Target, rows

MIXERS = ("self_attn", "attn")
PROJECTIONS = {"keys": "k_proj", "values": "v_proj"}
FUSED = "qkv_proj"
"""Query heads, key heads and value heads in that order."""
ROTATES = ("use_rope", "use_sliding_window")
"""What a module calls it whether it rotates its keys, where not all of a model's do (EXAONE 4, Command R7B)."""


class Heads(NamedTuple):
    """Keys and values ``(B, H, T, D)`` as the cache takes them but for RoPE, and the RoPE that is still to come."""

    keys: mx.array
    values: mx.array
    rope: nn.Module | None


class Attention(Kind):
    """Full attention, with whatever norms, gates, biases and sinks."""

    title = "full attention"
    is_rewritable = keeps_entries = True

    @classmethod
    def of(cls, layer: nn.Module, cache: Any) -> "Attention | None":
        """See ``Kind.of``."""
        mixer = mixer_of(layer)
        return cls(mixer) if mixer and type(cache) is KVCache else None

    def targets(self, mixer: nn.Module) -> tuple[Target, ...]:
        """Return the keys and the values; keys alone where they serve as values too."""
        if FUSED not in mixer:
            given = [(name, projection) for name, projection in PROJECTIONS.items() if projection in mixer]
            return tuple(Target(name, projection, rows(mixer[projection])) for name, projection in given)
        features = rows(mixer[FUSED])
        width = features // (query_heads(mixer) + 2 * kv_heads(mixer)) * kv_heads(mixer)
        return (
            Target("keys", FUSED, width, features - 2 * width),
            Target("values", FUSED, width, features - width),
        )

    def mask(self, x: mx.array, cache: Any) -> Any:
        """See ``Kind.mask``."""
        return create_attention_mask(x, cache)

    def new_cache(self) -> Any:
        """See ``Kind.new_cache``."""
        return KVCache()

    def open_cache(self) -> Any:
        """See ``Kind.open_cache``."""
        return ConcatenateKVCache()

    def pair_flops(self, mixer: nn.Module) -> float:
        """Return the FLOPs of one score and one weighted value in all heads."""
        head_dim = self.targets(mixer)[0].width // kv_heads(mixer)
        return 4.0 * query_heads(mixer) * head_dim

    def scores(self, mixer: nn.Module, hidden: mx.array, entries: tuple[mx.array, mx.array]) -> mx.array:
        """See ``Kind.scores``."""
        keys, tokens = entries[0], hidden.shape[1]
        batch, heads, length, dim = keys.shape
        own = queries(mixer, hidden, dim, length - tokens)  # (B, query heads, T, D)
        grouped = own.reshape(batch, heads, -1, dim)  # -> (B, H, queries per key head * T, D)
        scores = mixer.scale * grouped @ keys.swapaxes(-1, -2)
        return scores.reshape(batch, -1, tokens, length)  # -> (B, query heads, T, S)

    def compared(self, mixer: nn.Module, raw: RawOutputs, x: mx.array) -> list[mx.array]:
        """Return keys after their norm and before RoPE, and values likewise, heads merged."""
        keys, values, _ = self.heads(mixer, raw)
        return [part.swapaxes(1, 2).flatten(2) for part in (keys, values)]  # (B, H, T, D) -> (B, T, H*D)

    def heads(self, mixer: nn.Module, raw: RawOutputs) -> Heads:
        """Return raw keys and values as the layer's own call makes them: split into heads, normed, not yet rotated."""
        keys, count = raw["keys"], kv_heads(mixer)
        return Heads(
            _split(_normed(_module(mixer, "k_norm", "k_layernorm"), keys), count),
            _split(raw.get("values", keys), count, _module(mixer, "v_norm")),
            getattr(mixer, "rope", None) if is_rotated(mixer) else None,
        )

    @classmethod
    def write_all(cls, layers: Sequence[Layer], x: mx.array) -> None:
        """Do what ``write`` does, ten times as fast; layers with the same RoPE are rotated in one call."""
        groups: dict[Any, list[tuple[Layer, Heads]]] = {}
        for layer in layers:
            heads = layer.kind.heads(layer.mixer, layer.raw)  # type: ignore[attr-defined]
            groups.setdefault(_rope_key(heads.rope), []).append((layer, heads))
        for members in groups.values():
            keys = [heads.keys for _, heads in members]
            rope = members[0][1].rope
            if rope is not None:
                ends = [sum(part.shape[1] for part in keys[: i + 1]) for i in range(len(keys) - 1)]
                offset = members[0][0].cache.offset
                keys = list(mx.split(rope(mx.concatenate(keys, axis=1), offset=offset), ends, axis=1))
            for (layer, heads), rotated in zip(members, keys, strict=True):
                layer.cache.update_and_fetch(rotated, heads.values)


def is_rotated(mixer: nn.Module) -> bool:
    """Return whether an attention module makes use of its RoPE, if it has one."""
    return all(getattr(mixer, flag, True) for flag in ROTATES)


def _rope_key(rope: nn.Module | None) -> Any:
    """Return what two RoPE modules must agree in to be called as one; other kinds stand for themselves alone."""
    if rope is not None and type(rope) is nn.RoPE:
        return rope.dims, rope.traditional, rope.base, rope.scale
    return id(rope)


def mixer_of(layer: nn.Module) -> str | None:
    """Return the name of a layer's attention module whose K (and V) projections stand alone or are fused."""
    names = (name for name in MIXERS if name in layer)
    return next((name for name in names if {FUSED, *PROJECTIONS.values()} & layer[name].keys()), None)


def queries(mixer: nn.Module, hidden: mx.array, head_dim: int, offset: int) -> mx.array:
    """Return a layer's queries ``(B, query heads, T, D)``, normed and rotated, from what its projections read.

    Args:
        mixer: the attention module.
        hidden: the projections' input ``(B, T, hidden)``.
        head_dim: features of a head.
        offset: position of the first of these tokens.
    """
    heads = query_heads(mixer)
    projected = mixer[FUSED if FUSED in mixer else "q_proj"](hidden)[..., : heads * head_dim]
    split = _normed(_module(mixer, "q_norm", "q_layernorm"), projected).reshape(*hidden.shape[:2], heads, head_dim)
    rotated: mx.array = mixer.rope(split.transpose(0, 2, 1, 3), offset=offset)  # (B, T, H, D) -> (B, H, T, D)
    return rotated


def _normed(norm: nn.Module | None, x: mx.array) -> mx.array:
    """Apply a norm, if there is one, to merged heads; it spans one head or all, told by the size of its weight."""
    if norm is None:
        return x
    heads = x.reshape(*x.shape[:2], -1, norm.weight.size)  # (B, T, H*D) -> (B, T, H or 1, D or H*D)
    return norm(heads).reshape(x.shape)


def _split(x: mx.array, heads: int, norm: nn.Module | None = None) -> mx.array:
    """Split merged heads (B, T, H*D) into (B, H, T, D), each of them normed if there is a norm."""
    split = x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
    return split if norm is None else norm(split)


def _module(mixer: nn.Module, *names: str) -> nn.Module | None:
    return next((mixer[name] for name in names if name in mixer), None)


def query_heads(mixer: nn.Module) -> int:
    """Return how many query heads an attention module has."""
    return _first(mixer, "n_heads", "num_attention_heads", "num_heads")


def kv_heads(mixer: nn.Module) -> int:
    """Return how many key heads an attention module has."""
    return _first(mixer, "n_kv_heads", "num_key_value_heads")


def _first(mixer: nn.Module, *names: str) -> int:
    return next(int(getattr(mixer, name)) for name in names if hasattr(mixer, name))
