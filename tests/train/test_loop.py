"""``kvp train``: over processes, what it keeps in the end, and numbers that are none."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import Kvp
from mlx.utils import tree_flatten
from support.tiny import llama, prefixed
from support.training import log_of, state_of, steps_of, train_args, training

import kvp_mlx
from kvp_mlx.cli import output
from kvp_mlx.train.loop import (
    RELATIVE_RATE,
    WARM_UP_STEPS,
    Log,
    Trained,
    TrainOptions,
    keep_best,
    make_optimizer,
    schedule,
    take_step,
)
from kvp_mlx.train.objectives import Weights
from kvp_mlx.train.recovery import RecoveryMeasurement
from kvp_mlx.train.run import hold_back, make_trainable
from kvp_mlx.train.state import TrainingState, read_log
from kvp_mlx.train.text import data_files

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
    outcome = kvp(*train_args(starts["prefix"], base_dir, texts, *options, "--accumulate", 2, "--out", alone))
    assert outcome.code == 0, outcome.err
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    command = train_args(starts["prefix"], base_dir, texts, *options, "--out", together)
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


def test_training_improves_on_the_ridge_fit_and_records_it(
    base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp
) -> None:
    out = tmp_path / "out"
    common = ("train", base_dir, "--layers", 1, "--data", texts, "--window", 64, "--right", 16, "--fit-tokens", 128)
    outcome = kvp(*common, "--tokens", 64 * 80, "--learning-rate", 5e-3, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    log = log_of(out)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    checks = [entry["divergence"] for entry in log if "divergence" in entry]
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:5])
    result = outcome.json()
    assert result["divergence"] == min(checks)
    record = json.loads((out / "kvp.json").read_text())["training"]
    assert record["method"] == "gradient"
    assert record["start"]["method"] == "ridge"
    assert record["data"] == ["a.txt", "b.txt"]
    assert record["tokens"] == 64 * 80
    assert record["validation"]["divergence"] == min(checks)
    assert kvp("generate", "Hello", "--model", out, "--max-tokens", 1).code == 0


def test_what_strays_least_is_kept_whatever_a_few_passages_like(tmp_path: Path) -> None:
    """Also where the best so far is of an older run, or the first validation is not a number."""
    for best, found, kept in (
        ({}, [(0.3, 0.90), (0.2, 0.80), (0.25, 0.95)], [0.3, 0.2]),
        ({"recovery": 0.99}, [(0.3, 0.90), (0.4, 0.99)], [0.3]),
        ({}, [(np.nan, np.nan)], [np.nan]),
    ):
        state, saved = TrainingState(best=best), []
        log = Log(tmp_path / "log.jsonl", keep=0)
        for divergence, recovery in found:
            keep_best(state, {"divergence": divergence, "recovery": recovery}, log, saved.append)
        np.testing.assert_equal([record["divergence"] for record in saved], kept)


def test_a_resumed_runs_log_is_never_without_what_it_keeps(tmp_path: Path) -> None:
    entries = [{"step": step, "tokens": 64 * step} for step in (1, 2, 3)]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    log = Log(path, keep=2)
    assert read_log(path) == entries[:2]  # before anything is written, after which a kill may come
    log.write(entries[2])
    assert read_log(path) == entries


def test_best_bundle_is_kept_not_the_last(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp
) -> None:
    """A rate so high that every step makes it worse: what was there before training stays."""
    out = tmp_path / "out"
    common = train_args(starts["prefix"], base_dir, texts, "--tokens", 64 * 6, "--learning-rate", 3, "--out", out)
    outcome = kvp(*common, "--validate-every", 0, "--json")
    assert outcome.code == 0, outcome.err
    checks = [entry for entry in log_of(out) if "divergence" in entry]
    best = min(checks, key=lambda check: check["divergence"])
    assert checks[-1]["divergence"] > best["divergence"]
    assert outcome.json()["step"] == best["step"]
    if best["step"] == 0:
        weights = [mx.load(str(place / "predictor.safetensors")) for place in (out, starts["prefix"])]
        assert all(mx.array_equal(weights[0][name], weights[1][name]).item() for name in weights[0])


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
    """The validation that training logged, repeated on the bundle that it wrote (fp16)."""
    out = tmp_path / "out"
    common = train_args(starts[start], base_dir, texts, *options, "--tokens", 64 * 30, "--learning-rate", 3e-3)
    base_files = {path.name: path.read_bytes() for path in base_dir.iterdir()}
    outcome = kvp(*common, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    best = outcome.json()
    model = kvp_mlx.load(str(out))
    windows = hold_back(data_files([texts]), model, TrainOptions(window=64)).values()
    measured = RecoveryMeasurement(model, list(windows), 16).measure()["arms"]["kvp"]["recovery"]
    assert measured == pytest.approx(best["recovery"], rel=0.02, abs=0.02)
    assert (out / "adapter.safetensors").exists() == (start == "prefix" and bool(options))
    assert base_files == {path.name: path.read_bytes() for path in base_dir.iterdir()}
    assert kvp("info", out, "--json").code == 0


@pytest.mark.parametrize("start", ["prefix", "pruned"])
def test_base_is_the_same_after_a_run(start: str, starts: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """In memory too: bytes of every parameter, before and after optimiser steps on all that can be trained."""
    how = {"lora_rank": 2} if start == "prefix" else {"train_auxiliary": True}
    weights = Weights(base=1, consistency=1, auxiliary=float(start == "pruned"))
    options = TrainOptions(minutes=None, tokens=64, window=64, right=16, weights=weights, learning_rate=0.1, **how)
    model = make_trainable(kvp_mlx.load(str(starts[start])), options)
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


def test_rate_follows_the_size_of_the_maps() -> None:
    model, _ = prefixed(llama(), 1)
    weights = np.concatenate([np.array(block.weight).ravel() for block in model.predictor.maps.values()])
    rate = TrainOptions().settled(model).learning_rate
    assert rate == pytest.approx(RELATIVE_RATE * np.sqrt(np.mean(np.square(weights))), rel=1e-5)
    for block in model.predictor.maps.values():
        block.weight = 3 * block.weight
    assert TrainOptions().settled(model).learning_rate == pytest.approx(3 * rate, rel=1e-5)
    assert TrainOptions(learning_rate=0.5).settled(model).learning_rate == 0.5


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
    outcome = kvp(*train_args(starts["prefix"], base_dir, texts, "--tokens", 64 * 2, "--out", out))
    assert outcome.code == 0, outcome.err
    assert not list(training(out).glob("*.png"))
    assert len(steps_of(out)) == 2


def test_the_clock_runs_while_training_does(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation that takes longer than the whole budget leaves the budget to training."""
    measure = RecoveryMeasurement.measure

    def slowly(*args: object) -> dict:
        time.sleep(3.0)
        return measure(*args)

    monkeypatch.setattr(RecoveryMeasurement, "measure", slowly)
    out = tmp_path / "out"
    outcome = kvp(*train_args(starts["prefix"], base_dir, texts, "--minutes", 0.02, "--out", out, "--json"))
    assert outcome.code == 0, outcome.err
    result = outcome.json()
    assert result["steps_taken"] == len(steps_of(out)) > 1
    assert result["tokens_taken"] == 64 * result["steps_taken"]
    assert result["minutes_taken"] < 0.06
    resumed = kvp("train", base_dir, "--data", texts, "--window", 64, "--right", 16, "--minutes", 0.02, "--out", out,
                  "--resume", "--json")  # fmt: skip
    assert resumed.json()["steps_now"] == 0


def test_no_step_begins_that_is_longer_than_what_is_left() -> None:
    options = TrainOptions(minutes=2.0)
    assert not options.is_spent(TrainingState(minutes=1.0), 0.9)
    assert options.is_spent(TrainingState(minutes=1.0), 1.1)
    assert not TrainOptions(minutes=None, tokens=100).is_spent(TrainingState(tokens=99, minutes=50), 1.1)


def test_it_is_said_what_was_taken_and_what_is_kept(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate that makes it worse from the first step on."""
    common = ("--tokens", 128, "--learning-rate", 100)
    outcome = kvp(*train_args(starts["prefix"], base_dir, texts, *common, "--out", tmp_path / "a"))
    assert outcome.code == 0, outcome.err
    assert "2 steps taken, 128 tokens" in outcome.err
    assert "the start's maps are kept" in outcome.err
    common = ("train", base_dir, "--layers", 1, "--data", texts, "--window", 64, "--right", 16, "--fit-tokens", 128)
    outcome = kvp(*common, "--tokens", 64, "--learning-rate", 100, "--out", tmp_path / "b")
    assert "1 step taken, 64 tokens" in outcome.err
    assert "the closed form's maps are kept" in outcome.err
    assert outcome.out == ""


def test_phases_are_told_where_there_is_no_terminal(
    base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped = output.progress_lines

    def at_once(label: str) -> object:
        monkeypatch.setattr("kvp_mlx.cli.output.SILENT_SECONDS", 0.0)
        return wrapped(label)

    monkeypatch.setattr("kvp_mlx.cli.output.progress_lines", at_once)
    monkeypatch.setattr("kvp_mlx.cli.training.progress_lines", at_once)
    common = ("train", base_dir, "--layers", 1, "--data", texts, "--window", 64, "--right", 16, "--fit-tokens", 16)
    outcome = kvp(*common, "--tokens", 64 * 40, "--learning-rate", 5e-3, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    for phase in ("closed form, tokens", "validation, documents", "saving the best so far, windows", "training"):
        assert f"{phase}: done after" in outcome.err
    assert "% of the budget, loss" in outcome.err


# --- numbers that are none -------------------------------------------------------------------------------------------


def test_absurd_rate_stops_and_keeps_the_last_good_bundle(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp
) -> None:
    out = tmp_path / "out"
    outcome = kvp(
        *train_args(starts["prefix"], base_dir, texts, "--tokens", 6400, "--learning-rate", 1e30, "--out", out)
    )
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
    common = train_args(starts["prefix"], base_dir, texts, "--tokens", 6400, "--residual-weight", 1e38)
    outcome = kvp(*common, "--continuation-weight", 1e38, "--out", tmp_path / "out")
    assert outcome.code == 1
    assert "not a number" in outcome.err
    assert outcome.err.count("\n") == 1
    kvp_mlx.load(str(tmp_path / "out"))
