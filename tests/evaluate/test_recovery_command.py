"""``kvp eval context``: what it prints, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Kvp

from kvp_mlx.train.recovery import ARMS


@pytest.fixture
def common(text_file: Path) -> tuple[Any, ...]:
    return ("--data", text_file, "--prompt-tokens", 24, "--continuation-tokens", 8, "--limit", 3)


def test_command_prints_what_design_says(fitted: Path, common: tuple, kvp: Kvp) -> None:
    outcome = kvp("eval", "context", fitted, *common, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json()
    assert (result["documents"], result["prompt_tokens"], result["continuation_tokens"]) == (3, 24, 8)
    assert set(result["arms"]) == set(ARMS)
    assert all(set(row) == {"nll", "recovery"} for row in result["arms"].values())
    assert "layers" not in result
    plain = kvp("eval", "context", fitted, *common).out
    assert all(arm in plain for arm in ARMS)
    assert "separation" in plain
    tail = kvp("eval", "context", fitted, *common, "--exact-tail", 8, "--json").json()
    assert tail["exact_tail"] == 8
    assert tail["arms"]["full"] == result["arms"]["full"]
    assert tail["arms"]["kvp"]["nll"] != result["arms"]["kvp"]["nll"]


def test_command_of_an_exact_bundle(base_dir: Path, text_file: Path, common: tuple, tmp_path: Path, kvp: Kvp) -> None:
    out = tmp_path / "exact"
    assert kvp("fit", base_dir, "--layers", 3, "--data", text_file, "--tokens", 64, "--out", out).code == 0
    arms = kvp("eval", "context", out, *common, "--json").json()["arms"]
    assert arms["kvp"]["nll"] == pytest.approx(arms["full"]["nll"], abs=1e-4)
    assert arms["wrong_document"]["nll"] == pytest.approx(arms["wrong_document_full"]["nll"], abs=1e-4)


def test_per_layer(fitted: Path, common: tuple, kvp: Kvp) -> None:
    outcome = kvp("eval", "context", fitted, *common, "--per-layer", "--json")
    assert outcome.code == 0, outcome.err
    (row,) = outcome.json()["layers"]  # a prefix of two: layer 2 is exact as well
    assert set(row) == {"layer", "key_error", "value_error", "attention_cosine"}
    assert row["layer"] == 3
    assert 0 < row["key_error"] < 2
    assert 0 < row["attention_cosine"] <= 1.0001
    assert "attention cosine" in kvp("eval", "context", fitted, *common, "--per-layer").out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--arms", "full,nonsense"), "nonsense"),
        (("--arms", ""), "arm"),
        (("--exact-tail", 23), "exact tail"),
        (("--prompt-tokens", 5000), "--data"),
    ],
)
def test_bad_options_are_named(options: tuple, named: str, fitted: Path, common: tuple, kvp: Kvp) -> None:
    kept = [part for pair in zip(common[::2], common[1::2], strict=True) if pair[0] != options[0] for part in pair]
    outcome = kvp("eval", "context", fitted, *kept, *options, "--json")
    assert outcome.code == 2
    assert named in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


def test_chosen_arms(fitted: Path, common: tuple, kvp: Kvp) -> None:
    result = kvp("eval", "context", fitted, *common, "--arms", "kvp,wrong_document", "--json").json()
    assert list(result["arms"]) == ["full", "kvp", "wrong_document", "no_context"]
    assert result["separation"] is None
    outcome = kvp("eval", "context", fitted, *common, "--arms", "full")
    assert outcome.code == 0, outcome.err
    assert "separation" not in outcome.out
