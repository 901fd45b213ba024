"""GGUF files as llama.cpp's converter writes them, of tiny mlx-lm directories: names, rows, metadata."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
from gguf.quants import dequantize, quantize
from kvp_mlx.convert.gguf_config import ARCHITECTURES, TOP_TENSORS
from kvp_mlx.convert.gguf_tensors import half_split_rows
from tokenizers import pre_tokenizers

from .directories import LLAMA

Types = gguf.GGMLQuantizationType
Kind = Types | Callable[[str], Types]


def architecture_of(config: dict) -> str:
    """Return llama.cpp's name of a config's architecture."""
    return {"qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])


def gguf_names(architecture: str) -> dict[str, str]:
    """Return GGUF's names by mlx-lm's, without layers."""
    table = ARCHITECTURES[architecture].layer | TOP_TENSORS
    return {target: name for name, (target, _) in table.items()}


def llama_cpp_rows(array: mx.array, heads: int) -> mx.array:
    """What llama.cpp's converter does to query and key rows: halves become interleaved pairs."""
    rows, width = array.shape
    return array.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def gguf_metadata() -> dict[str, object]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "th"]
    tokens += [f"<unused{i}>" for i in range(LLAMA["vocab_size"] - len(tokens))]
    numbers = {
        "llama.embedding_length": LLAMA["hidden_size"],
        "llama.block_count": LLAMA["num_hidden_layers"],
        "llama.feed_forward_length": LLAMA["intermediate_size"],
        "llama.attention.head_count": LLAMA["num_attention_heads"],
        "llama.attention.head_count_kv": LLAMA["num_key_value_heads"],
        "llama.context_length": 512,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
    }
    return {
        "general.architecture": "llama",
        "llama.attention.layer_norm_rms_epsilon": mx.array(1e-5),
        "llama.rope.freq_base": mx.array(10000.0),
        **{key: mx.array(value, mx.uint32) for key, value in numbers.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": mx.array(False),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": mx.array([3, 3, 3] + [1] * (len(tokens) - 3), mx.int32),
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def write_gguf(path: Path, model: Path, **metadata: object) -> None:
    """Write a llama directory's weights and tokeniser with mlx's own writer."""
    arrays, names = {}, gguf_names("llama")
    for name, array in mx.load(str(model / "model.safetensors")).items():
        full, heads = _place(name, names, LLAMA, "llama")
        arrays[full] = llama_cpp_rows(array, heads) if heads else array
    mx.save_gguf(str(path), arrays, gguf_metadata() | metadata)


def _place(name: str, names: dict[str, str], config: dict, architecture: str) -> tuple[str, int]:
    """Return a tensor's name in GGUF, and of how many heads rows are interleaved there."""
    parts = name.split(".")
    inner = names[".".join(parts[3:]) if parts[1] == "layers" else name]
    interleaved = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}
    heads = config[interleaved[inner]] if architecture == "llama" and inner in interleaved else 0
    return f"blk.{parts[2]}.{inner}" if parts[1] == "layers" else inner, heads


def model_metadata(config: dict) -> dict[str, object]:
    """Return what llama.cpp's converter writes of a config, with the tokeniser above."""
    name, heads = architecture_of(config), config["num_attention_heads"]
    numbers = {
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "context_length": config["max_position_embeddings"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config.get("rope_theta", 10000.0)),
    }
    if name == "qwen3moe":
        numbers |= {"expert_count": config["num_experts"], "expert_used_count": config["num_experts_per_tok"]}
        numbers["expert_feed_forward_length"] = config["moe_intermediate_size"]
    if name == "gemma3":
        numbers["attention.sliding_window"] = config["sliding_window"]
    if "head_dim" in config:
        numbers |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    if "partial_rotary_factor" in config:
        numbers["rope.dimension_count"] = int(config["hidden_size"] // heads * config["partial_rotary_factor"])
    common = {key: value for key, value in gguf_metadata().items() if not key.startswith("llama.")}
    return common | {"general.architecture": name} | {f"{name}.{key}": value for key, value in numbers.items()}


def write_file(
    path: Path,
    model: Path,
    kind: Kind = Types.F16,
    *,
    without: str = "",
    only: Callable[[str], bool] = lambda name: True,
    tensors: dict[str, np.ndarray] | None = None,
    big_endian: bool = False,
    **changes: object,
) -> dict[str, np.ndarray]:
    """Write a directory of a supported architecture as GGUF, with llama.cpp's own package.

    Args:
        path: the file.
        model: the directory.
        kind: type of the matrices, or of each by its name.
        without: metadata key that is left out.
        only: which tensors are written.
        tensors: further ones, in fp32.
        big_endian: byte order.
        changes: metadata, over what the converter would write.

    Returns:
        The weights as these types keep them, by mlx-lm's names.
    """
    config = json.loads((model / "config.json").read_text())
    name, order = architecture_of(config), gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    metadata = model_metadata(config) | changes
    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]), endianess=order)
    for key, value in metadata.items():
        if key not in ("general.architecture", without):
            add_value(writer, key, value)
    kept, names = {}, gguf_names(name)
    for mlx_name, array in mx.load(str(model / "model.safetensors")).items():
        full, heads = _place(mlx_name, names, config, name)
        if only(full):
            rows = np.array(llama_cpp_rows(array, heads) if heads else array)
            rows += 1 if name == "gemma3" and full.endswith("norm.weight") else 0
            is_small = rows.ndim == 1 or "ffn_gate_inp" in full
            stored = Types.F32 if is_small else kind if isinstance(kind, Types) else kind(full)
            data = quantize(rows, stored)
            writer.add_tensor(full, data, raw_dtype=stored)
            restored = dequantize(data, stored)
            kept[mlx_name] = half_split_rows(restored, heads) if heads else restored
    for full, array in (tensors or {}).items():
        writer.add_tensor(full, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def add_value(writer: gguf.GGUFWriter, key: str, given: object) -> None:
    """Write metadata in the type that the converter uses for such values."""
    value = np.array(given).tolist() if isinstance(given, mx.array) else given
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        add = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        (writer.add_int32 if isinstance(value, int) and value < 0 else add[type(value)])(key, value)
