"""What a GGUF file's metadata say of a model: the table of architectures, and mlx-lm's config.json.

A metadata key of the architecture is carried over, required to have the one value that mlx-lm's model file has, or
known to change nothing. Any other is refused by name: it may change the model.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .gguf_file import GGUFFile, GGUFTensor, shown
from .gguf_rope import FACTOR_TENSORS, rope_scaling

# GGUF tensor -> mlx-lm tensor, and its dimensions (see ``Sizes``); layers' names follow "blk.N."
TOP_TENSORS = {
    "token_embd.weight": ("model.embed_tokens.weight", "vocab hidden"),
    "output_norm.weight": ("model.norm.weight", "hidden"),
    "output.weight": ("lm_head.weight", "vocab hidden"),
}
NORMS = {
    "attn_norm.weight": ("input_layernorm.weight", "hidden"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "hidden"),
}
ATTENTION = {
    "attn_q.weight": ("self_attn.q_proj.weight", "queries hidden"),
    "attn_k.weight": ("self_attn.k_proj.weight", "keys hidden"),
    "attn_v.weight": ("self_attn.v_proj.weight", "keys hidden"),
    "attn_output.weight": ("self_attn.o_proj.weight", "hidden queries"),
}
BIASES = {
    "attn_q.bias": ("self_attn.q_proj.bias", "queries"),
    "attn_k.bias": ("self_attn.k_proj.bias", "keys"),
    "attn_v.bias": ("self_attn.v_proj.bias", "keys"),
}
HEAD_NORMS = {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", "head"),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", "head"),
}
GATED_FFN = {
    "ffn_gate.weight": ("mlp.gate_proj.weight", "ffn hidden"),
    "ffn_up.weight": ("mlp.up_proj.weight", "ffn hidden"),
    "ffn_down.weight": ("mlp.down_proj.weight", "hidden ffn"),
}
FUSED = {
    "attn_qkv.weight": ("self_attn.qkv_proj.weight", "fused hidden"),
    "attn_output.weight": ("self_attn.o_proj.weight", "hidden queries"),
    "ffn_up.weight": ("mlp.gate_up_proj.weight", "gate_up hidden"),
    "ffn_down.weight": ("mlp.down_proj.weight", "hidden ffn"),
}
EXPERTS = {
    "ffn_gate_inp.weight": ("mlp.gate.weight", "experts hidden"),
    "ffn_gate_exps.weight": ("mlp.switch_mlp.gate_proj.weight", "experts expert_ffn hidden"),
    "ffn_up_exps.weight": ("mlp.switch_mlp.up_proj.weight", "experts expert_ffn hidden"),
    "ffn_down_exps.weight": ("mlp.switch_mlp.down_proj.weight", "experts hidden expert_ffn"),
}
FOUR_NORMS = {
    "attn_norm.weight": ("input_layernorm.weight", "hidden"),
    "post_attention_norm.weight": ("post_attention_layernorm.weight", "hidden"),
    "ffn_norm.weight": ("pre_feedforward_layernorm.weight", "hidden"),
    "post_ffw_norm.weight": ("post_feedforward_layernorm.weight", "hidden"),
}
Names = dict[str, tuple[str, str]]
Sizes = dict[str, int]


def _experts(file: GGUFFile, name: str, sizes: Sizes) -> dict[str, Any]:
    """Return what config.json says of experts, all layers having them."""
    used = file.integer(f"{name}.expert_used_count")
    if not 0 < used <= sizes["experts"]:
        raise InputError(f"{file.path}: {name}.expert_used_count is {used}, of {sizes['experts']}; download it again.")
    return {
        "num_experts": sizes["experts"],
        "num_experts_per_tok": used,
        "moe_intermediate_size": sizes["expert_ffn"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


GEMMA3_27B_LAYERS = 62
"""Of the only one whose queries are scaled by the width over the heads, as llama.cpp knows it, too."""


def _windows(file: GGUFFile, name: str, sizes: Sizes) -> dict[str, Any]:
    """Return what config.json says of Gemma 3's layers with sliding windows, five of six."""
    is_largest = sizes["layers"] == GEMMA3_27B_LAYERS
    return {
        "query_pre_attn_scalar": sizes["hidden"] // sizes["heads"] if is_largest else sizes["head"],
        "sliding_window": file.integer(f"{name}.attention.sliding_window"),
        "sliding_window_pattern": file.integer(f"{name}.attention.sliding_window_pattern", 6),
        "rope_local_base_freq": file.number(f"{name}.rope.freq_base_swa", 10000.0),
    }


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores one architecture, and what mlx-lm's model file of that name takes.

    Attributes:
        class_name: transformers' name, for config.json.
        layer: tensors of a layer.
        scalings: kinds of RoPE scaling.
        interleaved: query and key rows lie in pairs for llama.cpp's own RoPE.
        free_head_dim: config.json may state ``head_dim``; otherwise it is the width over the heads.
        partial_rope: a part of each head may stay as it is.
        model_type: mlx-lm's name, where it is another.
        norms_above: by how much norms' weights are stored above mlx-lm's.
        keys: of its own.
        own: what these make of config.json.
    """

    class_name: str
    layer: Names
    scalings: tuple[str, ...] = ("linear", "yarn", "llama3")
    interleaved: bool = False
    free_head_dim: bool = False
    partial_rope: bool = False
    model_type: str | None = None
    norms_above: float = 0.0
    keys: frozenset[str] = frozenset()
    own: Callable[[GGUFFile, str, Sizes], dict[str, Any]] = lambda file, name, sizes: {}


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", NORMS | ATTENTION | GATED_FFN, interleaved=True, free_head_dim=True),
    "qwen2": Architecture("Qwen2ForCausalLM", NORMS | ATTENTION | BIASES | GATED_FFN),
    "qwen3": Architecture("Qwen3ForCausalLM", NORMS | ATTENTION | HEAD_NORMS | GATED_FFN, free_head_dim=True),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM",
        NORMS | ATTENTION | HEAD_NORMS | EXPERTS,
        free_head_dim=True,
        model_type="qwen3_moe",
        keys=frozenset({"expert_count", "expert_used_count", "expert_feed_forward_length"}),
        own=_experts,
    ),
    "phi3": Architecture("Phi3ForCausalLM", NORMS | FUSED, scalings=("longrope",), partial_rope=True),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        FOUR_NORMS | ATTENTION | HEAD_NORMS | GATED_FFN,
        scalings=("linear",),
        free_head_dim=True,
        model_type="gemma3_text",
        norms_above=1.0,
        keys=frozenset({"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"}),
        own=_windows,
    ),
}

CARRIED = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "use_parallel_residual": (False,),
}
"""What keys that mlx-lm's model files have nothing for may say: that there is no such thing."""
HARMLESS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
LAYER = re.compile(r"blk\.(0|[1-9]\d{0,8})\.(.+)")


def architecture_of(file: GGUFFile) -> tuple[str, Architecture]:
    """Return the architecture's name and row.

    Raises:
        InputError: one that has no row, named; or no model at all (a LoRA adapter, a vision projector).
    """
    kind = file.text("general.type", "model")
    if kind != "model":
        raise InputError(f"{file.path} holds no model but a GGUF {shown(kind)[1:-1]}; name the model's own file.")
    name = file.text("general.architecture")
    if name not in ARCHITECTURES:
        convertible = ", ".join(ARCHITECTURES)
        raise InputError(f"{file.path} holds a {shown(name)[1:-1]} model; GGUF files of {convertible} convert.")
    return name, ARCHITECTURES[name]


def model_config(file: GGUFFile) -> dict[str, Any]:
    """Return mlx-lm's config.json.

    Raises:
        InputError: metadata that are missing, of a wrong type, contradicted by the tensors, or that mlx-lm's model file
            has nothing for; a tensor that is missing or has no place.
    """
    name, row = architecture_of(file)
    _check_keys(file, name, row)
    sizes = _sizes(file, name, row)
    _check_tensors(file, name, row, sizes)
    theta = file.number(f"{name}.rope.freq_base", 10000.0)
    if theta <= 1:
        raise InputError(f"{file.path}: {name}.rope.freq_base is {theta}; download it again.")
    config: dict[str, Any] = {
        "model_type": row.model_type or name,
        "architectures": [row.class_name],
        "hidden_size": sizes["hidden"],
        "num_hidden_layers": sizes["layers"],
        "intermediate_size": sizes["ffn"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "rms_norm_eps": file.number(f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "max_position_embeddings": file.integer(f"{name}.context_length"),
        "vocab_size": sizes["vocab"],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if row.free_head_dim and (name != "llama" or sizes["head"] * sizes["heads"] != sizes["hidden"]):
        config["head_dim"] = sizes["head"]
    config |= _rope(file, name, row, sizes["head"], theta, config["max_position_embeddings"])
    config |= row.own(file, name, sizes) | (
        {} if "attention.sliding_window" in row.keys else _window(file, name, config)
    )
    return config | _token_ids(file, sizes["vocab"])


def _check_keys(file: GGUFFile, name: str, row: Architecture) -> None:
    for key, value in file.metadata.items():
        short = key.removeprefix(f"{name}.")
        if short == key or short in CARRIED | HARMLESS | row.keys:
            continue
        if short not in NEUTRAL:
            raise InputError(
                f"{file.path}: the metadata key {shown(key)[1:-1]} is not known here and may change the model, so the "
                "file is not converted."
            )
        if type(value) is list or value not in NEUTRAL[short]:
            raise InputError(f"{file.path}: mlx-lm's {name} model has nothing for {key} = {shown(value)}.")


def _sizes(file: GGUFFile, name: str, row: Architecture) -> Sizes:
    """Return the lengths that tensors' dimensions are named after."""

    def number(key: str, default: int | None = None) -> int:
        return file.integer(f"{name}.{key}", default)

    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"{file.path} holds no matrix token_embd.weight; download it again.")
    hidden, heads = number("embedding_length"), number("attention.head_count")
    head = number("attention.key_length", max(1, hidden // heads))
    if not row.free_head_dim and head * heads != hidden:
        raise InputError(f"{file.path}: mlx-lm's {name} model has no heads of {head} in {hidden} / {heads}.")
    if number("attention.value_length", head) != head:
        raise InputError(f"{file.path}: mlx-lm's {name} model has no {name}.attention.value_length but {head}.")
    if abs((file.number(f"{name}.attention.scale", 0.0) or head**-0.5) - head**-0.5) > 1e-5:
        raise InputError(f"{file.path}: mlx-lm's {name} model has no {name}.attention.scale but {head**-0.5:.6g}.")
    kv_heads = number("attention.head_count_kv", heads)
    if heads % kv_heads or head % 2:
        raise InputError(f"{file.path}: {heads} heads of {head}, {kv_heads} of keys, cannot be; download it again.")
    ffn, has_experts = number("feed_forward_length"), "expert_count" in row.keys
    sizes = (
        {"experts": number("expert_count"), "expert_ffn": number("expert_feed_forward_length")} if has_experts else {}
    )
    return sizes | {
        "layers": number("block_count"),
        "vocab": embedding.shape[0],
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head": head,
        "queries": heads * head,
        "keys": kv_heads * head,
        "fused": (heads + 2 * kv_heads) * head,
        "ffn": ffn,
        "gate_up": 2 * ffn,
    }


def _check_tensors(file: GGUFFile, name: str, row: Architecture, sizes: Sizes) -> None:
    """Refuse tensors that have no place, are missing, or contradict the metadata; first of all too many layers."""
    layers = {int(match[1]) for match in map(LAYER.fullmatch, file.tensors) if match}
    if len(layers) != sizes["layers"] or max(layers) + 1 != sizes["layers"]:
        raise InputError(
            f"{file.path}: {name}.block_count is {sizes['layers']}, but there are tensors of {len(layers)} layers."
        )
    for tensor_name, tensor in file.tensors.items():
        if tensor_name not in FACTOR_TENSORS:
            _check_shape(file, name, tensor_name, tensor, mlx_name(tensor_name, row), sizes)
    wanted = [f"blk.{layer}.{inner}" for layer in range(sizes["layers"]) for inner in row.layer]
    for missing in (key for key in [*TOP_TENSORS, *wanted] if key not in file.tensors and key != "output.weight"):
        raise InputError(f"{file.path} lacks the tensor {missing} of a {name} model; download it again.")


def _check_shape(
    file: GGUFFile, name: str, tensor_name: str, tensor: GGUFTensor, place: tuple[str, str] | None, sizes: Sizes
) -> None:
    if place is None:
        raise InputError(
            f"{file.path}: the tensor {shown(tensor_name)[1:-1]} has no place in mlx-lm's {name} model, so the file is "
            "not converted."
        )
    wanted = tuple(sizes[dimension] for dimension in place[1].split())
    if tensor.shape != wanted:
        raise InputError(
            f"{file.path}: {tensor_name} is {_words(tensor.shape)}, but the metadata say {_words(wanted)}; "
            "download it again."
        )


def _words(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def mlx_name(tensor_name: str, row: Architecture) -> tuple[str, str] | None:
    """Return mlx-lm's name of a tensor and its dimensions, or None where it has no place."""
    match = LAYER.fullmatch(tensor_name)
    if match is None:
        return TOP_TENSORS.get(tensor_name)
    if match[2] not in row.layer:
        return None
    target, dimensions = row.layer[match[2]]
    return f"model.layers.{match[1]}.{target}", dimensions


def _rope(file: GGUFFile, name: str, row: Architecture, head: int, theta: float, window: int) -> dict[str, Any]:
    turned = file.integer(f"{name}.rope.dimension_count", head, least=2)
    found: dict[str, Any] = {}
    if turned != head:
        if not row.partial_rope or turned % 2 or int(head * (turned / head)) != turned:
            raise InputError(f"{file.path}: mlx-lm's {name} model has no {name}.rope.dimension_count but {head}.")
        found["partial_rotary_factor"] = turned / head
    scaling = rope_scaling(file, name, row.scalings, turned, theta, window)
    if scaling is not None:
        found["rope_scaling"] = scaling
        if scaling.get("type") == "longrope":
            found["original_max_position_embeddings"] = file.integer(f"{name}.rope.scaling.original_context_length")
    return found


def _window(file: GGUFFile, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Cut the context to a sliding window, within which that changes nothing; mlx-lm's models here have none."""
    key = f"{name}.attention.sliding_window"
    window = file.integer(key, 0, least=0)
    if not 0 < window < config["max_position_embeddings"]:
        return {}
    if "rope_scaling" in config:
        raise InputError(f"{file.path}: mlx-lm's {name} model has nothing for {key} = {window} with RoPE scaling.")
    return {"max_position_embeddings": window}


def _token_ids(file: GGUFFile, vocabulary: int) -> dict[str, Any]:
    """Return the ids that begin and end a text; where a turn or message has its own end, all ends."""
    found: dict[str, Any] = {}
    for key, value in file.metadata.items():
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and type(value) is not int:
            raise InputError(f"{file.path}: {key} is {str(value)[:40]}, but a token id is a whole number.")
    if bos := token_ids(file, vocabulary, "bos"):
        found["bos_token_id"] = bos[0]
    if ends := token_ids(file, vocabulary, "eos", "eot", "eom"):
        found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return found


def token_ids(file: GGUFFile, vocabulary: int, *roles: str) -> list[int]:
    """Return the ids of special tokens, as far as the file states them, each once.

    Raises:
        InputError: an id that is none.
    """
    found: list[int] = []
    for key in (f"tokenizer.ggml.{role}_token_id" for role in roles):
        if key in file.metadata:
            token = file.integer(key, least=0)
            if token >= vocabulary:
                raise InputError(f"{file.path}: {key} is {token}, but there are {vocabulary} tokens.")
            found += [token] * (token not in found)
    return found
