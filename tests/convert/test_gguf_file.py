"""GGUF to mlx-lm: the same logits, for what mlx itself writes and reads as GGUF."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from kvp_mlx.convert.gguf import convert_gguf
from kvp_mlx.convert.gguf_file import decimal
from kvp_mlx.convert.gguf_tensors import half_split_rows
from mlx_lm.utils import load, load_model
from support.directories import TEXT, write_llama
from support.gguf_files import llama_cpp_rows, write_gguf

from kvp_mlx.errors import InputError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "source", tokenizer=False)


def test_logits_and_tokens_survive(source: Path, tmp_path: Path) -> None:
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
    rows = mx.arange(16).reshape(16, 1)  # two heads of 8
    assert half_split_rows(rows, 2)[:8, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert (half_split_rows(llama_cpp_rows(rows, 2), 2) == rows).all()


def test_short_decimals_come_back() -> None:
    assert decimal(np.float32(1e-5).item()) == 1e-5
    assert decimal(np.float32(100000).item()) == 100000
    assert decimal(np.float32(3.3).item()) == 3.3
    for exact in (26214400.0, 1638400.5, 0.1 + 0.2, 1e300):
        assert decimal(exact) == exact


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"general.architecture": "gemma2"}, "gemma2"),
        ({"tokenizer.ggml.pre": "poro-chat"}, "poro-chat"),
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
