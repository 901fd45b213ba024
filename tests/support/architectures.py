"""A tiny random model of every architecture that can be predicted, in the shape of a config that is published.

The names of the published ones stand beside. What is kept of them: groups of heads, head_dim apart from the hidden
size, windows (8 tokens here) and their pattern, RoPE's scaling and share, tied or untied output, biases, experts and
shared experts, dense first layers, multipliers.
"""

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from kvp_mlx.bundle.config import AuxiliaryConfig, BaseConfig, BundleConfig, PredictorConfig
from kvp_mlx.bundle.layer_map import prefix_layer_map
from kvp_mlx.bundle.loading import KVPModel, build_predictor
from kvp_mlx.models.families import kinds_of
from kvp_mlx.models.sections import prefix_model

VOCABULARY = 61
WINDOW = 8

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}
LONGROPE = {
    "type": "longrope",
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1],
    "long_factor": [1.5, 4.0],
}
MINISTRAL_ROPE = YARN | {
    "type": "yarn",
    "rope_theta": 1e6,
    "llama_4_scaling_beta": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
QWEN_MOE = MOE | {"decoder_sparse_step": 1, "mlp_only_layers": [], "shared_expert_intermediate_size": 24}
ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16}
DELTA = {
    "num_hidden_layers": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
}
QWEN35 = DELTA | {
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
    },
}
GEMMA3 = {"num_hidden_layers": 7, "sliding_window": WINDOW, "sliding_window_pattern": 3, "query_pre_attn_scalar": 16}
GEMMA4 = {
    "num_hidden_layers": 6,
    "global_head_dim": 24,
    "num_global_key_value_heads": 1,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 3,
    "attention_k_eq_v": True,
    "final_logit_softcapping": 30.0,
    "use_double_wide_mlp": False,
    "tie_word_embeddings": True,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
LFM2 = {"norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "head_dim": 8}
LFM2_TYPES = ["conv", "conv", "full_attention", "conv", "full_attention", "conv"]

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": LLAMA3, "tie_word_embeddings": True},  # Llama 3.2
    "mistral": {},  # Mistral Small 24B
    "qwen2": {"tie_word_embeddings": True},  # Qwen2.5
    "qwen3": {"tie_word_embeddings": True},  # Qwen3-4B
    "olmo2": {"head_dim": 8},  # OLMo 2 7B
    "smollm3": {"no_rope_layer_interval": 4, "tie_word_embeddings": True, "head_dim": 8},  # SmolLM3-3B
    "phi3": {"rope_scaling": LONGROPE, "partial_rotary_factor": 0.5, "head_dim": 8},  # Phi-4-mini
    "openelm": {  # OpenELM
        "num_transformer_layers": 4,
        "model_dim": 32,
        "head_dim": 8,
        "ffn_dim_divisor": 16,
        "num_query_heads": [2, 2, 4, 4],
        "num_kv_heads": [1, 2, 2, 1],
        "ffn_multipliers": [1.0, 1.5, 2.0, 2.5],
    },
    "qwen3_moe": QWEN_MOE | {"num_attention_heads": 8, "num_key_value_heads": 1},  # Qwen3-30B-A3B
    "qwen2_moe": QWEN_MOE | {"num_key_value_heads": 4},  # Qwen1.5-MoE-A2.7B
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5},  # GLM-4-9B-0414
    "glm4_moe": ROUTED | {"use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5},  # GLM-4.5
    "olmoe": MOE | {"num_key_value_heads": 4, "head_dim": 8, "norm_topk_prob": False},  # OLMoE-1B-7B
    "seed_oss": {"num_attention_heads": 8, "num_key_value_heads": 1, "attention_bias": True},  # Seed-OSS-36B
    "ernie4_5": {"num_key_value_heads": 1, "use_bias": False, "tie_word_embeddings": True},  # ERNIE-4.5-0.3B
    "ernie4_5_moe": {  # ERNIE-4.5-21B-A3B
        "head_dim": None,
        "use_bias": False,
        "tie_word_embeddings": True,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
    },
    "dots1": ROUTED | {"num_key_value_heads": 4, "n_shared_experts": 2, "scoring_func": "noaux_tc"},  # dots.llm1
    "granite": {  # Granite 3.3
        "logits_scaling": 8.0,
        "attention_multiplier": 0.0625,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "tie_word_embeddings": True,
    },
    "ministral3": {"rope_parameters": MINISTRAL_ROPE, "tie_word_embeddings": True},  # Ministral-3-3B
    "mistral3": {"text_config": {"model_type": "ministral3", "rope_parameters": MINISTRAL_ROPE}},  # Ministral-3-14B
    "qwen3_next": QWEN_MOE | DELTA,  # Qwen3-Next-80B-A3B
    "qwen3_5": {"text_config": QWEN35 | {"model_type": "qwen3_5_text", "tie_word_embeddings": True}},  # Qwen3.5-4B
    "qwen3_5_moe": {"text_config": QWEN35 | QWEN_MOE | {"model_type": "qwen3_5_moe_text"}},  # Qwen3.5-35B-A3B
    "gpt_oss": {  # gpt-oss-20b
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "sliding_window": WINDOW,
        "layer_types": ALTERNATING,
        "rope_scaling": YARN,
    },
    "gemma3_text": GEMMA3 | {"num_key_value_heads": 1},  # Gemma 3 1B
    "gemma3": {  # Gemma 3 4B
        "vocab_size": VOCABULARY,
        "text_config": GEMMA3 | {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    },
    "gemma4": {"vocab_size": VOCABULARY, "text_config": GEMMA4 | {"model_type": "gemma4_text"}},  # Gemma 4 31B
    "gemma4_text": GEMMA4  # Gemma 4 26B-A4B
    | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "olmo3": {  # OLMo 3 7B
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "rope_scaling": YARN,
        "head_dim": 8,
    },
    "exaone4": {"sliding_window": WINDOW, "sliding_window_pattern": "LLLG", "rope_scaling": LLAMA3},  # EXAONE 4.0 32B
    "cohere2": {  # Command R7B
        "head_dim": 8,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.25,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 4,
    },
    "lfm2": LFM2  # LFM2-1.2B
    | {
        "num_hidden_layers": 6,
        "block_dim": 32,
        "block_ff_dim": 48,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "layer_types": LFM2_TYPES,
    },
    "lfm2_moe": LFM2  # LFM2-8B-A1B
    | MOE
    | {"num_hidden_layers": 6, "num_dense_layers": 2, "use_expert_bias": True, "layer_types": LFM2_TYPES},
    "glm4_moe_lite": ROUTED | LATENT,  # GLM-4.7-Flash
    "deepseek_v3": ROUTED  # DeepSeek-V3
    | LATENT
    | {
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
}


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a tiny model; ``changes`` go to its language model's fields."""
    config = CONFIGS[name]
    if "text_config" not in config:
        return COMMON | config | changes | {"model_type": name}
    outer = {key: changes.get(key, value) for key, value in config.items()}
    return outer | {"model_type": name, "text_config": COMMON | config["text_config"] | changes}


def tiny_model(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """Return mlx-lm's own model, with random weights."""
    module = importlib.import_module(f"mlx_lm.models.{'llama' if name == 'mistral' else name}")
    model = module.Model(module.ModelArgs.from_dict(config_of(name, **changes)))
    rng = np.random.default_rng(seed)
    weights = [
        (key, rng.uniform(0.5, 1.5, old.shape) if old.ndim == 1 else rng.normal(0, 0.15, old.shape))
        for key, old in tree_flatten(model.parameters())
    ]
    model.load_weights([(key, mx.array(array, mx.float32)) for key, array in weights])
    model.eval()
    return model


def bundle(base: nn.Module, layers: int, tokenizer: TokenizerWrapper | None = None) -> KVPModel:
    """Return a prefix of some layers with maps that are not fitted."""
    depth = len(kinds_of(base))
    config = BundleConfig(
        base=BaseConfig(fingerprint="none", path="base"),
        auxiliary=AuxiliaryConfig(kind="prefix", layers=layers),
        predictor=PredictorConfig(input="hidden_state", layer_map=prefix_layer_map(depth, layers)),
    )
    prefix = prefix_model(base, layers)
    return KVPModel(base, prefix, build_predictor(base, prefix, config), tokenizer, config, {})


def random_ids(tokens: int, batch: int) -> mx.array:
    """Return token ids (B, T)."""
    return mx.array(np.random.default_rng(1).integers(0, VOCABULARY, (batch, tokens)))


def table() -> str:
    """Return docs/families.md's table of what is tested."""
    lines = ["| architecture | kinds of layer |", "|---|---|"]
    for name in sorted(CONFIGS):
        kinds = sorted({kind.title for kind in kinds_of(tiny_model(name))})
        lines.append(f"| {name} | {', '.join(kinds)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
