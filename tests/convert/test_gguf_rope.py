"""RoPE and its scaling in GGUF files: carried over, or refused by name."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import Kvp
from support.directories import write_random
from support.gguf_files import Types, write_file
from support.gguf_models import config_of, converted, logits, refused

# metadata, and what it is in config.json
SCALINGS = {
    "none": ({"type": "none"}, None),
    "no factor": ({"type": "yarn", "factor": 0.0}, None),
    "linear": ({"type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
    "linear by an old key": ({"scale_linear": 2.5}, {"type": "linear", "factor": 2.5}),
    "yarn": (
        {"type": "yarn", "factor": 4.0, "original_context_length": 64, "finetuned": True},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "yarn, length from the context": (
        {"type": "yarn", "factor": 2.0},
        {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512},
    ),
    "yarn with betas": (
        {"type": "yarn", "factor": 8.0, "original_context_length": 32, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0},
        {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 16, "beta_slow": 2},
    ),
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scaling_is_carried_over(name: str, architecture: str, tmp_path: Path, kvp: Kvp) -> None:
    stated, scaling = SCALINGS[name]
    model = write_random(tmp_path / "model", config_of(architecture, rope_scaling=scaling))
    prefix = {key: f"{architecture}.rope.{'' if key == 'scale_linear' else 'scaling.'}{key}" for key in stated}
    write_file(tmp_path / "m.gguf", model, Types.F32, **{prefix[key]: value for key, value in stated.items()})
    out = converted(kvp, tmp_path / "m.gguf")
    np.testing.assert_allclose(logits(out), logits(model), atol=1e-4, rtol=0)


def llama3_table(scaling: dict, dimensions: int, theta: float) -> np.ndarray:
    """What llama.cpp's converter computes for rope_freqs.weight, pair by pair."""
    factor, low, high = (scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original, table = scaling["original_max_position_embeddings"], []
    for pair in range(0, dimensions, 2):
        wavelength = 2 * math.pi * theta ** (pair / dimensions)
        if wavelength < original / high:
            table.append(1.0)
        elif wavelength > original / low:
            table.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            table.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(table, np.float32)


@pytest.mark.parametrize(
    ("factor", "low", "high", "original", "theta"),
    [
        (8.0, 1.0, 4.0, 8192, 500000.0),
        (32.0, 1.0, 4.0, 8192, 500000.0),
        (4.0, 1.0, 4.0, 64, 10000.0),
        (8.0, 1.5, 12.0, 256, 10000.0),
        (16.0, 1.0, 4.0, 40, 10000.0),
    ],
)
def test_llama_3_scaling_from_its_table(
    factor: float, low: float, high: float, original: int, theta: float, tmp_path: Path, kvp: Kvp
) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    model = write_random(tmp_path / "model", config_of("llama", rope_scaling=scaling, rope_theta=theta))
    write_file(tmp_path / "m.gguf", model, Types.F32, tensors={"rope_freqs.weight": llama3_table(scaling, 32, theta)})
    out = converted(kvp, tmp_path / "m.gguf")
    np.testing.assert_allclose(logits(out), logits(model), atol=1e-3, rtol=0)
    if original == 8192:
        assert json.loads((out / "config.json").read_text())["rope_scaling"] == scaling


def test_phi_3_long_rope(tmp_path: Path, kvp: Kvp) -> None:
    rng = np.random.default_rng(1)
    long, short = (rng.uniform(1, 5, 8).astype(np.float32) for _ in range(2))
    scaling = {"type": "longrope", "long_factor": long.tolist(), "short_factor": short.tolist()}
    config = config_of("phi3", rope_scaling=scaling, original_max_position_embeddings=128)
    model = write_random(tmp_path / "model", config | {"partial_rotary_factor": 1.0})
    stated = {
        "phi3.rope.scaling.original_context_length": 128,
        "phi3.rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(128)),
        "phi3.attention.sliding_window": 262144,
    }
    factors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    write_file(tmp_path / "m.gguf", model, Types.F32, tensors=factors, **stated)
    np.testing.assert_allclose(logits(converted(kvp, tmp_path / "m.gguf")), logits(model), atol=1e-4, rtol=0)
    write_file(
        tmp_path / "n.gguf", model, Types.F32, tensors=factors, **stated | {"phi3.rope.scaling.attn_factor": 1.5}
    )
    (tmp_path / "out").rename(tmp_path / "before")
    refused(kvp, tmp_path / "n.gguf", "phi3.rope.scaling.attn_factor = 1.5")


def test_a_sliding_window_ends_the_context(tmp_path: Path, kvp: Kvp) -> None:
    model = write_random(tmp_path / "model", config_of("phi3"))
    write_file(tmp_path / "m.gguf", model, Types.F32, **{"phi3.attention.sliding_window": 200})
    out = converted(kvp, tmp_path / "m.gguf")
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 200
