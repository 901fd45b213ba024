"""Random CoreNet checkpoints, written by torch: tiny ones with uneven heads, and the published shapes.

And the tokeniser that goes with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .directories import TEXT

VOCABULARY = 131
PIECES = 400  # of a trained tokeniser


@dataclass(frozen=True)
class Shape:
    """One OpenELM: per layer (query heads, key/value heads, FFN width)."""

    model_dim: int
    head_dim: int
    layers: Sequence[tuple[int, int, int]]
    vocabulary: int = VOCABULARY

    def kv_width(self, layer: int) -> int:
        return self.layers[layer][1] * self.head_dim


BASE = Shape(96, 64, [(2, 1, 64), (4, 2, 96), (4, 1, 160), (6, 3, 32), (2, 2, 224)])
AUXILIARY = Shape(64, 48, [(2, 2, 64), (4, 2, 32), (3, 1, 96)])
LAYER_MAP = [0, 0, 1, 1, 2]


def published(size: str, vocabulary: int = 32128) -> Shape:
    """OpenELM-270M and -450M as method.md section 4 gives them: key/value widths, 4 queries each, FFN 0.5 to 4."""
    model_dim, widths = {
        "270m": (1280, [192] * 5 + [256] * 7 + [320] * 4),
        "450m": (1536, [192] * 3 + [256] * 7 + [320] * 6 + [384] * 4),
    }[size]
    last = len(widths) - 1
    multipliers = [round(0.5 + 3.5 * layer / last, 2) for layer in range(last + 1)]
    ffn = [256 * int(model_dim * multiplier / 256 + 0.5) for multiplier in multipliers]
    heads = [width // 64 for width in widths]
    return Shape(model_dim, 64, [(4 * h, h, f) for h, f in zip(heads, ffn, strict=True)], vocabulary)


class Random:
    """Draws tensors that show when one is left out or misplaced: norms away from 1, biases away from 0."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def vector(self, size: int) -> torch.Tensor:
        return 0.5 + torch.rand(size, generator=self.generator)

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        return (torch.rand(rows, columns, generator=self.generator) - 0.5) * (12 / columns) ** 0.5


def openelm(shape: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a state dict under CoreNet's names."""
    draw = Random(seed)
    tensors = {"token_embeddings.weight": draw.matrix(shape.vocabulary, shape.model_dim) * shape.model_dim**0.5 * 0.2}
    for i, (heads, kv_heads, ffn) in enumerate(shape.layers):
        tensors |= {
            f"layers.{i}.attn.qkv_proj.weight": draw.matrix((heads + 2 * kv_heads) * shape.head_dim, shape.model_dim),
            f"layers.{i}.attn.q_norm.weight": draw.vector(shape.head_dim),
            f"layers.{i}.attn.k_norm.weight": draw.vector(shape.head_dim),
            f"layers.{i}.attn.out_proj.weight": draw.matrix(shape.model_dim, heads * shape.head_dim),
            f"layers.{i}.ffn.proj_1.weight": draw.matrix(2 * ffn, shape.model_dim),
            f"layers.{i}.ffn.proj_2.weight": draw.matrix(shape.model_dim, ffn),
            f"layers.{i}.attn_norm.weight": draw.vector(shape.model_dim),
            f"layers.{i}.ffn_norm.weight": draw.vector(shape.model_dim),
        }
    return tensors | {"norm.weight": draw.vector(shape.model_dim)}


def kv_prediction(
    base: Shape = BASE, auxiliary: Shape = AUXILIARY, layer_map: Sequence[int] = LAYER_MAP, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return the state dict of a base, an auxiliary and the maps between them."""
    draw = Random(seed + 2)
    tensors = {f"base.{name}": tensor for name, tensor in openelm(base, seed).items()}
    tensors |= {f"auxiliary.{name}": tensor for name, tensor in openelm(auxiliary, seed + 1).items()}
    for layer, source in enumerate(layer_map):
        rows, columns = base.kv_width(layer), auxiliary.kv_width(source)
        for kind in ("key", "value"):
            name = f"predicter.auxkv_to_basekv.{kind}_transforms.{layer}"
            tensors[f"{name}.weight"] = draw.matrix(rows, columns)
            tensors[f"{name}.bias"] = draw.vector(rows) - 1
    return tensors


def save(tensors: object, path: Path) -> Path:
    """Write a checkpoint as a training run would."""
    torch.save(tensors, path)
    return path


def train_llama_tokenizer(directory: Path, **changes: object) -> Path:
    """Train a SentencePiece model of ``PIECES`` pieces with Llama's settings; ``changes`` go into them."""
    from sentencepiece import SentencePieceTrainer

    document = Path(__file__).parents[2] / "kvp_mlx" / "data" / "demo.md"
    text = directory / "text.txt"
    text.write_text(TEXT * 3 + document.read_text())
    options = {
        "model_type": "bpe",
        "vocab_size": PIECES,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    SentencePieceTrainer.train(input=str(text), model_prefix=str(directory / "tokenizer"), **(options | changes))
    return directory / "tokenizer.model"
