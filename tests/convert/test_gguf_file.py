"""GGUF to mlx-lm: the same logits, for what mlx itself writes and reads as GGUF."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from kvp_mlx.convert.gguf import LAYER_TENSORS, TOP_TENSORS, convert_gguf, decimal
from mlx_lm.utils import load
from support.directories import LLAMA, TEXT, write_llama

from kvp_mlx.errors import InputError

GGUF_NAMES = {target: name for name, target in (LAYER_TENSORS | TOP_TENSORS).items()}


def llama_cpp_rows(array: mx.array, heads: int) -> mx.array:
    """What llama.cpp's converter does to query and key rows: halves become interleaved pairs."""
    rows, width = array.shape
    return array.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_gguf(path: Path, model: Path, **metadata: object) -> None:
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


def gguf_metadata() -> dict[str, object]:
    from tokenizers import pre_tokenizers

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


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "source", tokenizer=False)


def test_logits_and_tokens_survive(source: Path, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    write_gguf(tmp_path / "m.gguf", source)
    out = tmp_path / "out"
    out.mkdir()
    convert_gguf(tmp_path / "m.gguf", out)
    model, tokenizer = load(str(out))
    original, _ = load_model(source)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    merged, one, two = (tokenizer.convert_tokens_to_ids(token) for token in ("th", "1", "2"))
    assert tokenizer.encode("<|im_start|>th12") == [1, merged, one, two]
    assert tokenizer.encode("<|im_end|>") == [2]
    np.testing.assert_allclose(model(mx.array([ids])), original(mx.array([ids])), atol=1e-5)


def test_rows_go_back_where_they_were() -> None:
    from kvp_mlx.convert.gguf import half_split_rows

    rows = mx.arange(16).reshape(16, 1)  # two heads of 8
    assert half_split_rows(rows, 2)[:8, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert (half_split_rows(llama_cpp_rows(rows, 2), 2) == rows).all()


def test_short_decimals_come_back() -> None:
    assert decimal(np.float32(1e-5).item()) == 1e-5
    assert decimal(np.float32(100000).item()) == 100000


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"general.architecture": "gemma3"}, "gemma3"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "llama-bpe"),
        ({"tokenizer.ggml.model": "bert"}, "bert"),
    ],
)
def test_what_is_not_llama_is_refused_by_name(metadata: dict, named: str, source: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", source, **metadata)
    with pytest.raises(InputError, match=named):
        convert_gguf(tmp_path / "m.gguf", tmp_path)


def test_tensor_without_a_place_is_named(source: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", source)
    arrays, metadata = mx.load(str(tmp_path / "m.gguf"), return_metadata=True)
    mx.save_gguf(str(tmp_path / "n.gguf"), arrays | {"blk.0.attn_sinks.weight": mx.zeros((4,))}, metadata)
    with pytest.raises(InputError, match="attn_sinks"):
        convert_gguf(tmp_path / "n.gguf", tmp_path)


def test_damaged_file_is_named(source: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", source)
    (tmp_path / "short.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:200])
    with pytest.raises(InputError, match=r"short\.gguf"):
        convert_gguf(tmp_path / "short.gguf", tmp_path)
