"""GGUF files in parts."""

from pathlib import Path

import numpy as np
import pytest
from conftest import Kvp
from support.directories import write_random
from support.gguf_files import Types, write_file
from support.gguf_models import TINY, converted, logits, refused


def split(folder: Path, model: Path, parts: int = 3) -> list[Path]:
    """Write a split file, as llama-gguf-split does: all metadata in the first part."""
    files = [folder / f"m-{number:05d}-of-{parts:05d}.gguf" for number in range(1, parts + 1)]
    for number, file in enumerate(files):
        stated = {"split.no": number, "split.count": parts, "split.tensors.count": 20}
        write_file(file, model, Types.F32, only=lambda name, number=number: part_of(name) == number, **stated)
    return files


def part_of(name: str) -> int:
    return 1 + int(name.split(".")[1]) if name.startswith("blk.") else 0


@pytest.fixture
def two_layers(tmp_path: Path) -> Path:
    return write_random(tmp_path / "model", TINY)


def test_parts_that_llama_cpp_merged_are_one_file(two_layers: Path, tmp_path: Path, kvp: Kvp) -> None:
    """llama-gguf-split --merge leaves what it knew of the parts, with a count of 0."""
    stated = {"split.no": 0, "split.count": 0, "split.tensors.count": 20}
    write_file(tmp_path / "m.gguf", two_layers, Types.F32, **stated)
    np.testing.assert_allclose(logits(converted(kvp, tmp_path / "m.gguf")), logits(two_layers), atol=1e-4, rtol=0)


@pytest.mark.parametrize("named", [0, 2])
def test_split_files_are_read_as_one(named: int, two_layers: Path, tmp_path: Path, kvp: Kvp) -> None:
    files = split(tmp_path, two_layers)
    out = tmp_path / "out"
    outcome = kvp("convert", "gguf", files[named], "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    assert sorted(outcome.json()["source_sha256"]) == [file.name for file in files]
    np.testing.assert_allclose(logits(out), logits(two_layers), atol=1e-4, rtol=0)


def test_half_a_split_file(two_layers: Path, tmp_path: Path, kvp: Kvp) -> None:
    files = split(tmp_path, two_layers)
    hidden = files[1].rename(tmp_path / "elsewhere.gguf")
    refused(kvp, files[0], "m-00002-of-00003.gguf is missing")
    hidden.rename(files[1])
    whole = files[0].read_bytes()
    renamed = files[0].rename(tmp_path / "first.gguf")
    refused(kvp, renamed, "-00001-of-00003.gguf")
    files[0].write_bytes(files[1].read_bytes())
    refused(kvp, files[2], "another part")
    files[0].write_bytes(whole[: len(whole) // 2])
    refused(kvp, files[2], "m-00001-of-00003.gguf is not a whole GGUF file (it is cut short")


def test_parts_of_different_files(two_layers: Path, tmp_path: Path, kvp: Kvp) -> None:
    files = split(tmp_path, two_layers)
    stated = {"split.no": 2, "split.count": 3}
    write_file(files[2], two_layers, Types.F32, only=lambda name: part_of(name) in (0, 2), **stated)
    refused(kvp, files[0], "output_norm.weight, as another part")


def test_big_endian_is_named(two_layers: Path, tmp_path: Path, kvp: Kvp) -> None:
    write_file(tmp_path / "m.gguf", two_layers, Types.F32, big_endian=True)
    refused(kvp, tmp_path / "m.gguf", "big-endian")
