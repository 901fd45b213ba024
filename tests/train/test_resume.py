"""``kvp train``: same seed same losses; killed and resumed, or refused."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import Kvp
from support.directories import prose
from support.training import log_of, state_of, steps_of, train_args, training

import kvp_mlx
from kvp_mlx.bundle.config import read_config
from kvp_mlx.train import loop, run
from kvp_mlx.train.loop import TrainOptions

STEADY = """
import sys
import kvp_mlx, kvp_mlx.train.loop as loop
loop.STATE_EVERY_SECONDS = 0.0
from kvp_mlx.cli.main import main
sys.argv = ["kvp", *sys.argv[1:]]
main()
"""
"""The command, with the state saved after every step in place of every minute."""


def assert_same_state(one: Path, other: Path) -> None:
    one_state, other_state = state_of(one), state_of(other)
    assert one_state.keys() == other_state.keys()
    assert [name for name, array in one_state.items() if not np.array_equal(array, other_state[name])] == []


def wait_until(happened: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lines(path: Path, written_after: int = 0) -> int:
    """Count them; none where the file is missing, which it is for a moment when a run begins anew."""
    try:
        return path.read_bytes().count(b"\n") if path.stat().st_mtime_ns > written_after else 0
    except FileNotFoundError:
        return 0


def test_same_seed_same_losses(starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        common = train_args(starts["prefix"], base_dir, texts, "--tokens", 64 * 8, "--seed", seed)
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


@pytest.mark.long
@pytest.mark.parametrize("name", KILLED)
def test_killed_and_resumed_is_never_interrupted(
    name: str, starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp
) -> None:
    """SIGKILL in the middle, while state and bundle are written after every step."""
    kind, options = KILLED[name]
    steps = 24
    size = 64 * (4 if "--accumulate" in options else 2 if "--batch-size" in options else 1)
    common = train_args(starts[kind], base_dir, texts, *options, "--tokens", steps * size, "--learning-rate", 3e-3)
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


class Killed(BaseException):
    """Stands for SIGKILL: nothing is written any more."""


def test_the_best_bundle_outlives_a_kill_between_two_states(
    starts: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written at once, the state every minute."""
    found, step, out = {0: 1.0, 5: 0.9, 8: 0.2, 12: 0.5}, [0], tmp_path / "out"
    options = TrainOptions(minutes=None, tokens=64 * 20, window=64, right=16, validate_every=0.0)
    monkeypatch.setattr(
        run, "validate", lambda *_: {"recovery": 0.5, "separation": 0.5, "divergence": found.get(step[0], 2.0)}
    )

    def progress(_: float, entry: dict) -> None:
        step[0] = entry["step"]
        monkeypatch.setattr(loop, "STATE_EVERY_SECONDS", 0.0 if step[0] <= 6 else 60.0)
        if 8 in found and step[0] == 10:
            raise Killed

    with pytest.raises(Killed):
        run.train_bundle(str(starts["prefix"]), [str(texts)], out, options, progress=progress)
    assert read_config(out).training["validation"]["step"] == 8
    before, step[0] = (out / "predictor.safetensors").read_bytes(), 6
    del found[8]  # on another machine, say, it is not quite as good again
    result = run.train_bundle("", [str(texts)], out, options, resume=True, progress=progress)
    assert (result["step"], result["divergence"]) == (8, 0.2)
    assert (out / "predictor.safetensors").read_bytes() == before


def test_killed_at_any_moment_leaves_a_whole_bundle_or_none(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path
) -> None:
    out, rng = tmp_path / "out", random.Random(0)
    common = train_args(
        starts["prefix"], base_dir, texts, "--tokens", 10**6, "--validate-every", 0, "--force", "--out", out
    )
    for number in range(3):
        process = subprocess.Popen([sys.executable, "-c", STEADY, *map(str, common)], stderr=subprocess.PIPE)
        seen = (training(out) / "log.jsonl").stat().st_mtime_ns if number else 0
        wait_until(lambda seen=seen: lines(training(out) / "log.jsonl", written_after=seen) > 0, process)
        time.sleep(0.2 * rng.random())
        process.kill()
        process.wait()
        if out.exists():
            model = kvp_mlx.load(str(out))
            assert np.isfinite(model.config.training["validation"]["recovery"])
        if (training(out) / "state.safetensors").exists():
            assert state_of(out)


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
        (("--layers", 2), "--layers 2"),
        (("--prune", 0.5), "--prune 0.5"),
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


def test_a_full_disk_keeps_the_state_before(
    starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kvp: Kvp
) -> None:
    saved, out = [], tmp_path / "out"

    def save(path: str, *_: object, **__: object) -> None:
        saved.append(Path(path))
        Path(path).write_bytes(b"half")
        raise RuntimeError("[write] Unable to write 3 bytes to file.")

    monkeypatch.setattr("kvp_mlx.models.safetensors.mx.save_safetensors", save)
    outcome = kvp(*train_args(starts["prefix"], base_dir, texts, "--tokens", 64, "--out", out))
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert "make room on the disk" in outcome.err
    assert saved and not [path for path in saved if path.exists()]


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


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_bundle_that_is_gone_is_written_again(
    is_finished: bool, run: Path, base_dir: Path, texts: Path, kvp: Kvp
) -> None:
    """What is there afterwards is what the command says, whatever was lost in between."""
    if not is_finished:
        rewind(training(run) / "state.safetensors")
    shutil.rmtree(run)
    common = ("train", base_dir, "--data", texts, "--window", 64, "--right", 16, "--tokens", 64 * 4, "--resume")
    outcome = kvp(*common, "--out", run, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json()
    assert result["rewritten"]
    assert result["steps_now"] == (0 if is_finished else 2)
    record = kvp_mlx.load(str(run)).config.training["validation"]
    assert record["recovery"] == result["recovery"]
    again = kvp(*common, "--out", run)
    assert again.code == 0, again.err
    assert "Wrote" not in again.err
    assert "Nothing is left" in again.err
    shutil.rmtree(run)
    run.mkdir()
    (run / "thesis.tex").write_text("mine")
    refused = kvp(*common, "--out", run)
    assert refused.code == 2
    assert (run / "thesis.tex").read_text() == "mine"


def rewind(path: Path) -> None:
    """Make a run's state one of two steps ago (by its counts, which is what is looked at)."""
    arrays, metadata = mx.load(str(path), return_metadata=True)
    state = json.loads(metadata["state"])
    state |= {"step": state["step"] - 2, "tokens": state["tokens"] - 128, "finished": False}
    mx.save_safetensors(str(path), arrays, metadata={"state": json.dumps(state)})


def test_one_run_at_a_time(starts: dict[str, Path], base_dir: Path, texts: Path, tmp_path: Path, kvp: Kvp) -> None:
    """A second one is refused while the first lives; a killed one's lock is nobody's."""
    out, parent = tmp_path / "out", tmp_path
    slow = train_args(starts["prefix"], base_dir, texts, "--tokens", 10**7, "--out", out)
    process = subprocess.Popen([sys.executable, "-c", STEADY, *map(str, slow)], stderr=subprocess.PIPE)
    try:
        wait_until((training(out) / "state.safetensors").exists, process)
        for more in ((), ("--force",), ("--resume",)):
            outcome = kvp(*slow, *more)
            assert outcome.code == 2
            assert "another process" in outcome.err or "--resume" in outcome.err
            assert outcome.err.count("\n") == 1
        assert "another process" in outcome.err
    finally:
        process.kill()
        process.wait()
    assert (training(out) / "lock").exists()
    quick = train_args(starts["prefix"], base_dir, texts, "--tokens", 64, "--out", out, "--force")
    outcome = kvp(*quick)
    assert outcome.code == 0, outcome.err
    assert not (training(out) / "lock").exists()
    kvp_mlx.load(str(out))
    assert sorted(path.name for path in parent.iterdir()) == ["out", "out.training"]


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
    if not bundle_is_there:
        shutil.rmtree(run)
    before = snapshot(run.parent)
    common = train_args(starts["prefix"], base_dir, texts, "--tokens", 64 * 4, "--out", run)
    outcome = kvp(*common)
    assert outcome.code == 2
    assert "--resume" in outcome.err
    assert "--force" in outcome.err
    assert outcome.err.count("\n") == 1
    assert snapshot(run.parent) == before
    assert kvp(*common, "--force").code == 0
