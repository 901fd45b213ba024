"""A tiny random model of every architecture that is supported."""

import importlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

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


def tiny_model(name: str) -> nn.Module:
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
