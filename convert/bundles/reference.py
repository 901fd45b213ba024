"""OpenELM and KV Prediction in PyTorch, straight from a CoreNet state dict: what ``kvp convert verify`` compares with.

Written from the paper (arXiv 2410.08391) and OpenELM's (arXiv 2404.14619); shares nothing with what it checks. Plain
rather than fast: fp32, every key and value kept in a list.

Letters in shape comments: B batch, T positions, H heads, D head_dim.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

EPSILON = 1e-6
ROPE_BASE = 10000.0

StateDict = dict[str, Any]
Pairs = list[tuple[Any, Any]]
"""Per layer raw keys and values, ``(B, H, T, D)``: before k_norm and RoPE."""


def logits(weights: StateDict, ids: Any, before: Pairs | None = None) -> tuple[Any, Pairs]:
    """Run one OpenELM.

    Args:
        weights: under CoreNet's names.
        ids: NumPy token ids ``(B, T)``.
        before: raw pairs of the positions that precede ``ids``.

    Returns:
        Logits ``(B, T, vocabulary)`` and the raw pairs of all positions.
    """
    embedding = weights["token_embeddings.weight"]
    x = embedding[torch.as_tensor(ids)].float()
    depth = sum(name.endswith("attn_norm.weight") for name in weights)
    pairs = []
    for layer in range(depth):
        own = {name: tensor.float() for name, tensor in under(weights, f"layers.{layer}.").items()}
        x, pair = _layer(own, x, None if before is None else before[layer])
        pairs.append(pair)
    return _rms(x, weights["norm.weight"].float()) @ embedding.float().T, pairs


def predicted_logits(checkpoint: StateDict, layer_map: Sequence[int], ids: Any, following: Any) -> Any:
    """Run KV Prediction: the auxiliary reads all of ``ids`` but the last token, the base the rest.

    Args:
        checkpoint: the whole state dict.
        layer_map: auxiliary layer that each base layer reads.
        ids: prompt, NumPy ``(B, T)``.
        following: tokens, NumPy ``(B, N)``, that are decoded after it.

    Returns:
        Base logits ``(B, 1 + N, vocabulary)``.
    """
    base, maps = under(checkpoint, "base."), under(checkpoint, "predicter.auxkv_to_basekv.")
    _, read = logits(under(checkpoint, "auxiliary."), ids[:, :-1])
    pairs: Pairs = []
    for layer, source in enumerate(layer_map):
        head_dim = base[f"layers.{layer}.attn.k_norm.weight"].numel()
        mapped = []
        for kind, x in zip(("key", "value"), read[source], strict=True):
            batch, _, length, _ = x.shape
            name = f"{kind}_transforms.{layer}"
            merged = x.transpose(1, 2).reshape(batch, length, -1)  # (B, H, T, D) -> (B, T, H*D)
            merged = merged @ maps[f"{name}.weight"].float().T + maps[f"{name}.bias"].float()
            mapped.append(merged.reshape(batch, length, -1, head_dim).transpose(1, 2))  # -> (B, H, T, D)
        pairs.append((mapped[0], mapped[1]))
    steps = []
    tokens = np.concatenate([ids[:, -1:], following], axis=1)
    for i in range(tokens.shape[1]):
        step, pairs = logits(base, tokens[:, i : i + 1], pairs)
        steps.append(step)
    return torch.cat(steps, dim=1)


def under(weights: StateDict, prefix: str) -> StateDict:
    """Return the tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _layer(w: StateDict, x: Any, before: tuple[Any, Any] | None) -> tuple[Any, tuple[Any, Any]]:
    batch, length, _ = x.shape
    head_dim = w["attn.q_norm.weight"].numel()
    heads = w["attn.out_proj.weight"].shape[1] // head_dim
    qkv = _rms(x, w["attn_norm.weight"]) @ w["attn.qkv_proj.weight"].T
    qkv = qkv.reshape(batch, length, -1, head_dim).transpose(1, 2)  # (B, T, all H*D) -> (B, all H, T, D)
    kv_heads = (qkv.shape[1] - heads) // 2
    queries, keys, values = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
    if before is not None:
        keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
    start = keys.shape[2] - length
    rotated_queries = _rope(_rms(queries, w["attn.q_norm.weight"]), start)
    rotated_keys = _rope(_rms(keys, w["attn.k_norm.weight"]), 0)
    grouped = rotated_queries.reshape(batch, kv_heads, -1, length, head_dim)  # (B, H, T, D) -> (B, KV, groups, T, D)
    scores = grouped @ rotated_keys[:, :, None].transpose(-1, -2) / math.sqrt(head_dim)
    future = torch.ones(length, start + length, dtype=torch.bool).triu(start + 1)
    attended = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ values[:, :, None]
    merged = attended.reshape(batch, heads, length, head_dim).transpose(1, 2).reshape(batch, length, -1)
    x = x + merged @ w["attn.out_proj.weight"].T
    gate, up = (_rms(x, w["ffn_norm.weight"]) @ w["ffn.proj_1.weight"].T).chunk(2, dim=-1)
    return x + (functional.silu(gate) * up) @ w["ffn.proj_2.weight"].T, (keys, values)


def _rms(x: Any, weight: Any) -> Any:
    return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + EPSILON) * weight


def _rope(x: Any, start: int) -> Any:
    """Turn (B, H, T, D) at positions start..: feature d together with feature d + D/2."""
    half = x.shape[-1] // 2
    positions = torch.arange(start, start + x.shape[2], dtype=torch.float32)
    angles = positions[:, None] * ROPE_BASE ** (-torch.arange(half, dtype=torch.float32) / half)  # (T, D/2)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * angles.cos() - right * angles.sin(), left * angles.sin() + right * angles.cos()], dim=-1)
