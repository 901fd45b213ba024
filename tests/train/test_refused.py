"""``kvp train`` names bad data, bad options and too little memory in one line, and leaves nothing behind."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import Kvp
from mlx.utils import tree_flatten
from support.directories import TEXT, prose, write_llama
from support.training import train_args

import kvp_mlx
from kvp_mlx.errors import InputError, KVPError
from kvp_mlx.train import run
from kvp_mlx.train.fit import write_float16


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def folder_of_no_name(place: Path) -> Path:
    folder = place / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    return write(folder / "a.txt", prose(3000, 0))


BAD_DATA = {
    "missing": (lambda d: d / "no.txt", "does not exist"),
    "pattern of nothing": (lambda d: d / "*.txt", "does not exist"),
    "wrong suffix": (lambda d: write(d / "a.pdf", b"%PDF"), "a.pdf"),
    "empty folder": (lambda d: d, "no .txt"),
    "not gzip": (lambda d: write(d / "a.txt.gz", TEXT * 20), "a.txt.gz"),
    "gzip cut short": (lambda d: write(d / "a.txt.gz", gzip.compress(prose(3000, 0).encode())[:-40]), "a.txt.gz"),
    "not JSON": (lambda d: write(d / "a.jsonl", '{"text": "' + prose(3000, 0) + '"}\nnonsense\n'), "line 2"),
    "not UTF-8": (lambda d: write(d / "a.txt", b"caf\xe9 " * 5000), "UTF-8"),
    "name not UTF-8": (lambda d: write(d / os.fsdecode(b"caf\xe9.txt"), prose(3000, 0)).parent, "is not UTF-8; rename"),
    "folder not UTF-8": (folder_of_no_name, "is not UTF-8; rename"),
    "too little": (lambda d: write(d / "a.txt", prose(60, 0)), "--data"),
    "empty": (lambda d: write(d / "a.txt", ""), "0 passages of 64 tokens"),
    "dataset of no such name": (lambda d: "hub:not a name", "not a name"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_one_line_and_nothing_is_left(
    name: str, starts: dict[str, Path], base_dir: Path, tmp_path: Path, kvp: Kvp
) -> None:
    make, named = BAD_DATA[name]
    data = tmp_path / "data"
    data.mkdir()
    common = ("train", base_dir, "--start", starts["prefix"], "--window", 64, "--right", 16, "--tokens", 6400)
    outcome = kvp(*common, "--data", make(data), "--out", tmp_path / "out")
    assert outcome.code == 2, outcome.err
    assert named in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_dataset_without_network_is_one_line(tmp_path: Path) -> None:
    """Offline, as huggingface_hub reads it at import: a process of its own."""
    code = "import sys; sys.argv[0] = 'kvp'; from kvp_mlx.cli.main import main; main()"
    command = [sys.executable, "-c", code, "train", "nowhere/at-all", "--layers", "1", "--data", "hub:nobody/nothing"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "nobody/nothing" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--window", 16), "--window"),
        (("--tokens", 640, "--minutes", 1), "--tokens"),
        (("--learning-rate", 0), "--learning-rate"),
        (("--learning-rate", "nan"), "--learning-rate"),
        (("--batch-size", 0), "--batch-size"),
        (("--splits", 0), "--splits"),
        (("--recompute", 1), "--recompute"),
        (("--recompute", "nan"), "--recompute"),
        (("--right", -3), "--right"),
        (("--lora-rank", 0), "--lora-rank"),
        (("--accumulate", 0), "--accumulate"),
        (("--minutes", -1), "--minutes"),
        (("--auxiliary-weight", 1), "--auxiliary-weight"),
        (("--train-auxiliary",), "--lora-rank"),
        (("--continuation-weight", 0), "weight 0"),
        (("--base-weight", -1), "negative"),
        (("--base-weight", "nan"), "weight"),
        (("--weight-decay", "nan"), "--weight-decay"),
        (("--weight-decay", -1), "--weight-decay"),
        (("--validate-every", "nan"), "--validate-every"),
        (("--lora-rank", 2, "--train-auxiliary"), "--train-auxiliary"),
        (("--start", "/nowhere"), "nowhere"),
        (("--seed", -1), "--seed"),
        (("--seed", 2**70), "--seed"),
        (("--window", 2**70), "--window"),
        (("--tokens", 0), "--tokens"),
        (("--tokens", 2**70), "--tokens"),
        (("--minutes", "nan"), "--minutes"),
        (("--minutes", "inf"), "--minutes"),
        (("--lora-rank", -1), "--lora-rank"),
        (("--fit-tokens", 0), "--fit-tokens"),
        (("--layers", 2), "to which --layers 2 does not fit"),
        (("--prune", 0.5), "to which --prune 0.5 does not fit"),
        (("--auxiliary", "x"), "to which --auxiliary x does not fit"),
        (("--preceding", 3), "to which --preceding 3 does not fit"),
        (("--lora-rank", 2**31), "--lora-rank"),
    ],
)
def test_bad_options_are_named(
    options: tuple, named: str, starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp
) -> None:
    budget = () if {"--tokens", "--minutes"} & set(options) else ("--tokens", 128)
    outcome = kvp(*train_args(starts["prefix"], base_dir, texts, *budget, *options, "--out", tmp_path / "out"))
    assert outcome.code == 2, outcome.err
    assert named in outcome.err
    assert outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_another_base_than_the_starts_is_refused(
    starts: dict[str, Path], texts: Path, tmp_path: Path, kvp: Kvp
) -> None:
    other = write_llama(tmp_path / "other", seed=9)
    args = train_args(starts["prefix"], other, texts, "--tokens", 128, "--out", tmp_path / "out")
    outcome = kvp(*args)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert f"another base than {other}" in outcome.err
    assert not (tmp_path / "out").exists()


def test_what_is_named_twice_counts_once_in_what_is_held_back(
    starts: dict[str, Path], base_dir: Path, tmp_path: Path, kvp: Kvp
) -> None:
    data = write(tmp_path / "few.jsonl", "".join(json.dumps({"text": prose(90, seed)}) + "\n" for seed in range(8)))
    for seed in range(4):
        twice = train_args(starts["prefix"], base_dir, data, "--data", data, "--seed", seed, "--tokens", 64)
        outcome = kvp(*twice, "--out", tmp_path / f"out{seed}")
        assert outcome.code == 0, outcome.err


def test_prefix_with_nothing_to_predict_is_refused(base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp) -> None:
    """All layers but the last: every entry is exact, there are no maps to train."""
    common = ("train", base_dir, "--layers", 3, "--data", texts, "--window", 64, "--right", 16, "--tokens", 128)
    outcome = kvp(*common, "--fit-tokens", 64, "--out", tmp_path / "out")
    assert outcome.code == 2, outcome.err
    assert outcome.err.count("\n") == 1


def test_too_little_memory_is_named_before_training(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvp_mlx.train.capacity.free_bytes", lambda: 10_000)
    outcome = kvp(*train_args(starts["prefix"], base_dir, texts, "--tokens", 640, "--out", tmp_path / "out"))
    assert outcome.code == 2
    assert all(flag in outcome.err for flag in ("--window", "--right", "--batch-size", "--checkpoint"))
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_data_around_the_output_is_refused(starts: dict[str, Path], base_dir: Path, texts: Path, kvp: Kvp) -> None:
    """What a run writes would be read as text when it is resumed."""
    out = texts / "out"
    for command in (
        train_args(starts["prefix"], base_dir, texts, "--tokens", 640, "--out", out),
        ("fit", base_dir, "--layers", 1, "--data", texts, "--out", out),
    ):
        outcome = kvp(*command)
        assert (outcome.code, outcome.out) == (2, "")
        assert f"--out {out} lies in {texts}" in outcome.err
    assert not list(texts.glob("*out*"))


@pytest.mark.parametrize("out", [".", "..", "/", "./"])
@pytest.mark.parametrize("command", ["train", "fit"])
def test_the_folder_one_is_in_is_no_output(
    command: str, out: str, base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    outcome = kvp(command, base_dir, "--layers", 1, "--data", texts, "--out", out)
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert outcome.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def changed(base: Path, place: Path, change: Callable[[str, mx.array], mx.array]) -> Path:
    """Return a copy of a model with other weights."""
    shutil.copytree(base, place)
    weights = mx.load(str(place / "model.safetensors"))
    mx.save_safetensors(
        str(place / "model.safetensors"), {name: change(name, array) for name, array in weights.items()}
    )
    return place


BROKEN = {
    "a number that is none": (lambda name, x: x * mx.nan if "layers.3.mlp.up" in name else x, 2, "not finite"),
    "zeros": (lambda name, x: mx.zeros_like(x), 1, "does the base model work"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_base_that_does_not_work_is_said_not_to(
    name: str, base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp
) -> None:
    change, code, told = BROKEN[name]
    base = changed(base_dir, tmp_path / "base", change)
    outcome = kvp("fit", base, "--layers", 1, "--data", texts, "--tokens", 600, "--window", 64, "--out", tmp_path / "o")
    assert (outcome.code, outcome.out) == (code, ""), outcome.err
    assert told in outcome.err
    assert "please report" not in outcome.err
    assert not (tmp_path / "o").exists()


def test_maps_that_fp16_does_not_hold_stay_fp32(starts: dict[str, Path], tmp_path: Path) -> None:
    model = kvp_mlx.load(str(starts["prefix"]))
    arrays = dict(tree_flatten(model.predictor.parameters()))
    name = next(name for name in arrays if name.endswith("weight"))
    write_float16(arrays | {name: arrays[name].astype(mx.float32) + 1e5}, tmp_path / "predictor.safetensors")
    stored = mx.load(str(tmp_path / "predictor.safetensors"))
    assert stored[name].dtype == mx.float32
    assert mx.isfinite(stored[name]).all()
    assert {array.dtype for other, array in stored.items() if other != name} == {mx.float16}
    with pytest.raises(KVPError, match="not finite"):
        write_float16({name: arrays[name] * mx.inf}, tmp_path / "predictor.safetensors")


def test_a_picture_that_fails_hides_nothing(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise KVPError("the disk is full")

    def unwritable(*_: object) -> None:
        raise InputError("cannot write loss.png")

    monkeypatch.setattr(run, "write_trained", full)
    monkeypatch.setattr(run, "draw_training", unwritable)
    outcome = kvp(*train_args(starts["prefix"], base_dir, texts, "--tokens", 640), "--out", tmp_path / "out")
    assert outcome.code == 1
    assert "the disk is full" in outcome.err
