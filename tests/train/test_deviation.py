"""The estimator of deviation: what it is fitted on, written out, and the fit."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support.tiny import entries_of, llama, paired, prefixed, small_llama, token_ids

from kvp_mlx import load
from kvp_mlx.bundle.config import RecomputeConfig
from kvp_mlx.engine.auxiliary import auxiliary_prefill
from kvp_mlx.engine.prefill import base_prefill, predict_base_cache
from kvp_mlx.train.deviation import PENALTY, deviation, fit_deviation, harm, with_estimator
from kvp_mlx.train.objectives import predict
from kvp_mlx.train.teacher import make_batch, read, teach

ASKING_TOKENS = RecomputeConfig().asking_tokens


@pytest.mark.parametrize(
    "make", [lambda: prefixed(llama(), 1), lambda: paired(llama(), small_llama(), ((0,), (0,), (1,), (2,)))]
)
def test_harm_is_the_slope_of_the_divergence_times_the_error(make):
    model, _ = make()
    ids, split, step = mx.array(token_ids(12)), 8, 0.02  # no k_norm: halfway before it were not halfway after it
    teacher = teach(model, make_batch(ids.tolist()))
    reading = teacher.reading or read(model, ids)
    predicted, pairs = predict(model, teacher, reading, split), first(teacher.raw, split)
    found = np.array(harm(model, teacher, reading, predicted, pairs))[0]
    error = 0.0
    for layer, pair in predicted.items():
        values = np.array(pairs[layer]["values"])[0]
        error = error + np.square(np.array(pair["values"])[0] - values).sum(-1) / np.square(values).sum(-1).mean()
    whole = np.array(deviation(model, teacher, reading, split))[0]
    np.testing.assert_allclose(whole, np.log(error) + 0.5 * np.log(found), atol=1e-4)
    true = [(layer.keys, layer.values) for layer in entries_of(base_prefill(model, ids))]
    wrong = [(layer.keys, layer.values) for layer in entries_of(predict_base_cache(model, ids[:, :split]))]
    logits = np.array(model.base(ids))[0, split:]

    def strays(shares):  # how far the base strays on a cache between the true (0) and the predicted entries (1)
        cache = make_prompt_cache(model.base)
        for layer, one, other, share in zip(cache, true, wrong, shares, strict=True):
            pair = (
                a[:, :, :split] + s[..., None] * (b - a[:, :, :split])
                for a, b, s in zip(one, other, share, strict=True)
            )
            layer.update_and_fetch(*(mx.array(part.astype(np.float32)) for part in pair))
        return divergence(logits, np.array(model.base(ids[:, split:], cache=cache))[0])

    for token in (1, 4, 7):
        expected = 0.0
        for layer, kind in itertools.product(range(len(true)), range(2)):
            shares = np.full((len(true), 2, split), 0.5)
            shares[layer, kind, token] += step
            above = strays(shares)
            shares[layer, kind, token] -= 2 * step
            expected += abs(above - strays(shares)) / (2 * step)
        assert found[token] == pytest.approx(expected, rel=0.02, abs=1e-6)


def first(raw, tokens):
    """Return raw pairs of the first tokens."""
    return {layer: {kind: x[:, :tokens] for kind, x in pair.items()} for layer, pair in raw.items()}


def divergence(true, other):
    """Return KL(true, other) of logits (T, vocabulary), summed over tokens, in float64."""
    true, other = (
        x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), axis=-1)[:, None] for x in (true, other)
    )
    return (np.exp(true) * (true - other)).sum()


def test_the_estimator_is_the_ridge_fit_of_centred_deviations(fitted):
    model = load(str(fitted))
    windows = [token_ids(64, seed=seed)[0].tolist() for seed in range(8)]
    explained = fit_deviation(model, [*windows, [1, 2, 3]])  # the last one is too short to judge
    assert 0 < explained <= 1
    x, y = [], []
    for window in windows:
        teacher = teach(model, make_batch([window]))
        centred = np.array(deviation(model, teacher, teacher.reading, 48), dtype=np.float64)[0, 1:-ASKING_TOKENS]
        y.append(centred - centred.mean())
        inputs, _ = auxiliary_prefill(model, mx.array([window]), make_prompt_cache(model.auxiliary))
        x.append(np.array(inputs[model.predictor.blocks[-1].name], dtype=np.float64)[0, 1 : 48 - ASKING_TOKENS])
        estimated = np.array(model.predictor.deviations(inputs))[0, 1 : 48 - ASKING_TOKENS]
        x[-1] = np.concatenate([x[-1], estimated[:, None]], axis=1)
    x, y = np.concatenate(x), np.concatenate(y)
    x, estimated = x[:, :-1] - x[:, :-1].mean(axis=0), x[:, -1]
    assert 1 - np.square(estimated - y).mean() / y.var() == pytest.approx(explained, abs=1e-3)
    penalty = PENALTY * np.square(x).sum() / x.shape[1]
    weight = np.array(model.predictor.deviation.linear.weight)[0]
    np.testing.assert_allclose(x.T @ (y - x @ weight), penalty * weight, atol=1e-3 * np.abs(penalty * weight).max())


def test_an_estimator_that_is_not_fitted_takes_all_tokens_for_alike():
    model = with_estimator(prefixed(llama(), 1)[0])
    inputs, _ = auxiliary_prefill(model, mx.array(token_ids(12)), make_prompt_cache(model.auxiliary))
    assert np.ptp(np.array(model.predictor.deviations(inputs))) == 0


def test_windows_too_short_to_judge_fit_nothing(fitted):
    assert fit_deviation(load(str(fitted)), [[1, 2, 3]] * 3) is None
