"""``kvp train``: same seed same losses, killed and resumed, over processes, and every bad input named."""

import gzip
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Kvp
from mlx.utils import tree_flatten
from support.directories import TEXT, prose
from support.tiny import chat_tokenizer, llama, paired, prefixed

import kvp_mlx
from kvp_mlx.bundle import KVPModel
from kvp_mlx.errors import InputError
from kvp_mlx.evaluate.context import ContextMeasurement
from kvp_mlx.train.fit import FitOptions, fit_bundle
from kvp_mlx.train.loop import WARM_UP_STEPS, Trained, TrainOptions, schedule, take_step
from kvp_mlx.train.memory import training_bytes
from kvp_mlx.train.objectives import Weights
from kvp_mlx.train.text import bucketed, data_files, token_windows
from kvp_mlx.train.train import endless_windows, hold_back, train_bundle

STEADY = """
import sys
import kvp_mlx, kvp_mlx.train.loop as loop
loop.STATE_EVERY_SECONDS = 0.0
from kvp_mlx.cli.main import main
sys.argv = ["kvp", *sys.argv[1:]]
main()
"""
"""The command, with the state saved after every step in place of every minute."""


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two files without a repetition."""
    folder = tmp_path_factory.mktemp("texts")
    for name, seed in (("a.txt", 1), ("b.txt", 2)):
        (folder / name).write_text(prose(2500, seed))
    return folder


@pytest.fixture(scope="session")
def starts(base_dir: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A ridge bundle of each kind to start from."""
    kinds = {"prefix": {"layers": 1}, "pruned": {"prune": 0.5}}
    out = tmp_path_factory.mktemp("starts")
    for name, kind in kinds.items():
        fit_bundle(str(base_dir), [str(texts)], out / name, FitOptions(tokens=256, window=64, **kind))
    return {name: out / name for name in kinds}


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (training(out) / "log.jsonl").read_text().splitlines()]


def steps_of(out: Path) -> list[dict[str, Any]]:
    """The log's steps, without what the clock says."""
    clock = ("minutes", "tokens_per_second")
    return [{k: v for k, v in entry.items() if k not in clock} for entry in log_of(out) if "loss" in entry]


def training(out: Path) -> Path:
    return out.with_name(f"{out.name}.training")


def state_of(out: Path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in mx.load(str(training(out) / "state.safetensors")).items()}


def assert_same_state(one: Path, other: Path) -> None:
    one_state, other_state = state_of(one), state_of(other)
    assert one_state.keys() == other_state.keys()
    assert [name for name, array in one_state.items() if not np.array_equal(array, other_state[name])] == []


def args(start: Path, base: Path, data: Path, *more: object) -> tuple:
    return ("train", base, "--start", start, "--data", data, "--window", 64, "--right", 16, *more)


def wait_until(happened: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# --- repeatable, killed, resumed -------------------------------------------------------------------------------------


def test_same_seed_same_losses(starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        common = args(starts["prefix"], base_dir, texts, "--tokens", 64 * 8, "--seed", seed)
        outcome = kvp(*common, "--out", tmp_path / name, "--json")
        assert outcome.code == 0, outcome.err
    a, b, c = (steps_of(tmp_path / name) for name in "abc")
    assert len(a) == 8
    assert a[-1]["tokens"] == 64 * 8
    assert a == b
    assert [step["loss"] for step in a] != [step["loss"] for step in c]
    assert_same_state(tmp_path / "a", tmp_path / "b")
    weights = [(tmp_path / name / "predictor.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1]


KILLED = {
    "prefix": ("prefix", ()),
    "prefix with updates": ("prefix", ("--lora-rank", 2)),
    "pruned, all of it, the paper's losses": (
        "pruned",
        ("--train-auxiliary", "--objective", "paper", "--no-pack", "--batch-size", 2),
    ),
    "pruned with updates": ("pruned", ("--lora-rank", 2, "--batch-size", 2, "--accumulate", 2)),
}


@pytest.mark.parametrize("name", KILLED)
def test_killed_and_resumed_is_never_interrupted(
    name: str, starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp
) -> None:
    """SIGKILL in the middle, while state and bundle are written after every step."""
    kind, options = KILLED[name]
    steps = 24
    size = 64 * (4 if "--accumulate" in options else 2 if "--batch-size" in options else 1)
    common = args(starts[kind], base_dir, texts, *options, "--tokens", steps * size, "--learning-rate", 3e-3)
    common = (*common, "--validate-every", 0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    outcome = kvp(*common, "--out", whole)
    assert outcome.code == 0, outcome.err

    command = [sys.executable, "-c", STEADY, *map(str, common), "--out", str(killed)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    log, state = training(killed) / "log.jsonl", training(killed) / "state.safetensors"
    wait_until(lambda: lines(log) >= 10 and state.exists(), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(steps_of(killed)) < steps
    kvp_mlx.load(str(killed))  # whole, whenever the kill came

    outcome = kvp(*common, "--out", killed, "--resume", "--json")
    assert outcome.code == 0, outcome.err
    assert steps_of(killed) == steps_of(whole)
    assert_same_state(killed, whole)
    for file in ("predictor.safetensors", "adapter.safetensors", "auxiliary/model.safetensors"):
        assert (killed / file).exists() == (whole / file).exists()
        if (whole / file).exists():
            assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    records = [json.loads((out / "kvp.json").read_text())["training"] for out in (whole, killed)]
    assert records[0]["start"] == records[1]["start"]
    assert records[0]["validation"]["step"] == records[1]["validation"]["step"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "killed.training", "whole", "whole.training"]


def test_killed_at_any_moment_leaves_a_whole_bundle_or_none(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path
) -> None:
    out, rng = tmp_path / "out", random.Random(0)
    common = args(starts["prefix"], base_dir, texts, "--tokens", 10**6, "--validate-every", 0, "--force", "--out", out)
    for number in range(3):
        process = subprocess.Popen([sys.executable, "-c", STEADY, *map(str, common)], stderr=subprocess.PIPE)
        seen = (training(out) / "log.jsonl").stat().st_mtime_ns if number else 0
        wait_until(
            lambda seen=seen: (
                lines(training(out) / "log.jsonl") > 0 and (training(out) / "log.jsonl").stat().st_mtime_ns > seen
            ),
            process,
        )
        time.sleep(0.2 * rng.random())
        process.kill()
        process.wait()
        if out.exists():
            model = kvp_mlx.load(str(out))
            assert np.isfinite(model.config.training["validation"]["recovery"])
        if (training(out) / "state.safetensors").exists():
            assert state_of(out)


@pytest.fixture(scope="module")
def finished(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run of a few steps and the folder of its data; do not change either."""
    out = tmp_path_factory.mktemp("finished") / "out"
    options = TrainOptions(minutes=None, tokens=64 * 4, window=64, right=16)
    train_bundle(str(starts["prefix"]), [str(texts)], out, options)
    return out, texts


@pytest.fixture
def run(finished: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    import shutil

    shutil.copytree(finished[0], tmp_path / "out")
    shutil.copytree(training(finished[0]), training(tmp_path / "out"))
    return tmp_path / "out"


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--learning-rate", 0.5), "learning_rate"),
        (("--seed", 3), "seed"),
        (("--batch-size", 2), "batch_size"),
        (("--base-weight", 1), "weights"),
        (("--tokens", 64 * 40), "tokens"),
        (("--no-pack",), "packed"),
        (("--lora-rank", 2), "lora"),
    ],
)
def test_resume_with_other_options_is_refused(
    options: tuple, named: str, run: Path, base_dir: Path, texts: Path, kvp: Kvp
) -> None:
    before = snapshot(run.parent)
    common = ("train", base_dir, "--data", texts, "--window", 64, "--right", 16, "--tokens", 64 * 4)
    outcome = kvp(*common, *options, "--out", run, "--resume")
    assert outcome.code == 2
    assert named in outcome.err
    assert outcome.err.count("\n") == 1
    assert snapshot(run.parent) == before


def test_resume_with_other_data_is_refused(run: Path, base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp) -> None:
    other = tmp_path / "other.txt"
    other.write_text(prose(3000, 9))
    common = ("train", base_dir, "--window", 64, "--right", 16, "--tokens", 64 * 4, "--out", run, "--resume")
    outcome = kvp(*common, "--data", other)
    assert outcome.code == 2
    assert "data" in outcome.err
    assert outcome.err.count("\n") == 1
    finished = kvp(*common, "--data", texts, "--json")
    assert finished.code == 0, finished.err
    assert finished.json()["step"] in {entry["step"] for entry in log_of(run) if "recovery" in entry}


@pytest.mark.parametrize("damage", ["cut short", "garbage", "empty", "another safetensors file", "one tensor less"])
def test_damaged_state_is_named(damage: str, run: Path, base_dir: Path, texts: Path, kvp: Kvp) -> None:
    state = training(run) / "state.safetensors"
    whole = state.read_bytes()
    if damage == "another safetensors file":
        mx.save_safetensors(str(state), {"x": mx.zeros(3)})
    elif damage == "one tensor less":
        arrays, metadata = mx.load(str(state), return_metadata=True)
        arrays.pop(next(name for name in arrays if name.startswith("weights")))
        mx.save_safetensors(str(state), arrays, metadata=metadata)
    else:
        state.write_bytes({"cut short": whole[: len(whole) // 2], "garbage": b"nonsense" * 100, "empty": b""}[damage])
    common = ("train", base_dir, "--data", texts, "--window", 64, "--right", 16, "--tokens", 64 * 4)
    outcome = kvp(*common, "--out", run, "--resume")
    assert outcome.code == 2
    assert "state.safetensors" in outcome.err
    assert outcome.err.count("\n") == 1
    kvp_mlx.load(str(run))


def test_resume_without_a_run_is_refused(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp
) -> None:
    common = ("train", base_dir, "--data", texts, "--window", 64, "--right", 16, "--tokens", 64 * 4, "--resume")
    outcome = kvp(*common, "--out", starts["prefix"])
    assert outcome.code == 2
    assert "--resume" in outcome.err
    assert not training(starts["prefix"]).exists()
    outcome = kvp(*common, "--out", tmp_path / "nothing")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bundle_is_there", [True, False])
def test_starting_over_an_unfinished_run_is_refused(
    bundle_is_there: bool, run: Path, starts: dict[str, Path], base_dir: Path, texts: Path, kvp: Kvp
) -> None:
    import shutil

    if not bundle_is_there:
        shutil.rmtree(run)
    before = snapshot(run.parent)
    common = args(starts["prefix"], base_dir, texts, "--tokens", 64 * 4, "--out", run)
    outcome = kvp(*common)
    assert outcome.code == 2
    assert "--resume" in outcome.err
    assert "--force" in outcome.err
    assert outcome.err.count("\n") == 1
    assert snapshot(run.parent) == before
    assert kvp(*common, "--force").code == 0


# --- over processes --------------------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_two_processes_are_one_with_twice_the_batches(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp
) -> None:
    options = ("--tokens", 64 * 12, "--base-weight", 0.1)
    alone, together = tmp_path / "alone", tmp_path / "together"
    outcome = kvp(*args(starts["prefix"], base_dir, texts, *options, "--accumulate", 2, "--out", alone))
    assert outcome.code == 0, outcome.err
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    command = args(starts["prefix"], base_dir, texts, *options, "--out", together)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "kvp_mlx", *map(str, command)],
            env=os.environ | {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err.decode()
    one, two = steps_of(alone), steps_of(together)
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        for name in ("loss", "continuation", "residual", "base"):
            assert b[name] == pytest.approx(a[name], rel=1e-4)
    one_state, two_state = state_of(alone), state_of(together)
    for name, array in one_state.items():
        np.testing.assert_allclose(two_state[name], array, rtol=1e-3, atol=1e-5, err_msg=name)
    assert json.loads((together / "kvp.json").read_text())["training"]["processes"] == 2


# --- what is written -------------------------------------------------------------------------------------------------


def test_training_improves_on_the_ridge_fit_and_says_so(base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp) -> None:
    out = tmp_path / "out"
    common = ("train", base_dir, "--layers", 1, "--data", texts, "--window", 64, "--right", 16, "--fit-tokens", 128)
    outcome = kvp(*common, "--tokens", 64 * 80, "--learning-rate", 5e-3, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    log = log_of(out)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    checks = [entry["recovery"] for entry in log if "recovery" in entry]
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:5])
    result = outcome.json()
    assert result["recovery"] == max(checks)
    record = json.loads((out / "kvp.json").read_text())["training"]
    assert record["method"] == "gradient"
    assert record["start"]["method"] == "ridge"
    assert record["data"] == ["a.txt", "b.txt"]
    assert record["tokens"] == 64 * 80
    assert record["validation"]["recovery"] == max(checks)
    assert kvp("generate", "Hello", "--model", out, "--max-tokens", 1).code == 0


def test_best_bundle_is_kept_not_the_last(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp
) -> None:
    """A rate so high that every step makes it worse: what was there before training stays."""
    out = tmp_path / "out"
    common = args(starts["prefix"], base_dir, texts, "--tokens", 64 * 6, "--learning-rate", 3, "--out", out)
    outcome = kvp(*common, "--validate-every", 0, "--json")
    assert outcome.code == 0, outcome.err
    checks = [entry for entry in log_of(out) if "recovery" in entry]
    assert checks[-1]["recovery"] < max(check["recovery"] for check in checks)
    best = max(checks, key=lambda check: check["recovery"])
    assert outcome.json()["step"] == best["step"]
    if best["step"] == 0:
        weights = [mx.load(str(place / "predictor.safetensors")) for place in (out, starts["prefix"])]
        assert all(mx.array_equal(weights[0][name], weights[1][name]).item() for name in weights[0] if "maps" in name)


@pytest.mark.parametrize(
    ("start", "options"),
    [
        ("prefix", ()),
        ("prefix", ("--lora-rank", 2)),
        ("pruned", ("--train-auxiliary",)),
        ("pruned", ("--lora-rank", 2)),
    ],
)
def test_bundle_on_disk_predicts_what_training_had(
    start: str, options: tuple, starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp
) -> None:
    """The validation that training logged, measured again on the bundle that it wrote (fp16)."""
    out = tmp_path / "out"
    common = args(starts[start], base_dir, texts, *options, "--tokens", 64 * 30, "--learning-rate", 3e-3)
    base_files = {path.name: path.read_bytes() for path in base_dir.iterdir()}
    outcome = kvp(*common, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    best = outcome.json()
    model = kvp_mlx.load(str(out))
    windows = hold_back(data_files([texts]), model, TrainOptions(window=64)).values()
    again = ContextMeasurement(model, list(windows), 16).measure()["arms"]["kvp"]["recovery"]
    assert again == pytest.approx(best["recovery"], rel=0.02, abs=0.02)
    assert (out / "adapter.safetensors").exists() == (start == "prefix" and bool(options))
    assert base_files == {path.name: path.read_bytes() for path in base_dir.iterdir()}
    assert kvp("info", out, "--json").code == 0


@pytest.mark.parametrize("start", ["prefix", "pruned"])
def test_base_is_the_same_after_a_run(start: str, starts: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """In memory too: bytes of every parameter, before and after optimiser steps on all that can be trained."""
    from kvp_mlx.train.checkpoint import TrainingState
    from kvp_mlx.train.loop import make_optimizer
    from kvp_mlx.train.train import prepare

    how = {"lora_rank": 2} if start == "prefix" else {"train_auxiliary": True}
    weights = Weights(base=1, consistency=1, auxiliary=float(start == "pruned"))
    options = TrainOptions(minutes=None, tokens=64, window=64, right=16, weights=weights, learning_rate=0.1, **how)
    model = prepare(kvp_mlx.load(str(starts[start])), options)
    trained = Trained(model, options)
    before = {name: np.array(array) for name, array in tree_flatten(model.base.parameters())}
    moving = {name: np.array(array) for name, array in tree_flatten(trained.trainable_parameters())}
    optimizer = make_optimizer(options, trained)
    stream = iter([[list(range(i, i + 64))] for i in range(5)])
    for _ in range(3):
        take_step(model, trained, optimizer, stream, TrainingState(), options)
    after = {name: np.array(array) for name, array in tree_flatten(model.base.parameters())}
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    now = dict(tree_flatten(trained.trainable_parameters()))
    assert moving.keys() == now.keys()
    still = {name for name in moving if np.array_equal(moving[name], np.array(now[name]))}
    used_last = ("self_attn.k_proj", "self_attn.v_proj")
    assert {name for name in still if "layers.1." not in name or any(part in name for part in used_last)} == set()


def test_weight_decay_spares_vectors() -> None:
    """AdamW with no gradient at all: matrices shrink by rate times decay, vectors stay."""
    from kvp_mlx.train.loop import make_optimizer

    model, _ = prefixed(llama(), 1)
    options = TrainOptions(weight_decay=0.5, learning_rate=0.1)
    trained = Trained(model, options)
    before = {name: np.array(array) for name, array in tree_flatten(trained.parameters())}
    optimizer = make_optimizer(options, trained)
    optimizer.update(
        trained,
        {
            "predictor": {
                "maps": {
                    name: {part: mx.zeros_like(array) for part, array in one.items()}
                    for name, one in model.predictor.parameters()["maps"].items()
                }
            }
        },
    )
    for name, array in tree_flatten(trained.parameters()):
        factor = 0.95 if array.ndim > 1 else 1.0
        np.testing.assert_allclose(np.array(array), factor * before[name], rtol=1e-5)


def test_rate_warms_up_and_comes_down() -> None:
    warm = [schedule(step, 0.0) for step in range(WARM_UP_STEPS)]
    assert warm[0] <= 0.05
    assert np.allclose(np.diff(warm), np.diff(warm)[0])
    assert warm[-1] == pytest.approx(1)
    cosine = [schedule(10**6, share / 100) for share in range(101)]
    assert cosine == sorted(cosine, reverse=True)
    assert (cosine[0], cosine[50], cosine[100]) == pytest.approx((1, 0.55, 0.1))


def test_loss_picture(run: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    picture = training(run) / "loss.png"
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[1] > 800
    assert (pixels < 100).sum() > 500


def test_no_matplotlib_no_picture_no_error(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "out"
    outcome = kvp(*args(starts["prefix"], base_dir, texts, "--tokens", 64 * 2, "--out", out))
    assert outcome.code == 0, outcome.err
    assert not list(training(out).glob("*.png"))
    assert len(steps_of(out)) == 2


# --- numbers that are none -------------------------------------------------------------------------------------------


def test_absurd_rate_stops_and_keeps_the_last_good_bundle(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp
) -> None:
    out = tmp_path / "out"
    outcome = kvp(*args(starts["prefix"], base_dir, texts, "--tokens", 6400, "--learning-rate", 1e30, "--out", out))
    assert outcome.code == 1
    assert "not a number" in outcome.err
    assert "--learning-rate" in outcome.err
    assert outcome.err.count("\n") == 1
    model = kvp_mlx.load(str(out))
    assert np.isfinite(model.config.training["validation"]["recovery"])
    assert kvp("generate", "Hello", "--model", out, "--max-tokens", 1).code == 0


def test_loss_that_is_no_number_from_the_first_step_on(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp
) -> None:
    common = args(starts["prefix"], base_dir, texts, "--tokens", 6400, "--residual-weight", 1e38)
    outcome = kvp(*common, "--continuation-weight", 1e38, "--out", tmp_path / "out")
    assert outcome.code == 1
    assert "not a number" in outcome.err
    assert outcome.err.count("\n") == 1
    kvp_mlx.load(str(tmp_path / "out"))


# --- data ------------------------------------------------------------------------------------------------------------


def numbers(count: int, first: int = 0) -> str:
    """Text in which every word stands once, so that a stretch of it tells where it was."""
    return " ".join(str(10**6 + i) for i in range(first, first + count))


def test_packed_windows_have_exactly_the_length_and_lose_nothing(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    names = [f"w{i}" for i in range(90)]
    file = tmp_path / "a.jsonl"
    documents = [" ".join(names[i : i + 10]) for i in range(0, 80, 10)]
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    windows = list(token_windows([file], tokenizer, 33, 0, packed=True))
    assert {len(window) for window in windows} == {33}
    flat = [token for window in windows for token in window]
    end = tokenizer.eos_token_id
    pieces = " ".join(tokenizer.decode([token]) if token != end else "|" for token in flat).split(" | ")
    assert set(pieces[:-1]) <= set(documents)
    assert any(documents[i].startswith(pieces[-1].removesuffix(" |")) for i in range(8))
    assert len(windows) == 8 * 11 // 33
    assert list(token_windows([file], tokenizer, 33, 1, packed=True)) != windows


def test_bucketed_batches_hold_windows_of_about_the_same_length() -> None:
    rng = random.Random(0)
    windows = [[i] * rng.randint(32, 512) for i in range(4 * 16 * 5 + 3)]
    batches = list(bucketed(iter(windows), 4, seed=0))
    assert sorted(window[0] for batch in batches for window in batch) == list(range(len(windows)))
    padded = [1 - sum(map(len, batch)) / (len(batch) * max(map(len, batch))) for batch in batches]
    plain = [windows[start : start + 4] for start in range(0, len(windows), 4)]
    as_they_come = [1 - sum(map(len, batch)) / (len(batch) * max(map(len, batch))) for batch in plain]
    assert np.mean(padded) < 0.25 * np.mean(as_they_come)
    lengths = [len(batch[0]) for batch in batches[:16]]
    assert lengths != sorted(lengths)
    assert list(bucketed(iter(windows), 4, seed=0)) == batches
    assert list(bucketed(iter(windows[:3]), 1, seed=0)) == [[window] for window in windows[:3]]


def test_place_named_twice_counts_twice_in_another_order(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    (tmp_path / "a.txt").write_text(" ".join(f"w{i % 92}" for i in range(4000)))
    once, twice = data_files([tmp_path / "a.txt"]), data_files([tmp_path / "a.txt", tmp_path / "a.txt"])
    alone = list(token_windows(once, tokenizer, 64, 0))
    both = list(token_windows(twice, tokenizer, 64, 0))
    assert len(both) == 2 * len(alone)
    first, second = both[::2], both[1::2]
    assert first == alone
    assert sorted(second) == sorted(first)
    assert second != first


def test_folders_and_patterns_are_expanded(tmp_path: Path) -> None:
    for name in ("x/a.txt", "x/y/b.jsonl.gz", "x/y/c.md", "x/ignored.bin", "z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    assert [path.name for path in data_files([tmp_path / "x"])] == ["a.txt", "b.jsonl.gz", "c.md"]
    assert [path.name for path in data_files([tmp_path / "**" / "*.txt"])] == ["a.txt", "z.txt"]
    assert [path.name for path in data_files([str(tmp_path / "*.txt"), str(tmp_path / "x" / "*.txt")])] == [
        "z.txt",
        "a.txt",
    ]
    with pytest.raises(InputError, match=r"ignored\.bin"):
        data_files([tmp_path / "x" / "*.bin"])


@pytest.mark.parametrize("packed", [True, False])
def test_held_back_text_is_never_trained_on(packed: bool, starts: dict[str, Path], tmp_path: Path) -> None:
    """Not a stretch of it, in whatever window, over three passes; all the rest is."""
    for name, first in (("a.txt", 0), ("b.txt", 10**5)):
        (tmp_path / name).write_text(numbers(1200, first))
    model = kvp_mlx.load(str(starts["prefix"]))
    files = data_files([tmp_path])
    options = TrainOptions(minutes=None, tokens=1, window=64, packed=packed)
    held_back = hold_back(files, model, options)
    assert len(held_back) >= 4
    windows = held_back.values()
    words = [set(re.findall(r"\b1\d{6}\b", model.text_tokenizer.decode(window))) for window in windows]
    secret = set.union(*words)
    per_pass = 2 * 1200 * 8 // 64
    windows = list(itertools.islice(endless_windows(files, model, options, held_back), 3 * per_pass))
    text = [set(re.findall(r"\b1\d{6}\b", model.text_tokenizer.decode(window))) for window in windows]
    seen = set.union(*text)
    assert secret & seen == set()
    assert len(seen) > 1800


def test_chat_turns_and_text_are_read(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    turns = [{"role": "user", "content": "w1 " * 30}, {"role": "assistant", "content": "w2 " * 30}]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"messages": turns}).encode()))
    (window,) = token_windows(data_files([tmp_path]), tokenizer, 200, 0)
    expected = ["<user>", *["w1"] * 30, "<end>", "<assistant>", *["w2"] * 30, "<end>"]
    assert tokenizer.decode(window).split() == expected


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


BAD_DATA = {
    "missing": (lambda d: d / "no.txt", "does not exist"),
    "pattern of nothing": (lambda d: d / "*.txt", "does not exist"),
    "wrong suffix": (lambda d: write(d / "a.pdf", b"%PDF"), "a.pdf"),
    "empty folder": (lambda d: d, "no .txt"),
    "not gzip": (lambda d: write(d / "a.txt.gz", TEXT * 20), "a.txt.gz"),
    "gzip cut short": (lambda d: write(d / "a.txt.gz", gzip.compress(prose(3000, 0).encode())[:-40]), "a.txt.gz"),
    "not JSON": (lambda d: write(d / "a.jsonl", '{"text": "' + prose(3000, 0) + '"}\nnonsense\n'), "line 2"),
    "not UTF-8": (lambda d: write(d / "a.txt", b"caf\xe9 " * 5000), "UTF-8"),
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
    ],
)
def test_bad_options_are_named(
    options: tuple, named: str, starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp
) -> None:
    budget = () if {"--tokens", "--minutes"} & set(options) else ("--tokens", 128)
    common = args(starts["prefix"], base_dir, texts, *budget)
    outcome = kvp(*common, *options, "--out", tmp_path / "out")
    assert outcome.code == 2, outcome.err
    assert named in outcome.err
    assert outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_prefix_with_nothing_to_predict_is_refused(base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp) -> None:
    """All layers but the last: every entry is exact, there are no maps to train."""
    common = ("train", base_dir, "--layers", 3, "--data", texts, "--window", 64, "--right", 16, "--tokens", 128)
    outcome = kvp(*common, "--fit-tokens", 64, "--out", tmp_path / "out")
    assert outcome.code == 2, outcome.err
    assert outcome.err.count("\n") == 1


# --- memory ----------------------------------------------------------------------------------------------------------


def test_too_little_memory_is_said_before_training(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvp_mlx.train.memory.free_bytes", lambda: 10_000)
    outcome = kvp(*args(starts["prefix"], base_dir, texts, "--tokens", 640, "--out", tmp_path / "out"))
    assert outcome.code == 2
    assert all(flag in outcome.err for flag in ("--window", "--right", "--batch-size", "--checkpoint"))
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "vocab_size": 2000}


def wide_prefix() -> KVPModel:
    return prefixed(llama(**WIDE), 2)[0]


def wide_model() -> KVPModel:
    base = llama(**WIDE)
    return paired(base, llama(3, **WIDE | {"num_hidden_layers": 4}), [(i // 2,) for i in range(8)])[0]


MEMORY: dict[str, tuple[Callable[[], KVPModel], dict[str, Any]]] = {
    "prefix": (wide_prefix, {}),
    "prefix, batch of 4": (wide_prefix, {"batch_size": 4}),
    "prefix, long": (wide_prefix, {"window": 1024}),
    "prefix, long right part": (wide_prefix, {"window": 512, "right": 256}),
    "prefix, long right part, checkpoint": (wide_prefix, {"window": 512, "right": 256, "checkpoint": True}),
    "prefix, the paper's losses": (wide_prefix, {"weights": Weights(base=1, consistency=1)}),
    "model": (wide_model, {}),
    "model, all of it": (wide_model, {"train_auxiliary": True}),
    "model, all of it, the paper's losses": (
        wide_model,
        {"train_auxiliary": True, "weights": Weights(continuation=0, base=1, auxiliary=1, consistency=1)},
    ),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_estimate_is_near_the_peak(name: str) -> None:
    from kvp_mlx.train.checkpoint import TrainingState
    from kvp_mlx.train.loop import make_optimizer

    make, changes = MEMORY[name]
    options = TrainOptions(minutes=None, tokens=1, **({"window": 256} | changes))
    model = make()
    mx.eval(model.base.parameters(), model.auxiliary.parameters(), model.predictor.parameters())
    trained = Trained(model, options)
    estimate = training_bytes(model, trained, options)
    rng = np.random.default_rng(0)
    stream = iter([rng.integers(0, 2000, (options.batch_size, options.window)).tolist() for _ in range(2)])
    mx.clear_cache()
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    optimizer = make_optimizer(options, trained)
    for _ in range(2):
        take_step(model, trained, optimizer, stream, TrainingState(), options)
    peak = mx.get_peak_memory() - start
    print(f"{name}: estimate {estimate / 2**20:.1f} MiB, peak {peak / 2**20:.1f} MiB")
    assert peak / 3 < estimate < 3 * peak
