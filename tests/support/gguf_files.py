"""What llama.cpp's converter puts into a GGUF file of the tiny Llama in ``directories``: names, rows, metadata."""

from pathlib import Path

import mlx.core as mx
from kvp_mlx.convert.gguf import LAYER_TENSORS, TOP_TENSORS
from tokenizers import pre_tokenizers

from .directories import LLAMA

GGUF_NAMES = {target: name for name, target in (LAYER_TENSORS | TOP_TENSORS).items()}


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
    """Write a model directory's weights and tokeniser as llama.cpp's converter would."""
    arrays = {}
    for name, array in mx.load(str(model / "model.safetensors")).items():
        stem, _, suffix = name.rpartition(".")
        parts = stem.split(".")
        if parts[1] == "layers":
            inner = GGUF_NAMES[".".join(parts[3:])]
            heads = {"attn_q": LLAMA["num_attention_heads"], "attn_k": LLAMA["num_key_value_heads"]}.get(inner)
            arrays[f"blk.{parts[2]}.{inner}.{suffix}"] = llama_cpp_rows(array, heads) if heads else array
        else:
            arrays[f"{GGUF_NAMES[stem]}.{suffix}"] = array
    mx.save_gguf(str(path), arrays, gguf_metadata() | metadata)
