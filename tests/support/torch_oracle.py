"""OpenELM and KV Prediction in plain PyTorch, on CoreNet's state dicts: what conversions are checked against.

Written from method.md sections 1, 2 and 4; shares no code with kvp_mlx, mlx-lm or the NumPy oracle. Everything is
recomputed from scratch at absolute positions: a decode step is a longer forward pass, not a cache.

Letters in shape comments: B batch, T positions, D head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
ROPE_BASE = 10000.0

StateDict = dict[str, Tensor]


def part_of(checkpoint: StateDict, prefix: str) -> StateDict:
    """Return one part of a checkpoint under CoreNet's names."""
    return {name[len(prefix) :]: tensor for name, tensor in checkpoint.items() if name.startswith(prefix)}


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE, half-split: (B, heads, T, D) at positions (T,)."""
    half = x.shape[-1] // 2
    frequencies = ROPE_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    turns = torch.polar(torch.ones(()).double(), torch.outer(positions.double(), frequencies))  # (T, D/2)
    numbers = torch.complex(x[..., :half].double(), x[..., half:].double()) * turns
    return torch.cat([numbers.real, numbers.imag], dim=-1).to(x.dtype)


@dataclass
class OpenELM:
    """One model; ``weights`` under CoreNet's names."""

    weights: StateDict

    @property
    def depth(self) -> int:
        return 1 + max(int(name.split(".")[1]) for name in self.weights if name.startswith("layers."))

    def raw(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return raw queries, keys and values, each (B, heads, T, D), of a layer's input x (B, T, model_dim)."""
        name = f"layers.{layer}"
        head_dim = self.weights[f"{name}.attn.k_norm.weight"].numel()
        queries = self.weights[f"{name}.attn.out_proj.weight"].shape[1] // head_dim
        fused = F.linear(
            normed(x, self.weights[f"{name}.attn_norm.weight"]), self.weights[f"{name}.attn.qkv_proj.weight"]
        )
        heads = fused.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, T, all heads * D) -> (B, all heads, T, D)
        kv = (heads.shape[1] - queries) // 2
        return heads.split([queries, kv, kv], dim=1)

    def block(self, layer: int, x: Tensor, start: int, keys: Tensor, values: Tensor) -> Tensor:
        """Run a layer on x at positions start.., attending to raw keys and values at positions 0.. (causally)."""
        name = f"layers.{layer}"
        queries = normed(self.raw(layer, x)[0], self.weights[f"{name}.attn.q_norm.weight"])
        keys = normed(keys, self.weights[f"{name}.attn.k_norm.weight"])
        own, seen = torch.arange(start, start + x.shape[1]), torch.arange(keys.shape[2])
        groups = queries.shape[1] // keys.shape[1]
        attended = F.scaled_dot_product_attention(
            turned(queries, own),
            turned(keys, seen).repeat_interleave(groups, dim=1),
            values.repeat_interleave(groups, dim=1),
            attn_mask=seen[None, :] <= own[:, None],
        )
        merged = attended.transpose(1, 2).flatten(2)  # (B, heads, T, D) -> (B, T, heads * D)
        x = x + F.linear(merged, self.weights[f"{name}.attn.out_proj.weight"])
        gate, up = F.linear(
            normed(x, self.weights[f"{name}.ffn_norm.weight"]), self.weights[f"{name}.ffn.proj_1.weight"]
        ).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.weights[f"{name}.ffn.proj_2.weight"])

    def run(
        self, ids: Tensor, given: Sequence[tuple[Tensor, Tensor]] | None = None, *, own: bool = True
    ) -> tuple[Tensor, list]:
        """Return logits (B, T, vocabulary) of ids (B, T) and each layer's own raw keys and values.

        Args:
            ids: token ids, at the positions after the given ones (with ``own``) or at the given ones (without).
            given: raw keys and values per layer that stand before the layer's own.
            own: whether the layers' own keys and values are attended to as well.
        """
        x, pairs = F.embedding(ids, self.weights["token_embeddings.weight"]), []
        for layer in range(self.depth):
            keys, values = self.raw(layer, x)[1:]
            pairs.append((keys, values))
            if given is not None:
                before = given[layer]
                joined = [torch.cat(both, dim=2) for both in zip(before, (keys, values), strict=True)]
                keys, values = joined if own else before
            x = self.block(layer, x, keys.shape[2] - ids.shape[1], keys, values)
        x = normed(x, self.weights["norm.weight"])
        return F.linear(x, self.weights["token_embeddings.weight"]), pairs


@dataclass
class KVPrediction:
    """A whole CoreNet KV-prediction checkpoint with its layer map."""

    checkpoint: StateDict
    layer_map: Sequence[int]

    @property
    def base(self) -> OpenELM:
        return OpenELM(part_of(self.checkpoint, "base."))

    @property
    def auxiliary(self) -> OpenELM:
        return OpenELM(part_of(self.checkpoint, "auxiliary."))

    def predicted(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return predicted raw base keys and values, (B, heads, T, D) per layer, of ids (B, T)."""
        pairs = self.auxiliary.run(ids)[1]
        maps = part_of(self.checkpoint, "predicter.auxkv_to_basekv.")
        found = []
        for layer, source in enumerate(self.layer_map):
            head_dim = self.checkpoint[f"base.layers.{layer}.attn.k_norm.weight"].numel()
            both = []
            for kind, x in zip(("key", "value"), pairs[source], strict=True):
                name = f"{kind}_transforms.{layer}"
                merged = x.transpose(1, 2).flatten(2)  # (B, heads, T, D) -> (B, T, heads * D), head-major
                mapped = F.linear(merged, maps[f"{name}.weight"], maps[f"{name}.bias"])
                both.append(mapped.unflatten(-1, (-1, head_dim)).transpose(1, 2))
            found.append((both[0], both[1]))
        return found

    def prompt_mode(self, ids: Tensor, following: Tensor) -> Tensor:
        """Return logits (B, 1 + steps, vocabulary): of the prompt's last token, then of each following token.

        The auxiliary reads all of ids (B, T) but the last; the base reads the rest.
        """
        read = torch.cat([ids[:, -1:], following], dim=1)
        return self.base.run(read, self.predicted(ids[:, :-1]))[0]

    def training_mode(self, ids: Tensor) -> Tensor:
        """Return base logits (B, T, vocabulary) with every key and value predicted, each token's own included."""
        return self.base.run(ids, self.predicted(ids), own=False)[0]
