"""Tiny models of every architecture that converts from GGUF, and what becomes of their files."""

from pathlib import Path

import mlx.core as mx
import numpy as np
from conftest import Kvp
from mlx_lm.utils import load_model

from .directories import LLAMA

IDS = mx.array([np.random.default_rng(0).integers(3, 300, 120).tolist()])
TINY = {**LLAMA, "num_hidden_layers": 2}
CONFIGS = {
    "llama": {"head_dim": 32, "tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen3moe": {
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    "phi3": {"partial_rotary_factor": 0.5, "tie_word_embeddings": False},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "num_hidden_layers": 7,
        "rope_theta": 1e6,
    },
}


def config_of(name: str, **changes: object) -> dict:
    return TINY | {"model_type": name, "rope_theta": 10000.0} | CONFIGS[name] | changes


def logits(directory: Path, weights: dict[str, np.ndarray] | None = None) -> mx.array:
    """Return what a model says, with other weights than its own where they are given."""
    model, _ = load_model(directory)
    if weights:
        model.load_weights([(name, mx.array(array)) for name, array in weights.items()])
    model.set_dtype(mx.float32)
    return model(IDS)


def converted(kvp: Kvp, source: Path, *options: str) -> Path:
    out = source.with_name("out")
    outcome = kvp("convert", "gguf", source, "--out", out, *options)
    assert outcome.code == 0, outcome.err
    return out


def refused(kvp: Kvp, source: Path, named: str) -> None:
    out = source.with_name("out")
    outcome = kvp("convert", "gguf", source, "--out", out)
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert outcome.err.count("\n") == 1
    assert named in outcome.err
    assert not out.exists()
    assert not list(out.parent.glob(".out.*"))
