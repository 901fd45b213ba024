"""``kvp convert gguf`` on files written by llama.cpp's own Python package, in every type that is kept."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import Kvp
from mlx_lm.utils import load, load_model
from support.directories import TEXT, write_llama
from support.gguf_files import Types, gguf_metadata
from support.gguf_files import write_file as write

KEPT = [Types.F32, Types.F16, Types.Q4_0, Types.Q4_1, Types.Q8_0]
IDS = mx.array([[5, 9, 100, 7, 250, 3]])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", tokenizer=False)


def reference_logits(model: Path, weights: dict[str, np.ndarray]) -> mx.array:
    plain, _ = load_model(model)
    plain.load_weights([(name, mx.array(array, mx.float32)) for name, array in weights.items()])
    return plain(IDS)


@pytest.mark.parametrize("kind", KEPT, ids=lambda kind: kind.name)
def test_every_kept_type(kind: Types, model: Path, tmp_path: Path, kvp: Kvp) -> None:
    weights = write(tmp_path / "m.gguf", model, kind)
    out = tmp_path / "out"
    outcome = kvp("convert", "gguf", tmp_path / "m.gguf", "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    converted, tokenizer = load(str(out))
    converted.set_dtype(mx.float32)
    np.testing.assert_allclose(converted(IDS), reference_logits(model, weights), atol=2e-3, rtol=0)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    bits = {"F32": (32, 32), "F16": (16, 16.6), "Q4_0": (5, 5.2), "Q4_1": (5, 5.2), "Q8_0": (9, 9.2)}[kind.name]
    assert bits[0] <= outcome.json()["bits_per_weight"] <= bits[1]
    assert (out / "README.md").exists()


@pytest.mark.parametrize(
    "options",
    [["--dtype", "bfloat16"], ["--q-bits", "4", "--q-group-size", "32"], ["--dtype", "float16", "--q-bits", "8"]],
)
def test_precision_of_the_output(options: list[str], model: Path, tmp_path: Path, kvp: Kvp) -> None:
    weights = write(tmp_path / "m.gguf", model, Types.F32)
    outcome = kvp("convert", "gguf", tmp_path / "m.gguf", "--out", tmp_path / "out", *options, "--json")
    assert outcome.code == 0, outcome.err
    converted, tokenizer = load(str(tmp_path / "out"))
    difference = converted(IDS).astype(mx.float32) - reference_logits(model, weights)
    assert 0 < mx.sqrt((difference**2).mean()).item() < (0.5 if "4" in options else 0.05)
    assert tokenizer is not None
    assert not (tmp_path / "out" / ".plain").exists()


def test_already_quantised_is_not_quantised_again(model: Path, tmp_path: Path, kvp: Kvp) -> None:
    write(tmp_path / "m.gguf", model, Types.Q4_0)
    outcome = kvp("convert", "gguf", tmp_path / "m.gguf", "--out", tmp_path / "out", "--q-bits", 4)
    assert outcome.code == 2
    assert "already quantised" in outcome.err


REFUSED = [Types.Q8_1, Types.I8, Types.I32, Types.F64]


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.name)
def test_other_types_are_refused_by_name(kind: Types, model: Path, tmp_path: Path, kvp: Kvp) -> None:
    write(tmp_path / "m.gguf", model, Types.Q8_0)
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    at = data.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4 + 2 * 8  # dimensions, then the type
    data[at : at + 4] = int(kind).to_bytes(4, "little")
    (tmp_path / "m.gguf").write_bytes(data)
    outcome = kvp("convert", "gguf", tmp_path / "m.gguf", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert f"blk.1.ffn_up.weight is {kind.name}" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def shifted(data: bytes) -> bytes:
    """Let a tensor begin where the file has long ended."""
    at = data.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4 + 2 * 8 + 4
    return data[:at] + (2**40).to_bytes(8, "little") + data[at + 8 :]


def nested(data: bytes) -> bytes:
    """Metadata that is an array of arrays of arrays ..."""
    name = b"general.architecture"
    value = b"\x09\0\0\0" + (b"\x09\0\0\0" + b"\1" + bytes(7)) * 50_000
    return data[:24] + len(name).to_bytes(8, "little") + name + value


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "wrong magic": lambda data: b"GGML" + data[4:],
    "version 1": lambda data: data[:4] + b"\1\0\0\0" + data[8:],
    "header cut short": lambda data: data[:300],
    "data cut short": lambda data: data[: len(data) // 2],
    "endless string": lambda data: data[:24] + b"\xff" * 8 + data[32:],
    "endless metadata": lambda data: data[:16] + b"\xff" * 8 + data[24:],
    "endless tensors": lambda data: data[:8] + b"\xff" * 8 + data[16:],
    "tensor past the end": shifted,
    "arrays in arrays": nested,
    "unknown kind of metadata": lambda data: data.replace(b"general.architecture\x08", b"general.architecture\x63"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(name: str, model: Path, tmp_path: Path, kvp: Kvp) -> None:
    write(tmp_path / "m.gguf", model, Types.Q4_0)
    (tmp_path / "m.gguf").write_bytes(DAMAGE[name]((tmp_path / "m.gguf").read_bytes()))
    outcome = kvp("convert", "gguf", tmp_path / "m.gguf", "--out", tmp_path / "out")
    assert outcome.code == 2, outcome.err
    assert "m.gguf" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.*"))


NEEDED = [name for name in gguf_metadata() if name.split(".")[0] in ("llama", "tokenizer")]


OPTIONAL = {
    "llama.rope.freq_base",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.chat_template",
}


@pytest.mark.parametrize("name", [name for name in NEEDED if name not in OPTIONAL])
def test_missing_metadata_is_one_line(name: str, model: Path, tmp_path: Path, kvp: Kvp) -> None:
    write(tmp_path / "m.gguf", model, Types.F16, without=name)
    outcome = kvp("convert", "gguf", tmp_path / "m.gguf", "--out", tmp_path / "out")
    assert outcome.code == 2, outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_optional_metadata_may_be_missing(name: str, model: Path, tmp_path: Path, kvp: Kvp) -> None:
    write(tmp_path / "m.gguf", model, Types.F16, without=name)
    outcome = kvp("convert", "gguf", tmp_path / "m.gguf", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    _, tokenizer = load(str(tmp_path / "out"))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.eos_token_id == 2


def test_llama_2_states_no_rope_base(model: Path, tmp_path: Path, kvp: Kvp) -> None:
    weights = write(tmp_path / "m.gguf", model, Types.F32, without="llama.rope.freq_base")
    assert kvp("convert", "gguf", tmp_path / "m.gguf", "--out", tmp_path / "out").code == 0
    converted, _ = load(str(tmp_path / "out"))
    np.testing.assert_allclose(converted(IDS), reference_logits(model, weights), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes", [{"llama.attention.head_count": 0}, {"llama.attention.head_count": 7}, {"llama.block_count": 9}]
)
def test_metadata_that_the_tensors_contradict(changes: dict, model: Path, tmp_path: Path, kvp: Kvp) -> None:
    write(tmp_path / "m.gguf", model, Types.F16, **changes)
    outcome = kvp("convert", "gguf", tmp_path / "m.gguf", "--out", tmp_path / "out")
    assert outcome.code == 2, outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tokenizer_of_ones_own(model: Path, tmp_path: Path, kvp: Kvp) -> None:
    write(tmp_path / "m.gguf", model, Types.F16)
    own = write_llama(tmp_path / "own")
    assert kvp("convert", "gguf", tmp_path / "m.gguf", "--out", tmp_path / "out", "--tokenizer", own).code == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()
