"""An arm is one row of the table: a new one is parsed, timed, counted and evaluated as those that are there."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import Kvp
from kvp_mlx.bench.ttft import fresh_prompt
from support.directories import TEXT
from support.tiny import llama, prefixed, token_ids

import kvp_mlx
from kvp_mlx.arms import kinds
from kvp_mlx.arms.arm import Arm, Kind, Numbers, Reading
from kvp_mlx.arms.baselines import kept_count, read_kept
from kvp_mlx.arms.clock import first_token
from kvp_mlx.arms.kinds import KINDS, forms, parse_arm
from kvp_mlx.arms.work import full_work, kept_work
from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.errors import InputError
from kvp_mlx.files import write_json
from kvp_mlx.models.families import Cache


def read_last(model: KVPModel, numbers: Numbers, ids: mx.array, reading: Reading) -> tuple[nn.Module, Cache]:
    read = ids.shape[1] - 1
    kept = mx.arange(read - kept_count(read, numbers[0]), read)
    return model.base, read_kept(model.base, ids, mx.broadcast_to(kept, (ids.shape[0], kept.size)), reading.step_size)


LAST = Kind(
    form="last-R",
    help="the base reads the last share R of the prompt",
    read=read_last,
    numbers=1,
    work=lambda model, numbers, tokens, batch: kept_work(model.base, kept_count(tokens - 1, numbers[0]), batch),
    networks=lambda model, _: [model.base],
    prunes=True,
)


@pytest.fixture
def with_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the arm by one row."""
    monkeypatch.setitem(KINDS, "last", LAST)


@pytest.mark.usefixtures("with_last")
def test_a_new_row_is_parsed_and_named() -> None:
    assert parse_arm("last-0.5") == Arm("last-0.5", LAST, (0.5,))
    assert forms().endswith("last-R")
    for bad in ("last", "last-0", "last-1-1"):
        with pytest.raises(InputError, match="last"):
            parse_arm(bad)
    with pytest.raises(InputError, match="last-R"):
        parse_arm("psychic")


def test_it_is_unknown_without_the_row() -> None:
    with pytest.raises(InputError, match=r"unknown arm 'last-0\.5'"):
        parse_arm("last-0.5")


@pytest.mark.usefixtures("with_last")
def test_a_new_row_is_timed_by_the_clock(fitted: Path) -> None:
    model = kvp_mlx.load(str(fitted))
    ids = mx.array([fresh_prompt(list(range(3, 90)), 41, number) for number in range(2)])
    first = first_token(model, parse_arm("last-0.5"), ids, step_size=8)
    assert first.tokens == mx.argmax(model.base(ids[:, 20:])[:, -1], axis=-1).tolist()  # RoPE knows distances only
    assert first.network is model.base
    assert [layer.offset for layer in first.cache] == [21] * 4  # those kept, and the last one
    assert 0 < first.first_step_ms < first.ttft_ms


@pytest.mark.usefixtures("with_last")
def test_a_new_row_is_benched(fitted: Path, kvp: Kvp) -> None:
    common = ("--model", fitted, "--prompt-tokens", "41", "--arms", "full,last-0.5", "--json")
    rows = {row["arm"]: row for row in kvp("bench", "ttft", *common, "--rounds", 1).json()["rows"]}
    model = kvp_mlx.load(str(fitted))
    expected = full_work(model, 41, 1).flops / kept_work(model.base, 20, 1).flops
    assert rows["last-0.5"]["flops_ratio"] == pytest.approx(expected)
    assert rows["last-0.5"]["realised"] > 0
    held = {row["arm"]: row for row in kvp("bench", "memory", *common).json()["rows"]}
    for key in ("weight_bytes", "cache_bytes", "bound_bytes"):
        assert held["last-0.5"][key] == held["full"][key] > 0
    speeds = kvp("bench", "decode", *common, "--rounds", 1, "--new-tokens", 4).json()["rows"]
    assert [row["arm"] for row in speeds] == ["full", "last-0.5"]


@pytest.mark.usefixtures("with_last")
def test_a_new_row_is_evaluated(fitted: Path, tmp_path: Path, kvp: Kvp) -> None:
    data = tmp_path / "squad.jsonl"
    question = {"context": TEXT, "question": "what?", "answers": ["the harbour"]}
    write_json(data, question)
    data.write_text(" ".join(data.read_text().split()) + "\n")
    outcome = kvp("eval", "squad", fitted, "--data", data, "--arms", "full,last-0.5", "--json")
    assert outcome.code == 0, outcome.err
    arms = outcome.json()["arms"]
    assert list(arms) == ["full", "last-0.5"]
    assert arms["last-0.5"]["flops_ratio"] > 1
    assert arms["last-0.5"]["ttft_ms"] > 0


def test_every_kind_of_arm_can_be_run_and_says_what_it_does() -> None:
    model, _ = prefixed(llama(), 2)
    ids = mx.array(token_ids(21))
    names = {"layers": "layers-0.5", "random": "random-0.5", "static": "static-0.5", "spec": "spec-0.5"}
    for key, kind in KINDS.items():
        arm = parse_arm(names.get(key, "lazy-0.5-0.25" if key == "lazy" else key))
        assert kind.form and kind.help
        assert (kind.read is None) != (kind.engine is None)
        assert arm.work(model, 21).flops > 0
        assert arm.networks(model)
        if kind.read is None:
            with pytest.raises(InputError, match="only be timed"):
                arm.read(model, ids)
        else:
            network, cache = arm.read(model, ids, Reading(step_size=8))
            assert np.isfinite(np.array(network(ids[:, -1:], cache=cache))).all()


def test_names_of_engines_stay_whole() -> None:
    for name in ("mlx-lm", "llama.cpp"):
        assert parse_arm(name) == Arm(name, kinds.KINDS[name])
        with pytest.raises(InputError):
            parse_arm(f"{name}-1")
