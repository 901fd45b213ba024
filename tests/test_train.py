"""Training by the continuation objective, small enough to see what it does."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import Kvp
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from support.tiny import llama, openelm, paired, prefixed, small_llama, token_ids

import kvp_mlx
from kvp_mlx.train.continuation import continuation_loss, teach
from kvp_mlx.train.loop import schedule

MODELS = {
    "prefix of llama": lambda: prefixed(llama(), 1)[0],
    "prefix of openelm": lambda: prefixed(openelm(), 1)[0],
    "model": lambda: paired(llama(), small_llama(), [(0,), (0,), (1,), (2,)])[0],
}


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_the_divergence_that_decoding_sees(name: str) -> None:
    """Written out with the runtime's own predicted cache and the plain model."""
    model = MODELS[name]()
    ids, split, right = token_ids(30), 17, 8
    loss = continuation_loss(model, teach(model, ids[0].tolist()), split, right).item()
    cache = kvp_mlx.predict_base_cache(model, mx.array(ids[:, :split]))
    predicted = log_softmax(np.array(model.base(mx.array(ids[:, split : split + right]), cache=cache), np.float64)[0])
    true = np.array(model.base(mx.array(ids), cache=make_prompt_cache(model.base)), np.float64)[0]
    true = log_softmax(true[split : split + right])
    assert loss == pytest.approx((np.exp(true) * (true - predicted)).sum(-1).mean(), rel=1e-3)
    assert loss > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_gradient_reaches_every_map_and_descends(name: str) -> None:
    model = MODELS[name]()
    teacher = teach(model, token_ids(30)[0].tolist())
    loss, gradient = nn.value_and_grad(model.predictor, lambda: continuation_loss(model, teacher, 15, 10))()
    flat = dict(tree_flatten(gradient))
    assert flat.keys() == dict(tree_flatten(model.predictor.parameters())).keys()
    assert all(mx.abs(array).max().item() > 0 for array in flat.values())
    norm = sum(mx.square(array).sum().item() for array in flat.values())
    small = 1e-3 * loss.item() / norm
    parameters = dict(tree_flatten(model.predictor.parameters()))
    model.predictor.load_weights([(key, parameters[key] - small * flat[key]) for key in flat])
    after = continuation_loss(model, teacher, 15, 10).item()
    assert after < loss.item()
    assert loss.item() - after == pytest.approx(1e-3 * loss.item(), rel=0.3)


def test_exact_maps_have_no_loss() -> None:
    model = prefixed(llama(), 3)[0]
    assert continuation_loss(model, teach(model, token_ids(30)[0].tolist()), 15, 10).item() == pytest.approx(
        0, abs=1e-5
    )


def test_rate_warms_up_and_comes_down() -> None:
    rates = [schedule(share / 100) for share in range(101)]
    assert max(rates) == pytest.approx(1, abs=0.01)
    assert rates[0] < 0.1
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_trained_bundle_is_better_than_its_ridge_start(
    base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp
) -> None:
    out = tmp_path / "out"
    common = ("--layers", 1, "--data", text_file, "--window", 32, "--fit-tokens", 64, "--minutes", 0.1)
    outcome = kvp("train", base_dir, *common, "--learning-rate", 5e-3, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    log = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    validations = [entry["recovery"] for entry in log if "recovery" in entry]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:20])
    assert outcome.json()["recovery"] == max(validations)
    recipe = json.loads((out / "kvp.json").read_text())["training"]
    assert recipe["method"] == "continuation"
    assert recipe["start"]["method"] == "ridge"
    assert kvp("generate", "Hello", "--model", out, "--max-tokens", 1).code == 0


def test_data_too_short_to_hold_back_is_named(base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp) -> None:
    common = ("--layers", 1, "--data", text_file, "--window", 500, "--fit-tokens", 64, "--minutes", 0.1)
    outcome = kvp("train", base_dir, *common, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "--window" in outcome.err


def test_context_of_an_exact_bundle_is_recovered_whole(
    base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp
) -> None:
    out = tmp_path / "exact"
    assert kvp("fit", base_dir, "--layers", 3, "--data", text_file, "--tokens", 64, "--out", out).code == 0
    common = ("--data", text_file, "--prompt-tokens", 24, "--continuation-tokens", 8, "--limit", 3)
    result = kvp("eval", "context", out, *common, "--json").json()
    arms = result["arms"]
    assert (result["documents"], result["prompt_tokens"], result["continuation_tokens"]) == (3, 24, 8)
    assert arms["kvp"]["nll"] == pytest.approx(arms["full"]["nll"], abs=1e-4)
    assert arms["wrong_document"]["nll"] == pytest.approx(arms["wrong_document_full"]["nll"], abs=1e-4)
    assert arms["full"]["recovery"] == 1
    assert arms["no_context"]["recovery"] == 0
    assert "separation" in kvp("eval", "context", out, *common).out
