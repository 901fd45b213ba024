"""Context recovery and the caches layer by layer, against NumPy in float64."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Kvp
from mlx.utils import tree_flatten
from support.losses import log_softmax
from support.oracle import Entries, KVPrediction, Llama, Transformer, attend, rotate, split_heads
from support.tiny import itself, llama, openelm, paired, prefixed, small_llama, token_ids

from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.errors import InputError
from kvp_mlx.evaluate.layers import measure_layers
from kvp_mlx.train.recovery import ARMS, ContextMeasurement

PROMPT, CONTINUATION = 24, 20
MODELS: dict[str, Callable[[], tuple[KVPModel, KVPrediction]]] = {
    "prefix of llama": lambda: prefixed(llama(), 1),
    "prefix of openelm": lambda: prefixed(openelm(), 1),
    "model": lambda: paired(llama(), small_llama(), [(0,), (0,), (1,), (2,)]),
}
each_model = pytest.mark.parametrize("name", MODELS)


def documents(count: int = 3) -> list[list[int]]:
    return token_ids(PROMPT + CONTINUATION, batch=count).tolist()


def scored(logits: np.ndarray, window: list[int]) -> np.ndarray:
    """Negative log-likelihoods of the continuation; ``logits`` end at the last token but one."""
    rows = log_softmax(logits)[0, -CONTINUATION:]
    return -rows[np.arange(CONTINUATION), window[PROMPT:]]


def plain_losses(oracle: KVPrediction, windows: list[list[int]], tail: int) -> dict[str, np.ndarray]:
    """Every arm written out: (documents, continuation tokens) of losses each."""
    base, rows = oracle.base, {arm: [] for arm in ARMS}
    for number, window in enumerate(windows):
        wrong = windows[(number + 1) % len(windows)]
        rest = np.array([window[PROMPT - 1 : -1]])
        rows["full"].append(scored(base.forward(np.array([window[:-1]])).logits, window))
        rows["no_context"].append(scored(base.forward(rest).logits, window))
        mixed = np.array([wrong[: PROMPT - 1] + window[PROMPT - 1 : -1]])
        rows["wrong_document_full"].append(scored(base.forward(mixed).logits, window))
        for arm, prompt in (("kvp", window), ("wrong_document", wrong)):
            head = PROMPT - 1 - tail
            cache, _ = oracle.prefill(np.array([prompt[:head]]))
            own = np.array([prompt[head : PROMPT - 1] + window[PROMPT - 1 : -1]])
            rows[arm].append(scored(base.forward(own, cache).logits, window))
        alone = early_exit(base, 1) if oracle.is_prefix else oracle.auxiliary
        rows["auxiliary"].append(scored(alone.forward(np.array([window[:-1]])).logits, window))
    return {arm: np.array(values) for arm, values in rows.items()}


def early_exit(base: Transformer, layers: int) -> Transformer:
    key = "num_hidden_layers" if isinstance(base, Llama) else "num_transformer_layers"
    return type(base)({**base.config, key: layers}, base.weights)


@pytest.mark.parametrize("tail", [0, 5])
@each_model
def test_every_arm_is_what_numpy_makes_of_it(name: str, tail: int) -> None:
    model, oracle = MODELS[name]()
    windows = documents()
    result = ContextMeasurement(model, windows, CONTINUATION, exact_tail=tail, arms=ARMS).measure()
    losses = plain_losses(oracle, windows, tail)
    nll = {arm: rows.mean() for arm, rows in losses.items()}
    recovery = {arm: (nll["no_context"] - nll[arm]) / (nll["no_context"] - nll["full"]) for arm in ARMS}
    assert (result["documents"], result["prompt_tokens"]) == (3, PROMPT)
    assert (result["continuation_tokens"], result["exact_tail"]) == (CONTINUATION, tail)
    assert list(result["arms"]) == list(ARMS)
    for arm in ARMS:
        assert result["arms"][arm]["nll"] == pytest.approx(nll[arm], rel=1e-5), arm
        assert result["arms"][arm]["recovery"] == pytest.approx(recovery[arm], rel=1e-3, abs=1e-3), arm
    separation = (recovery["kvp"] - recovery["wrong_document"]) / (1 - recovery["wrong_document_full"])
    assert result["separation"] == pytest.approx(separation, rel=1e-3, abs=1e-3)
    for span, part in (("first", slice(0, 1)), ("first_16", slice(0, 16)), ("rest", slice(16, None))):
        none, kvp, full = (losses[arm][:, part].mean() for arm in ("no_context", "kvp", "full"))
        expected = (none - kvp) / (none - full)
        assert result["recovery_by_position"][span] == pytest.approx(expected, rel=1e-3, abs=1e-3), span


def test_short_continuations_have_no_rest() -> None:
    windows = token_ids(PROMPT + 16, batch=2).tolist()
    result = ContextMeasurement(MODELS["model"]()[0], windows, 16).measure()
    assert list(result["recovery_by_position"]) == ["first", "first_16"]


def test_exact_bundle_recovers_all() -> None:
    result = ContextMeasurement(itself(llama()), documents(), CONTINUATION, arms=ARMS).measure()
    arms = result["arms"]
    assert arms["full"]["recovery"] == 1
    assert arms["no_context"]["recovery"] == 0
    assert arms["kvp"]["nll"] == pytest.approx(arms["full"]["nll"], abs=1e-5)
    assert arms["kvp"]["recovery"] == pytest.approx(1, abs=1e-3)
    assert arms["auxiliary"]["nll"] == pytest.approx(arms["full"]["nll"], abs=1e-5)  # the auxiliary is the base
    assert arms["wrong_document"]["nll"] == pytest.approx(arms["wrong_document_full"]["nll"], abs=1e-5)
    assert result["separation"] == pytest.approx(1, abs=1e-3)


def test_longest_tail_leaves_one_token_to_predict() -> None:
    model, oracle = MODELS["prefix of llama"]()
    windows = documents()
    result = ContextMeasurement(model, windows, CONTINUATION, exact_tail=PROMPT - 2).measure()
    expected = plain_losses(oracle, windows, PROMPT - 2)["kvp"].mean()
    assert result["arms"]["kvp"]["nll"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="exact tail"):
        ContextMeasurement(model, windows, CONTINUATION, exact_tail=PROMPT - 1)


def test_arms_that_are_left_out_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watch(monkeypatch)
    result = ContextMeasurement(MODELS["model"]()[0], documents(), CONTINUATION, arms=["kvp"]).measure()
    assert list(result["arms"]) == ["full", "kvp", "no_context"]
    assert set(asked) == {"full", "kvp", "no_context"}
    assert result["separation"] is None
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note every arm that is run; the real method does the work."""
    asked: list[str] = []
    real = ContextMeasurement.token_losses

    def noted(self: ContextMeasurement, arm: str, number: int) -> np.ndarray:
        asked.append(arm)
        return real(self, arm, number)

    monkeypatch.setattr(ContextMeasurement, "token_losses", noted)
    return asked


def test_measuring_again_runs_what_training_changes_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = MODELS["prefix of llama"]()
    measurement = ContextMeasurement(model, documents(), CONTINUATION)
    before = measurement.measure()
    assert measurement.measure() == before
    changed = [(name, array * 0.5) for name, array in tree_flatten(model.predictor.parameters())]
    model.predictor.load_weights(changed)
    asked = watch(monkeypatch)
    after = measurement.measure()
    assert sorted(set(asked)) == ["kvp", "wrong_document"]
    for arm in ("full", "wrong_document_full", "no_context"):
        assert after["arms"][arm] == before["arms"][arm]
    for arm in ("kvp", "wrong_document"):
        assert after["arms"][arm]["nll"] != pytest.approx(before["arms"][arm]["nll"], rel=1e-4)
    assert after == ContextMeasurement(model, documents(), CONTINUATION).measure()


# --- layer by layer --------------------------------------------------------------------------------------------------


def test_layers_of_an_exact_bundle_are_exact() -> None:
    rows = measure_layers(itself(openelm()), documents(), CONTINUATION)
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row["key_error"] < 1e-5
        assert row["value_error"] < 1e-5
        assert row["attention_cosine"] == pytest.approx(1, abs=1e-5)


def attention(
    model: Transformer, ids: np.ndarray, cache: Sequence[Entries], streams: list[np.ndarray]
) -> list[np.ndarray]:
    """What each attention block returns for the given inputs of its layer."""
    positions = np.arange(len(cache[0]), len(cache[0]) + ids.shape[1])
    outputs = []
    for layer in range(model.depth):
        hidden = model.norm(layer, model.attention_norm, streams[layer])
        queries, keys, values = model.project(layer, hidden)
        entries = model.append(layer, cache[layer], keys, values, positions)
        heads = model.head_norm(layer, "q_norm", split_heads(queries, model.query_heads(layer)))
        outputs.append(model.output(layer, attend(rotate(heads, positions, model.rope_base), positions, entries)))
    return outputs


def plain_rows(oracle: KVPrediction, window: list[int]) -> np.ndarray:
    """One document's key error, value error and attention cosine per layer."""
    ids, rest = np.array([window]), np.array([window[PROMPT:]])
    whole = oracle.base.forward(ids)
    true = [entries.first(PROMPT) for entries in whole.cache]
    predicted, _ = oracle.prefill(ids[:, :PROMPT])
    streams = [stream[:, PROMPT:] for stream in whole.streams]
    on_true, on_predicted = (attention(oracle.base, rest, cache, streams) for cache in (true, predicted))
    rows = []
    for layer, (one, other) in enumerate(zip(on_true, on_predicted, strict=True)):
        pairs = [(getattr(predicted[layer], part), getattr(true[layer], part)) for part in ("keys", "values")]
        errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]
        norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
        rows.append([*errors, ((one * other).sum(axis=-1) / norms).mean()])
    return np.array(rows)


@each_model
def test_layers_are_what_numpy_makes_of_them(name: str) -> None:
    model, oracle = MODELS[name]()
    before = {key: np.array(array) for key, array in tree_flatten(model.base.parameters())}
    rows = measure_layers(model, documents(), CONTINUATION)
    expected = np.mean([plain_rows(oracle, window) for window in documents()], axis=0)
    assert [row["layer"] for row in rows] == [layer for layer, s in enumerate(oracle.layer_map) if s is not None]
    for row in rows:
        found = [row["key_error"], row["value_error"], row["attention_cosine"]]
        np.testing.assert_allclose(found, expected[row["layer"]], rtol=1e-4, atol=1e-5)
        assert row["key_error"] > 0.1
    after = {key: np.array(array) for key, array in tree_flatten(model.base.parameters())}
    assert before.keys() == after.keys()  # no listener stays behind
    assert all(np.array_equal(before[key], after[key]) for key in before)


# --- the command -----------------------------------------------------------------------------------------------------


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
    outcome = kvp("eval", "context", fitted, *common, *options, "--json")
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


def test_one_wrong_number_would_show() -> None:
    """The measure is not blind: maps moved by a percent move the predicted arm."""
    model, _ = MODELS["prefix of openelm"]()
    measurement = ContextMeasurement(model, documents(), CONTINUATION, arms=["kvp"])
    before = measurement.measure()["arms"]["kvp"]["nll"]
    moved = [(name, array * 1.01) for name, array in tree_flatten(model.predictor.parameters())]
    model.predictor.load_weights(moved)
    mx.eval(model.predictor.parameters())
    assert abs(measurement.measure()["arms"]["kvp"]["nll"] - before) > 1e-6
