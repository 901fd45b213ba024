"""Hostile and broken GGUF files: one line that names what is wrong, exit code 2, nothing left behind."""

import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Kvp, Outcome
from support.directories import LLAMA, write_random
from support.gguf_files import Types, write_file

MODEL = {**LLAMA, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("models") / "model", MODEL)


def assert_refused(outcome: Outcome, out: Path, named: str) -> None:
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert outcome.err.startswith("kvp: ")
    assert outcome.err.count("\n") == 1
    assert len(outcome.err) < 600
    assert "report it" not in outcome.err
    assert named in outcome.err
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}.*"))


METADATA: dict[str, tuple[dict, str]] = {
    "feed-forward of one": ({"llama.feed_forward_length": 1}, "96x64, but the metadata say 1x64"),
    "feed-forward of none": ({"llama.feed_forward_length": 0}, "llama.feed_forward_length is 0"),
    "a million layers": ({"llama.block_count": 10**6}, "llama.block_count is 1000000"),
    "more layers than numbers": ({"llama.block_count": 2**32 - 1}, "llama.block_count is 4294967295"),
    "one layer too few": ({"llama.block_count": 1}, "tensors of 2 layers"),
    "no heads": ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0"),
    "a billion heads": ({"llama.attention.head_count": 2**30}, "heads"),
    "heads that do not divide": ({"llama.attention.head_count": 7}, "7 heads"),
    "odd heads": ({"llama.attention.key_length": 15}, "heads of 15"),
    "heads too wide": (
        {"llama.attention.key_length": 2**20, "llama.attention.value_length": 2**20},
        "but the metadata say 2097152x64",
    ),
    "no width": ({"llama.embedding_length": 0}, "llama.embedding_length is 0"),
    "another width": ({"llama.embedding_length": 128}, "32x64, but the metadata say 64x128"),
    "no context": ({"llama.context_length": 0}, "llama.context_length is 0"),
    "negative": ({"llama.context_length": -1}, "llama.context_length is -1"),
    "text for a token id": ({"tokenizer.ggml.fim_pre_token_id": "2"}, "tokenizer.ggml.fim_pre_token_id is 2"),
    "text for the end token": ({"tokenizer.ggml.eos_token_id": "2"}, "tokenizer.ggml.eos_token_id is"),
    "text for a number": ({"llama.block_count": "two"}, "llama.block_count is 'two'"),
    "fraction for a number": ({"llama.block_count": 2.0}, "llama.block_count is 2.0"),
    "flag for a number": ({"llama.block_count": True}, "llama.block_count is True"),
    "list for a number": ({"llama.block_count": [2, 2]}, "llama.block_count is [2, 2]"),
    "number for a name": ({"general.type": 1}, "general.type is 1"),
    "long text": ({"llama.block_count": "x" * 10**6}, "llama.block_count is 'xxxx"),
    "NaN": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
    "infinity": ({"llama.rope.freq_base": float("inf")}, "llama.rope.freq_base is inf"),
    "no RoPE": ({"llama.rope.freq_base": 0.0}, "llama.rope.freq_base is 0"),
    "backwards": ({"llama.rope.scaling.factor": -4.0}, "llama.rope.scaling.factor is -4.0"),
    "odd RoPE": ({"llama.rope.dimension_count": 3}, "llama.rope.dimension_count"),
    "escapes": ({"llama.\x1b[2Jx": 1}, "llama.\\x1b[2Jx"),
    "part of too many": ({"split.count": 2**31 - 1, "split.no": 0}, "part 0 of 2147483647"),
    "part with no number": ({"split.count": 2}, "part None of 2"),
    "parts in words": ({"split.count": "two", "split.no": 0}, "'two'"),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata(name: str, model: Path, tmp_path: Path, kvp: Kvp) -> None:
    changes, named = METADATA[name]
    write_file(tmp_path / "m.gguf", model, **changes)
    out = tmp_path / "out"
    assert_refused(kvp("convert", "gguf", tmp_path / "m.gguf", "--out", out), out, named)


TENSORS: dict[str, tuple[Callable[[str], bool], dict[str, np.ndarray], str]] = {
    "none": (lambda name: False, {}, "token_embd.weight"),
    "no embedding": (lambda name: name != "token_embd.weight", {}, "token_embd.weight"),
    "no norm": (lambda name: name != "output_norm.weight", {}, "lacks the tensor output_norm.weight"),
    "one missing": (lambda name: name != "blk.1.attn_k.weight", {}, "lacks the tensor blk.1.attn_k.weight"),
    "a layer far away": (lambda name: True, {"blk.99999999.attn_norm.weight": np.ones(64)}, "tensors of 3 layers"),
    "layer with a zero before": (lambda name: True, {"blk.01.attn_norm.weight": np.ones(64)}, "blk.01.attn_norm"),
    "stranger": (lambda name: True, {"blk.0.attn_sinks.weight": np.ones(64)}, "blk.0.attn_sinks.weight"),
    "escapes": (lambda name: True, {"\x1b[2J": np.ones(64)}, "\\x1b[2J"),
    "flat": (lambda name: name != "blk.0.ffn_up.weight", {"blk.0.ffn_up.weight": np.ones(96 * 64)}, "6144"),
    "transposed": (lambda name: name != "blk.0.ffn_up.weight", {"blk.0.ffn_up.weight": np.ones((64, 96))}, "64x96"),
    "NaN": (lambda name: name != "output_norm.weight", {"output_norm.weight": np.full(64, np.nan)}, "norm.weight"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name: str, model: Path, tmp_path: Path, kvp: Kvp) -> None:
    only, further, named = TENSORS[name]
    write_file(tmp_path / "m.gguf", model, only=only, tensors=further)
    out = tmp_path / "out"
    assert_refused(kvp("convert", "gguf", tmp_path / "m.gguf", "--out", out), out, named)


@pytest.mark.parametrize("kind", [Types.F16, Types.Q4_0, Types.Q4_1, Types.Q8_0, Types.Q5_0, Types.BF16])
def test_nan_in_every_kind_of_weights(kind: Types, model: Path, tmp_path: Path, kvp: Kvp) -> None:
    write_file(tmp_path / "m.gguf", model, kind)
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[-40 * 64 :] = b"\xff" * 40 * 64  # the last tensor is a matrix, or a norm after one
    (tmp_path / "m.gguf").write_bytes(data)
    out = tmp_path / "out"
    assert_refused(kvp("convert", "gguf", tmp_path / "m.gguf", "--out", out), out, "holds NaN")


UP = b"blk.1.ffn_up.weight"


def at_tensor(field: int, code: str, value: int) -> Callable[[bytes], bytes]:
    """Overwrite a part of one tensor's entry: bytes behind its name."""

    def change(data: bytes) -> bytes:
        at = data.index(UP) + len(UP) + field
        new = struct.pack(f"<{code}", value)
        return data[:at] + new + data[at + len(new) :]

    return change


def overwritten(at: int, code: str, value: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + struct.pack(f"<{code}", value) + data[at + struct.calcsize(f"<{code}") :]


def of_value(kind: int, value: bytes) -> Callable[[bytes], bytes]:
    """Put another value in for the first metadata key, and end the file there."""

    def change(data: bytes) -> bytes:
        name = b"general.name"
        return data[:24] + struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value

    return change


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not a whole GGUF file"),
    "four bytes": (lambda data: data[:4], "cut short"),
    "text": (lambda data: b"# a model\n" * 100, "does not begin with GGUF"),
    "version 1": (overwritten(4, "I", 1), "version 1"),
    "version 4": (overwritten(4, "I", 4), "version 4"),
    "big-endian": (overwritten(4, "I", 3 << 24), "big-endian"),
    "counts that overflow": (overwritten(8, "Q", 2**64 - 1), "not a whole GGUF file"),
    "metadata that overflow": (overwritten(16, "Q", 2**64 - 1), "not a whole GGUF file"),
    "a key that overflows": (overwritten(24, "Q", 2**64 - 1), "cut short"),
    "a text that overflows": (of_value(8, struct.pack("<Q", 2**63)), "cut short"),
    "a list that overflows": (of_value(9, struct.pack("<IQ", 8, 2**61)), "cut short"),
    "numbers that overflow": (of_value(9, struct.pack("<IQ", 4, 2**62)), "cut short"),
    "a list of lists": (of_value(9, struct.pack("<IQIQ", 9, 1, 9, 1)), "unknown kind 9"),
    "a value of no kind": (of_value(99, b""), "unknown kind 99"),
    "a text that is none": (of_value(8, struct.pack("<Q", 2) + b"\xff\xfe"), "header is damaged"),
    "a key twice": (lambda data: data.replace(b"bos_token_id", b"eos_token_id"), "eos_token_id' twice"),
    "a tensor twice": (lambda data: data.replace(b"blk.0.ffn_up.weight", UP), "'blk.1.ffn_up.weight' twice"),
    "no dimensions": (at_tensor(0, "I", 0), "0 dimensions"),
    "many dimensions": (at_tensor(0, "I", 2**31), "2147483648 dimensions"),
    "a dimension of none": (at_tensor(4, "Q", 0), "shape (96, 0)"),
    "a dimension that overflows": (at_tensor(12, "Q", 2**63), "cut short"),
    "no multiple of the block": (at_tensor(20, "I", int(Types.Q6_K)), "which that type does not allow"),
    "an unknown type": (at_tensor(20, "I", 250), "blk.1.ffn_up.weight is type 250"),
    "offset beyond the file": (at_tensor(24, "Q", 2**40), "cut short"),
    "offset that overflows": (at_tensor(24, "Q", 2**64 - 32), "cut short"),
    "offset on another tensor": (at_tensor(24, "Q", 0), "lies on"),
    "offset between": (at_tensor(24, "Q", 1), "lies on"),
    "half": (lambda data: data[: len(data) // 2], "cut short"),
    "the last byte": (lambda data: data.rstrip(b"\0")[:-64], "cut short"),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes(name: str, model: Path, tmp_path: Path, kvp: Kvp) -> None:
    change, named = BYTES[name]
    source, out = tmp_path / "m.gguf", tmp_path / "out"
    write_file(source, model)
    source.write_bytes(change(source.read_bytes()))
    outcome = kvp("convert", "gguf", source, "--out", out)
    assert_refused(outcome, out, named)
    assert "m.gguf" in outcome.err


@pytest.mark.parametrize("alignment", [0, 3, -32])
def test_alignment(alignment: int, model: Path, tmp_path: Path, kvp: Kvp) -> None:
    write_file(tmp_path / "m.gguf", model, **{"general.alignment": 32})
    data, key = (tmp_path / "m.gguf").read_bytes(), b"general.alignment"
    at = data.index(key) + len(key) + 4
    (tmp_path / "m.gguf").write_bytes(data[:at] + struct.pack("<i", alignment) + data[at + 4 :])
    out = tmp_path / "out"
    assert_refused(kvp("convert", "gguf", tmp_path / "m.gguf", "--out", out), out, "general.alignment")


@pytest.mark.parametrize("what", ["missing", "folder", "pipe"])
def test_what_is_no_file(what: str, tmp_path: Path, kvp: Kvp) -> None:
    import os

    source, out = tmp_path / "m.gguf", tmp_path / "out"
    if what == "folder":
        source.mkdir()
    elif what == "pipe":
        os.mkfifo(source)
    assert_refused(kvp("convert", "gguf", source, "--out", out), out, "m.gguf is not a file")


@pytest.mark.parametrize("seed", range(60))
def test_fuzzed_headers(seed: int, model: Path, tmp_path: Path, kvp: Kvp) -> None:
    """A few bytes changed anywhere in the header: refused in one line or, where they hit a name or a number, whole."""
    rng = random.Random(seed)
    write_file(tmp_path / "m.gguf", model)
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    end = data.rindex(b"blk.") + 60
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(end)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    (tmp_path / "m.gguf").write_bytes(data)
    out = tmp_path / "out"
    outcome = kvp("convert", "gguf", tmp_path / "m.gguf", "--out", out)
    if outcome.code:
        assert_refused(outcome, out, "")
    else:
        assert (out / "model.safetensors").exists()
