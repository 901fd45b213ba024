"""Llama's tokenizer.model becomes a tokeniser that says the same as SentencePiece, and mlx-lm generates with it."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Kvp
from mlx_lm.utils import load
from sentencepiece import SentencePieceProcessor
from support import corenet
from support.corenet import PIECES, train_llama_tokenizer
from support.directories import TEXT, write_llama

ALPHABET = "abc dé  \n\t.,12345éü好🙂'\"-ABC the and  in"
SHAPE = corenet.Shape(64, 64, [(2, 1, 64), (2, 2, 32)], vocabulary=PIECES)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_llama_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return corenet.save(corenet.openelm(SHAPE), tmp_path / "c.pt")


def test_encodes_and_decodes_as_sentencepiece(llama: Path, source: Path, tmp_path: Path, kvp: Kvp) -> None:
    outcome = kvp("convert", "openelm", source, "--out", tmp_path / "out", "--tokenizer", llama)
    assert outcome.code == 0, outcome.err
    original, found = SentencePieceProcessor(model_file=str(llama)), load(str(tmp_path / "out"))[1]
    rng = random.Random(0)
    texts = [TEXT, "", " ", "  x", "x  ", "\n", "12 345"]
    texts += ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 40))) for _ in range(500)]
    for text in texts:
        ids = original.encode(text)
        assert found.encode(text) == [original.bos_id(), *ids], repr(text)
        assert found.decode(ids) == original.decode(ids), repr(text)
    assert (found.bos_token_id, found.eos_token_id) == (1, 2)
    assert found.encode("</s>", add_special_tokens=False) == [2]


def test_streams_as_it_decodes(llama: Path, source: Path, tmp_path: Path, kvp: Kvp) -> None:
    kvp("convert", "openelm", source, "--out", tmp_path / "out", "--tokenizer", llama)
    tokenizer = load(str(tmp_path / "out"))[1]
    text, detokenizer = "The lamp: 好🙂 été, 12.", tokenizer.detokenizer
    for token in tokenizer.encode(text, add_special_tokens=False):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == text


def test_plain_mlx_lm_generates(llama: Path, source: Path, tmp_path: Path, kvp: Kvp) -> None:
    kvp("convert", "openelm", source, "--out", tmp_path / "out", "--tokenizer", llama)
    command = [
        "-m",
        "mlx_lm",
        "generate",
        "--model",
        str(tmp_path / "out"),
        "--prompt",
        "The lamp",
        "--max-tokens",
        "3",
    ]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Generation: 3 tokens" in result.stdout


def test_bundle_answers(llama: Path, tmp_path: Path, kvp: Kvp) -> None:
    source = corenet.save(corenet.kv_prediction(SHAPE, SHAPE, [0, 1]), tmp_path / "c.pt")
    out = tmp_path / "out"
    kvp("convert", "kvp", source, "--layer-map", "0,1", "--out", out, "--tokenizer", llama, "--q-bits", 8)
    outcome = kvp("generate", TEXT, "--model", out, "--prefill", "kvp", "--max-tokens", 3, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json()["prefill"] == "kvp"
    assert kvp("info", out, "--json").json()["training"]["method"] == "converted"


def test_directories_with_either_kind(llama: Path, source: Path, tmp_path: Path, kvp: Kvp) -> None:
    (tmp_path / "spm").mkdir()
    shutil.copy(llama, tmp_path / "spm")
    fast = write_llama(tmp_path / "fast")
    for directory, text in ((tmp_path / "spm", "in the"), (fast, "in the")):
        out = tmp_path / f"out-{directory.name}"
        assert kvp("convert", "openelm", source, "--out", out, "--tokenizer", directory).code == 0
        tokenizer = load(str(out))[1]
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert (tmp_path / "out-fast" / "tokenizer.json").read_bytes() == (fast / "tokenizer.json").read_bytes()


def test_what_cannot_be_used_is_refused(llama: Path, tmp_path: Path, kvp: Kvp) -> None:
    source = corenet.save(corenet.openelm(SHAPE), tmp_path / "c.pt")
    small = corenet.save(corenet.openelm(corenet.BASE), tmp_path / "small.pt")
    (tmp_path / "other").mkdir()
    other = train_llama_tokenizer(tmp_path / "other", normalization_rule_name="nmt_nfkc_cf")
    garbage = tmp_path / "garbage.model"
    garbage.write_bytes(b"\x00\x01garbage")
    (tmp_path / "empty").mkdir()
    for checkpoint, tokenizer, named in (
        (small, llama, f"{PIECES} tokens, the model only {corenet.VOCABULARY}"),
        (source, other, "other rules"),
        (source, garbage, "not a SentencePiece model"),
        (source, tmp_path / "empty", "no tokeniser"),
    ):
        outcome = kvp("convert", "openelm", checkpoint, "--out", tmp_path / "out", "--tokenizer", tokenizer)
        assert outcome.code == 2
        assert named in outcome.err
        assert outcome.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
