"""Context recovery against NumPy in float64."""

import json
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.losses import log_softmax
from support.oracle import KVPrediction, Llama, Transformer
from support.tiny import estimating, itself, llama, openelm, paired, prefixed, small_llama, token_ids

from kvp_mlx.bundle.config import RecomputeConfig
from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.errors import InputError
from kvp_mlx.train.recovery import ARMS, RecoveryMeasurement
from kvp_mlx.train.text import PromptWindow

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
    result = RecoveryMeasurement(model, windows, CONTINUATION, exact_tail=tail, arms=ARMS).measure()
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


@each_model
def test_divergence_is_what_numpy_makes_of_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, and with all but the four likeliest tokens taken as one."""
    model, oracle = MODELS[name]()
    windows = documents()
    pairs = []
    for window in windows:
        full = oracle.base.forward(np.array([window[:-1]])).logits[0, PROMPT - 1 :]
        cache, _ = oracle.prefill(np.array([window[: PROMPT - 1]]))
        own = oracle.base.forward(np.array([window[PROMPT - 1 : -1]]), cache).logits[0]
        pairs += [[np.exp(x - np.logaddexp.reduce(x)) for x in pair] for pair in zip(full, own, strict=True)]
    whole = np.mean([(p * np.log(p / q)).sum() for p, q in pairs])
    lumped = []
    for p, q in pairs:
        best = np.argsort(-p)[:4]
        a, b = (np.append(x[best], 1 - x[best].sum()) for x in (p, q))
        lumped.append((a * np.log(a / b)).sum())
    for count, expected in ((10_000, whole), (4, np.mean(lumped))):
        monkeypatch.setattr("kvp_mlx.train.recovery.LIKELIEST", count)
        measurement = RecoveryMeasurement(model, windows, CONTINUATION)
        assert measurement.measure()["divergence"] == pytest.approx(expected, rel=1e-3)
        assert measurement.measure()["divergence"] == pytest.approx(expected, rel=1e-3)  # what full expects is known


def test_short_continuations_have_no_rest() -> None:
    windows = token_ids(PROMPT + 16, batch=2).tolist()
    result = RecoveryMeasurement(MODELS["model"]()[0], windows, 16).measure()
    assert list(result["recovery_by_position"]) == ["first", "first_16"]


def test_exact_bundle_recovers_all() -> None:
    result = RecoveryMeasurement(itself(llama()), documents(), CONTINUATION, arms=ARMS).measure()
    arms = result["arms"]
    assert arms["full"]["recovery"] == 1
    assert arms["no_context"]["recovery"] == 0
    assert arms["kvp"]["nll"] == pytest.approx(arms["full"]["nll"], abs=1e-5)
    assert arms["kvp"]["recovery"] == pytest.approx(1, abs=1e-3)
    assert result["divergence"] == pytest.approx(0, abs=1e-6)
    assert arms["auxiliary"]["nll"] == pytest.approx(arms["full"]["nll"], abs=1e-5)  # the auxiliary is the base
    assert arms["wrong_document"]["nll"] == pytest.approx(arms["wrong_document_full"]["nll"], abs=1e-5)
    assert result["separation"] == pytest.approx(1, abs=1e-3)


def test_longest_tail_leaves_one_token_to_predict() -> None:
    model, oracle = MODELS["prefix of llama"]()
    windows = documents()
    result = RecoveryMeasurement(model, windows, CONTINUATION, exact_tail=PROMPT - 2).measure()
    expected = plain_losses(oracle, windows, PROMPT - 2)["kvp"].mean()
    assert result["arms"]["kvp"]["nll"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="exact tail"):
        RecoveryMeasurement(model, windows, CONTINUATION, exact_tail=PROMPT - 1)


def test_arms_that_are_left_out_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watch(monkeypatch)
    result = RecoveryMeasurement(MODELS["model"]()[0], documents(), CONTINUATION, arms=["kvp"]).measure()
    assert list(result["arms"]) == ["full", "kvp", "no_context"]
    assert set(asked) == {"full", "kvp", "no_context"}
    assert result["separation"] is None
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note every arm that is run; the real method does the work."""
    asked: list[str] = []
    real = RecoveryMeasurement.token_losses

    def noted(self: RecoveryMeasurement, arm: str, number: int) -> np.ndarray:
        asked.append(arm)
        return real(self, arm, number)

    monkeypatch.setattr(RecoveryMeasurement, "token_losses", noted)
    return asked


def test_measuring_anew_runs_what_training_changes_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = MODELS["prefix of llama"]()
    measurement = RecoveryMeasurement(model, documents(), CONTINUATION)
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
    assert after == RecoveryMeasurement(model, documents(), CONTINUATION).measure()


def test_one_wrong_number_would_show() -> None:
    """The measure is not blind: maps moved by a percent move the predicted arm."""
    model, _ = MODELS["prefix of openelm"]()
    measurement = RecoveryMeasurement(model, documents(), CONTINUATION, arms=["kvp"])
    before = measurement.measure()["arms"]["kvp"]["nll"]
    moved = [(name, array * 1.01) for name, array in tree_flatten(model.predictor.parameters())]
    model.predictor.load_weights(moved)
    mx.eval(model.predictor.parameters())
    assert abs(measurement.measure()["arms"]["kvp"]["nll"] - before) > 1e-6


def test_the_share_is_the_bundles_unless_it_is_given() -> None:
    model = estimating(MODELS["prefix of llama"]()[0])
    own = replace(model, config=model.config.model_copy(update={"recompute": RecomputeConfig(share=0.4)}))
    found = {}
    for measured, share, given in ((model, 0.0, None), (model, 0.0, 0.4), (own, 0.4, None), (own, 0.4, 0.0)):
        measurement = RecoveryMeasurement(measured, documents(), CONTINUATION, recompute=given, arms=["kvp"])
        found[share, given] = measurement.measure()
    assert [result["recompute"] for result in found.values()] == [0.0, 0.4, 0.4, 0.0]
    assert found[0.0, 0.4] == found[0.4, None]
    assert found[0.0, None] == found[0.4, 0.0]
    assert found[0.0, 0.4]["arms"]["kvp"]["nll"] != found[0.0, None]["arms"]["kvp"]["nll"]
    with pytest.raises(InputError, match="cannot tell which tokens to recompute"):
        RecoveryMeasurement(MODELS["prefix of llama"]()[0], documents(), CONTINUATION, recompute=0.4)


def test_a_window_that_says_where_its_prompt_ends_is_scored_from_there() -> None:
    """Beside others or alone: the mean is over tokens, whatever windows they stand in."""
    model, (first, second, *_) = MODELS["model"]()[0], documents()
    asked = PromptWindow(second)
    asked.prompt_tokens = len(second) - 3
    mixed = RecoveryMeasurement(model, [first, asked], CONTINUATION, arms=["kvp"])
    result = mixed.measure()["arms"]
    plain = RecoveryMeasurement(model, [first, second], CONTINUATION, arms=["kvp"])
    short = RecoveryMeasurement(model, [first, second], 3, arms=["kvp"])
    for arm in ("full", "kvp", "no_context"):
        losses = [*plain.token_losses(arm, 0), *short.token_losses(arm, 1)]
        assert len(losses) == CONTINUATION + 3
        assert result[arm]["nll"] == pytest.approx(np.mean(losses), rel=1e-5)
