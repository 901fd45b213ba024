"""Metadata and tensors of GGUF files that change nothing, or the model: these are refused by name."""

from pathlib import Path

import numpy as np
import pytest
from conftest import Kvp
from support.directories import write_random
from support.gguf_files import Types, write_file
from support.gguf_models import config_of, converted, logits, refused

NEUTRAL = {
    "llama.expert_count": 0,
    "llama.vocab_size": 300,
    "llama.attention.causal": True,
    "llama.logit_scale": 1.0,
    "llama.attention.clamp_kqv": 0.0,
    "llama.attention.scale": 32**-0.5,
    "llama.rope.dimension_count": 32,
    "general.anything": "x",
    "quantize.imatrix.file": "x",
}


def test_keys_that_change_nothing(tmp_path: Path, kvp: Kvp) -> None:
    model = write_random(tmp_path / "model", config_of("llama"))
    write_file(tmp_path / "m.gguf", model, Types.F32, **NEUTRAL)
    np.testing.assert_allclose(logits(converted(kvp, tmp_path / "m.gguf")), logits(model), atol=1e-4, rtol=0)


ONES = {"rope_freqs.weight": np.ones(16)}
# architecture, metadata, tensors, and what the error has to name
CHANGES_THE_MODEL: dict[str, tuple[str, dict, dict, str]] = {
    "experts": ("llama", {"llama.expert_count": 8}, {}, "llama.expert_count"),
    "logit scale": ("llama", {"llama.logit_scale": 0.125}, {}, "llama.logit_scale"),
    "embedding scale": ("llama", {"llama.embedding_scale": 12.0}, {}, "llama.embedding_scale"),
    "attention scale": ("llama", {"llama.attention.scale": 0.5}, {}, "llama.attention.scale"),
    "small attention scale": ("llama", {"llama.attention.scale": 0.01}, {}, "llama.attention.scale"),
    "soft cap": ("qwen2", {"qwen2.final_logit_softcapping": 30.0}, {}, "qwen2.final_logit_softcapping"),
    "not causal": ("llama", {"llama.attention.causal": False}, {}, "llama.attention.causal"),
    "list for a flag": ("llama", {"llama.expert_count": [1, 2]}, {}, "llama.expert_count"),
    "unknown": ("qwen3", {"qwen3.attention.dreams": 3}, {}, "qwen3.attention.dreams"),
    "value length": ("llama", {"llama.attention.value_length": 16}, {}, "llama.attention.value_length"),
    "key length": ("qwen2", {"qwen2.attention.key_length": 32}, {}, "heads of 32"),
    "partial RoPE": ("llama", {"llama.rope.dimension_count": 16}, {}, "llama.rope.dimension_count"),
    "unknown RoPE": ("llama", {"llama.rope.scaling.type": "spiral"}, {}, "spiral"),
    "long RoPE of llama": ("llama", {"llama.rope.scaling.type": "longrope"}, {}, "rope_factors_long.weight"),
    "attention factor": (
        "llama",
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.attn_factor": 0.5},
        {},
        "llama.rope.scaling.attn_factor",
    ),
    "yarn's logarithm": (
        "llama",
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.yarn_log_multiplier": 0.1,
        },
        {},
        "llama.rope.scaling.yarn_log_multiplier",
    ),
    "yarn of Phi-3": ("phi3", {"phi3.rope.scaling.type": "yarn", "phi3.rope.scaling.factor": 4.0}, {}, "yarn"),
    "another table": ("llama", {}, ONES, "rope_freqs.weight"),
    "table of another length": ("llama", {}, {"rope_freqs.weight": np.ones(7)}, "rope_freqs.weight"),
    "table of NaN": ("llama", {}, {"rope_freqs.weight": np.full(16, np.nan)}, "rope_freqs.weight"),
    "both scalings": (
        "llama",
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        ONES,
        "rope_freqs.weight",
    ),
    "half of long RoPE": ("phi3", {}, {"rope_factors_long.weight": np.ones(8)}, "rope_factors_short.weight"),
    "bias": ("llama", {}, {"blk.0.attn_q.bias": np.ones(128)}, "blk.0.attn_q.bias"),
    "sinks": ("qwen3", {}, {"blk.1.attn_sinks.weight": np.ones(4)}, "blk.1.attn_sinks.weight"),
    "adapter": ("llama", {"general.type": "adapter"}, {}, "adapter"),
    "another architecture": (
        "llama",
        {"general.architecture": "qwen2moe"},
        {},
        "holds a qwen2moe model; GGUF files of",
    ),
    "unknown architecture": ("llama", {"general.architecture": "mamba"}, {}, "mamba"),
}


@pytest.mark.parametrize("name", CHANGES_THE_MODEL)
def test_what_would_change_the_model_is_refused_by_name(name: str, tmp_path: Path, kvp: Kvp) -> None:
    architecture, changes, tensors, named = CHANGES_THE_MODEL[name]
    model = write_random(tmp_path / "model", config_of(architecture))
    write_file(tmp_path / "m.gguf", model, tensors=tensors, **changes)
    refused(kvp, tmp_path / "m.gguf", named)
