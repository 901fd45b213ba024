"""Every row of the families table on a tiny random model: identity maps and whole prefixes change nothing.

The oracle of llama and openelm is NumPy (test_pipeline.py); here it is mlx-lm's own model of the family.
"""

import importlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

import kvp_mlx
from kvp_mlx.bundle.config import AuxiliaryConfig, BaseConfig, BundleConfig, PredictorConfig
from kvp_mlx.bundle.layer_map import prefix_layer_map, spread_layer_map
from kvp_mlx.bundle.loading import KVPModel, build_predictor
from kvp_mlx.models.families import FAMILIES
from kvp_mlx.models.sections import output_head, prefix_model, run_layers

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 61,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
CONFIGS = {
    "llama": {"attention_bias": True, "tie_word_embeddings": False},
    "mistral": {},
    "olmo2": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {"rope_scaling": None, "partial_rotary_factor": 0.5},
    "openelm": {
        "head_dim": 8,
        "num_transformer_layers": 4,
        "model_dim": 32,
        "ffn_dim_divisor": 16,
        "num_query_heads": [2, 2, 4, 4],
        "num_kv_heads": [1, 2, 2, 1],
        "ffn_multipliers": [1.0, 1.5, 2.0, 2.5],
    },
}


def tiny(name: str) -> nn.Module:
    module = importlib.import_module(f"mlx_lm.models.{'llama' if name == 'mistral' else name}")
    model = module.Model(module.ModelArgs.from_dict(COMMON | CONFIGS[name] | {"model_type": name}))
    rng = np.random.default_rng(0)
    weights = [
        (
            key,
            mx.array(rng.uniform(0.5, 1.5, old.shape) if old.ndim == 1 else rng.normal(0, 0.15, old.shape), mx.float32),
        )
        for key, old in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    return model


def assembled(base: nn.Module, kind: str, layers: int) -> KVPModel:
    if kind == "prefix":
        auxiliary, predictor = prefix_model(base, layers), ("hidden_state", prefix_layer_map(4, layers))
    else:
        auxiliary, predictor = base, ("keys_values", spread_layer_map(4, 4))
    config = BundleConfig(
        base=BaseConfig(fingerprint="none", path="base"),
        auxiliary=AuxiliaryConfig(kind=kind, layers=layers),
        predictor=PredictorConfig(input=predictor[0], layer_map=predictor[1]),
    )
    maps = build_predictor(base, auxiliary, config)
    for linear in maps.maps.values():
        linear.weight, linear.bias = mx.eye(linear.weight.shape[0]), mx.zeros(linear.weight.shape[0])
    return KVPModel(base, auxiliary, maps, None, config, {})


def test_every_row_is_tested() -> None:
    assert CONFIGS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("quantised", [False, True], ids=["fp32", "8-bit"])
@pytest.mark.parametrize(("kind", "layers"), [("model", 4), ("prefix", 3)])
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_changes(name: str, kind: str, layers: int, quantised: bool) -> None:
    base = tiny(name)
    if quantised:
        nn.quantize(
            base,
            group_size=32,
            bits=8,
            class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0,
        )
    model = assembled(base, kind, layers)
    ids = mx.array(np.random.default_rng(1).integers(0, 61, (2, 9)))
    own = make_prompt_cache(base)
    for part in (ids[:, :4], ids[:, 4:7]):
        base(part, cache=own)
    cache = kvp_mlx.predict_base_cache(model, ids[:, :7], prefill_step_size=4)
    for step in range(7, 9):
        expected = base(ids[:, step : step + 1], cache=own)
        found = base(ids[:, step : step + 1], cache=cache)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_output_head_makes_the_models_own_logits(name: str) -> None:
    base = tiny(name)
    ids = mx.array([[3, 1, 4, 1, 5]])
    hidden, _ = run_layers(base, ids, make_prompt_cache(base))
    np.testing.assert_allclose(output_head(base, hidden), base(ids), atol=1e-6)
