"""Llama, OpenELM and KV Prediction in plain NumPy: what the package is checked against.

Written from method.md and the published architectures; shares no code with kvp_mlx or mlx-lm. Everything is
float64 and goes by explicit absolute positions. Weights come under mlx-lm's parameter names.

Letters in shape comments: B batch, T new positions, S cached positions, H key/value heads, D head_dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Entries:
    """One layer's cache: keys normed and rotated, values raw, both (B, H, S, D), and their positions (S,)."""

    keys: np.ndarray
    values: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def first(self, length: int) -> "Entries":
        return Entries(self.keys[:, :, :length], self.values[:, :, :length], self.positions[:length])


@dataclass(frozen=True)
class Reading:
    """What one layer's attention reads, (B, T, hidden), and its raw keys and values, (B, T, H*D)."""

    hidden: np.ndarray
    keys: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Pass:
    """Outcome of one forward pass.

    Logits (B, T, vocabulary), the longer cache, each layer's reading, and the residual stream (B, T, hidden) before
    the first layer and after each.
    """

    logits: np.ndarray
    cache: list[Entries]
    readings: list[Reading]
    streams: list[np.ndarray]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rotate(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    """Half-split RoPE: feature d turns together with feature d + D/2."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * base ** (-np.arange(half) / half)  # (T,) -> (T, D/2)
    left, right = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


def split_heads(x: np.ndarray, heads: int) -> np.ndarray:
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).swapaxes(1, 2)  # (B, T, H*D) -> (B, H, T, D)


def attend(queries: np.ndarray, positions: np.ndarray, entries: Entries) -> np.ndarray:
    """Causal grouped-query attention by position; returns merged heads (B, T, query heads * D)."""
    groups = queries.shape[1] // entries.keys.shape[1]
    keys, values = (np.repeat(x, groups, axis=1) for x in (entries.keys, entries.values))
    scores = queries @ keys.swapaxes(2, 3) / np.sqrt(queries.shape[-1])  # (B, query heads, T, S)
    scores = np.where(entries.positions[None, :] <= positions[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    heads = weights / weights.sum(axis=-1, keepdims=True) @ values
    return heads.swapaxes(1, 2).reshape(heads.shape[0], heads.shape[2], -1)  # (B, H, T, D) -> (B, T, H*D)


class Transformer:
    """What Llama and OpenELM share: pre-norm blocks and a cache of rotated keys and raw values."""

    inner: str
    embedding: str
    attention_norm: str
    ffn_norm: str
    rope_base: float

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, np.ndarray]):
        self.config = config
        self.weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
        self.eps = config["rms_norm_eps"]

    @property
    def depth(self) -> int:
        raise NotImplementedError

    def query_heads(self, layer: int) -> int:
        raise NotImplementedError

    def kv_heads(self, layer: int) -> int:
        raise NotImplementedError

    def project(self, layer: int, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return raw queries, keys and values with merged heads."""
        raise NotImplementedError

    def ffn(self, layer: int, x: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def output(self, layer: int, x: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def head_norm(self, layer: int, name: str, x: np.ndarray) -> np.ndarray:
        """Norm queries or keys (B, H, T, D) head by head, where the architecture does so."""
        return x

    def linear(self, layer: int, name: str, x: np.ndarray) -> np.ndarray:
        name = f"{self.inner}.layers.{layer}.{name}"
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, layer: int, name: str, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, self.weights[f"{self.inner}.layers.{layer}.{name}.weight"], self.eps)

    def append(
        self, layer: int, entries: Entries | None, keys: np.ndarray, values: np.ndarray, positions: np.ndarray
    ) -> Entries:
        """Add raw pairs (B, T, H*D) at the given positions: norm the keys once, rotate them, keep the values."""
        keys, values = (split_heads(x, self.kv_heads(layer)) for x in (keys, values))
        keys = rotate(self.head_norm(layer, "k_norm", keys), positions, self.rope_base)
        if entries is None:
            return Entries(keys, values, positions)
        return Entries(
            np.concatenate([entries.keys, keys], axis=2),
            np.concatenate([entries.values, values], axis=2),
            np.concatenate([entries.positions, positions]),
        )

    def forward(
        self, ids: np.ndarray, cache: Sequence[Entries] | None = None, only: Sequence[Entries] | None = None
    ) -> Pass:
        """Read ids (B, T) at the positions that follow ``cache``, which is left as it was.

        Args:
            ids: token ids.
            cache: entries of the positions before.
            only: entries to attend to in place of all others, the cache's and its own.
        """
        past = list(cache) if cache else [None] * self.depth
        positions = following(ids, cache)
        entries, readings = [], []
        x = self.weights[f"{self.inner}.{self.embedding}.weight"][ids]
        streams = [x]
        for layer in range(self.depth):
            hidden = self.norm(layer, self.attention_norm, x)
            queries, keys, values = self.project(layer, hidden)
            readings.append(Reading(hidden, keys, values))
            entries.append(self.append(layer, past[layer], keys, values, positions))
            queries = self.head_norm(layer, "q_norm", split_heads(queries, self.query_heads(layer)))
            attended = entries[layer] if only is None else only[layer]
            heads = attend(rotate(queries, positions, self.rope_base), positions, attended)
            x = x + self.output(layer, heads)
            x = x + self.ffn(layer, self.norm(layer, self.ffn_norm, x))
            streams.append(x)
        x = rms_norm(x, self.weights[f"{self.inner}.norm.weight"], self.eps)
        tied = self.weights[f"{self.inner}.{self.embedding}.weight"]
        return Pass(x @ self.weights.get("lm_head.weight", tied).T, entries, readings, streams)

    def rewrite(self, ids: np.ndarray, cache: Sequence[Entries], read: dict[int, np.ndarray]) -> list[Entries]:
        """Read tokens of ids (B, T), replacing their entries.

        Args:
            ids: all tokens.
            cache: entries of all of them.
            read: from which layer on the tokens at which positions (n,) are read; fewer from layer to layer. Below the
                first of these layers, they are run over entries that are true already.
        """
        first = min(read)
        positions = read[first]
        x = self.weights[f"{self.inner}.{self.embedding}.weight"][ids[:, positions]]
        cache = list(cache)
        for layer in range(self.depth):
            is_kept = np.isin(positions, read.get(layer, positions))
            x, positions = x[:, is_kept], positions[is_kept]
            hidden = self.norm(layer, self.attention_norm, x)
            queries, keys, values = self.project(layer, hidden)
            if layer >= first:
                new, held = self.append(layer, None, keys, values, positions), cache[layer]
                held_keys, held_values = held.keys.copy(), held.values.copy()
                held_keys[:, :, positions], held_values[:, :, positions] = new.keys, new.values
                cache[layer] = Entries(held_keys, held_values, held.positions)
            queries = self.head_norm(layer, "q_norm", split_heads(queries, self.query_heads(layer)))
            x = x + self.output(layer, attend(rotate(queries, positions, self.rope_base), positions, cache[layer]))
            x = x + self.ffn(layer, self.norm(layer, self.ffn_norm, x))
        return cache


def following(ids: np.ndarray, cache: Sequence[Entries] | None) -> np.ndarray:
    """Return the absolute positions of ids (B, T) after a cache."""
    start = len(cache[0]) if cache else 0
    return np.arange(start, start + ids.shape[1])


class Llama(Transformer):
    inner, embedding = "model", "embed_tokens"
    attention_norm, ffn_norm = "input_layernorm", "post_attention_layernorm"

    @property
    def depth(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def rope_base(self) -> float:
        return self.config["rope_theta"]

    def query_heads(self, layer: int) -> int:
        return self.config["num_attention_heads"]

    def kv_heads(self, layer: int) -> int:
        return self.config["num_key_value_heads"]

    def project(self, layer: int, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        queries, keys, values = (self.linear(layer, f"self_attn.{name}_proj", hidden) for name in "qkv")
        return queries, keys, values

    def output(self, layer: int, x: np.ndarray) -> np.ndarray:
        return self.linear(layer, "self_attn.o_proj", x)

    def ffn(self, layer: int, x: np.ndarray) -> np.ndarray:
        gate, up = (self.linear(layer, f"mlp.{name}_proj", x) for name in ("gate", "up"))
        return self.linear(layer, "mlp.down_proj", silu(gate) * up)


class OpenELM(Transformer):
    inner, embedding = "transformer", "token_embeddings"
    attention_norm, ffn_norm = "attn_norm", "ffn_norm"

    @property
    def depth(self) -> int:
        return self.config["num_transformer_layers"]

    @property
    def rope_base(self) -> float:
        return self.config["rope_freq_constant"]

    def query_heads(self, layer: int) -> int:
        return self.config["num_query_heads"][layer]

    def kv_heads(self, layer: int) -> int:
        return self.config["num_kv_heads"][layer]

    def project(self, layer: int, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        fused = self.linear(layer, "attn.qkv_proj", hidden)
        width = self.kv_heads(layer) * self.config["head_dim"]
        return fused[..., : -2 * width], fused[..., -2 * width : -width], fused[..., -width:]

    def output(self, layer: int, x: np.ndarray) -> np.ndarray:
        return self.linear(layer, "attn.out_proj", x)

    def head_norm(self, layer: int, name: str, x: np.ndarray) -> np.ndarray:
        return self.norm(layer, f"attn.{name}", x) if self.config["normalize_qk_projections"] else x

    def ffn(self, layer: int, x: np.ndarray) -> np.ndarray:
        both = self.linear(layer, "ffn.proj_1", x)
        half = both.shape[-1] // 2
        return self.linear(layer, "ffn.proj_2", silu(both[..., :half]) * both[..., half:])


Maps = Mapping[tuple[int, str], tuple[np.ndarray, np.ndarray]]
"""Per base layer and "keys" or "values": a linear map's weight (out, in) and bias (out,)."""


@dataclass(frozen=True)
class KVPrediction:
    """The whole method: read the prompt with the auxiliary, map, norm, rotate, and hand the base a cache.

    Attributes:
        base: the model that answers.
        auxiliary: the model that reads; the base itself for a prefix.
        layer_map: per base layer its source layers, or None where the layer's own entries are kept (prefix).
        reads: "keys_values" (keys from keys, values from values) or "hidden_state" (both from the hidden state).
        maps: one pair of linear maps per predicted base layer.
        preceding: of how many tokens before each one the maps read as much, the nearest first.
    """

    base: Transformer
    auxiliary: Transformer
    layer_map: Sequence[tuple[int, ...] | None]
    reads: str
    maps: Maps
    preceding: int = 0

    @property
    def is_prefix(self) -> bool:
        return self.auxiliary is self.base

    def prefill(
        self, ids: np.ndarray, cache: Sequence[Entries] | None = None, auxiliary_cache: Sequence[Entries] | None = None
    ) -> tuple[list[Entries], list[Entries]]:
        """Predict the cache of ids (B, T) on top of both caches; returns the base's and the auxiliary's.

        For a prefix the base's cache is the auxiliary's. The oracle runs all its layers over the prompt and
        throws away what the later ones made of it: causality keeps them out of the earlier ones.
        """
        read = self.auxiliary.forward(ids, cache if self.is_prefix else auxiliary_cache)
        positions = following(ids, cache)
        predicted = []
        for layer, sources in enumerate(self.layer_map):
            if sources is None:
                predicted.append(read.cache[layer])
                continue
            keys, values = (self.mapped(layer, kind, read.readings) for kind in ("keys", "values"))
            past = cache[layer] if cache else None
            predicted.append(self.base.append(layer, past, keys, values, positions))
        return predicted, predicted if self.is_prefix else read.cache

    def mapped(self, layer: int, kind: str, readings: Sequence[Reading]) -> np.ndarray:
        """Return a layer's raw keys or values (B, T, width) as its map makes them of what the auxiliary read."""
        weight, bias = self.maps[layer, kind]
        attribute = "hidden" if self.reads == "hidden_state" else kind
        read = np.concatenate([getattr(readings[source], attribute) for source in self.layer_map[layer]], axis=-1)
        places = np.arange(read.shape[1])
        near = [read[:, np.maximum(places - back, 0)] for back in range(self.preceding + 1)]
        return np.concatenate(near, axis=-1) @ weight.T + bias
