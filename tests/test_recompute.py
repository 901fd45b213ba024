"""Selective recomputation against the NumPy oracle, and the estimator that chooses the tokens."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support.oracle import Entries
from support.tiny import assert_cache_equal, entries_of, llama, openelm, paired, prefixed, small_llama, token_ids

from kvp_mlx import load
from kvp_mlx.arms import arm_prefill, parse_arm
from kvp_mlx.errors import InputError
from kvp_mlx.families import RawLayer, run_layers
from kvp_mlx.pipeline import PrefillTimes, auxiliary_prefill, base_prefill, predict_base_cache
from kvp_mlx.recompute import first_layer, worst_tokens
from kvp_mlx.train.deviation import deviation, fit_deviation, with_estimator

SETUPS = {
    "llama prefix": lambda: prefixed(llama(), 1),
    "openelm prefix": lambda: prefixed(openelm(), 2),
    "openelm prefix, two sources": lambda: prefixed(openelm(), 1, (None, None, (0, 1), (1, 0))),
    "openelm from llama": lambda: paired(openelm(), small_llama(), ((0,), (0,), (1,), (2,))),
}


def repairing(name, ratio):
    """Return a bundle with an estimator of random weights, and its oracle."""
    model, oracle = SETUPS[name]()
    model = with_estimator(model)
    width = model.predictor.deviation.linear.weight.shape
    model.predictor.deviation.linear.weight = mx.random.normal(width, key=mx.random.key(3))
    return replace(model, recompute=ratio), oracle


def chosen_by_hand(model, ids):
    """Return the positions of the worst tokens by the estimator's own numbers, in NumPy."""
    inputs, _ = auxiliary_prefill(model, mx.array(ids), make_prompt_cache(model.auxiliary))
    deviations = np.array(model.predictor.deviations(inputs))
    count = round(model.recompute * ids.shape[1])
    return [sorted(np.argsort(-row)[:count].tolist()) for row in deviations]


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("step_size", [2, 5, 100])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_entries_of_the_worst_tokens_are_the_bases_own_reading_of_them(name, step_size, ratio):
    model, oracle = repairing(name, ratio)
    ids, times = token_ids(13), PrefillTimes()
    found = predict_base_cache(model, mx.array(ids), prefill_step_size=step_size, times=times)
    predicted, _ = oracle.prefill(ids)
    (positions,) = chosen_by_hand(model, ids)
    expected = oracle.base.rewrite(ids, predicted, np.array(positions), first_layer(model))
    assert_cache_equal(found, expected)
    assert times.recomputed_tokens == len(positions) == round(ratio * 13)
    assert times.recompute_ms > 0


@pytest.mark.parametrize("name", ["openelm prefix", "openelm from llama"])
def test_every_sequence_of_a_batch_has_its_own_worst_tokens(name):
    model, oracle = repairing(name, 0.3)
    ids = token_ids(11, batch=3)
    found = entries_of(predict_base_cache(model, mx.array(ids), prefill_step_size=4))
    predicted, _ = oracle.prefill(ids)
    chosen = chosen_by_hand(model, ids)
    assert len({tuple(row) for row in chosen}) > 1
    for row, positions in enumerate(chosen):
        own = [Entries(e.keys[row : row + 1], e.values[row : row + 1], e.positions) for e in predicted]
        expected = oracle.base.rewrite(ids[row : row + 1], own, np.array(positions), first_layer(model))
        for entries, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(entries.keys[row : row + 1], wanted.keys, atol=1e-5)
            np.testing.assert_allclose(entries.values[row : row + 1], wanted.values, atol=1e-5)


def test_on_top_of_a_cache_the_positions_count_on():
    model, oracle = repairing("llama prefix", 0.4)
    ids = token_ids(14)
    cache = predict_base_cache(model, mx.array(ids[:, :6]))
    before = entries_of(cache)
    predict_base_cache(model, mx.array(ids[:, 6:]), cache)
    (first,) = chosen_by_hand(model, ids[:, :6])
    held = oracle.base.rewrite(ids[:, :6], oracle.prefill(ids[:, :6])[0], np.array(first), first_layer(model))
    predicted, _ = oracle.prefill(ids[:, 6:], held, held)
    inputs, _ = auxiliary_prefill(model, mx.array(ids), make_prompt_cache(model.auxiliary))
    later = np.array(model.predictor.deviations(inputs))[0, 6:]
    positions = 6 + np.sort(np.argsort(-later)[: round(0.4 * 8)])
    assert_cache_equal(cache, oracle.base.rewrite(ids, predicted, positions, first_layer(model)))
    for entries, old in zip(entries_of(cache), before, strict=True):
        np.testing.assert_array_equal(entries.first(6).keys, old.keys)
        np.testing.assert_array_equal(entries.first(6).values, old.values)


@pytest.mark.parametrize("name", SETUPS)
def test_recomputing_everything_is_full_prefill(name):
    model, _ = repairing(name, 1.0)
    ids = mx.array(token_ids(12, batch=2))
    assert_cache_equal(predict_base_cache(model, ids), entries_of(base_prefill(model, ids)))


def test_worst_tokens_are_counted_per_sequence_and_rise():
    deviations = mx.array([[0.0, 5.0, 1.0, 4.0], [9.0, 0.0, 8.0, 7.0]])
    assert worst_tokens(deviations, 0.5).tolist() == [[1, 3], [0, 2]]
    assert worst_tokens(deviations, 0.1).shape == (2, 0)


def test_an_arm_sets_its_own_ratio():
    model, _ = repairing("llama prefix", 0.0)
    ids = mx.array(token_ids(12))
    _, found = arm_prefill(model, parse_arm("kvp-2-0.5"), ids)
    expected = predict_base_cache(replace(model, recompute=0.5), ids[:, :9])
    base_prefill(model, ids[:, 9:11], expected)
    assert_cache_equal(found, entries_of(expected))
    assert parse_arm("kvp-0-0").numbers == (0, 0.0)


@pytest.mark.parametrize("name", ["kvp-x", "kvp-1-2", "kvp-1-a", "kvp-1-0.5-3"])
def test_a_bad_arm_is_named(name):
    with pytest.raises(InputError):
        parse_arm(name)


def test_deviation_is_the_log_of_relative_value_errors():
    rng = np.random.default_rng(0)
    true = {layer: rng.normal(size=(1, 5, 4)) * (layer + 1) for layer in (2, 3)}
    wrong = {layer: values + rng.normal(size=values.shape) for layer, values in true.items()}
    pairs = [
        {layer: {"keys": mx.zeros((1, 5, 4)), "values": mx.array(values)} for layer, values in arrays.items()}
        for arrays in (wrong, true)
    ]
    expected = sum(((wrong[n] - true[n]) ** 2).sum(-1) / (true[n] ** 2).sum(-1).mean() for n in true)
    np.testing.assert_allclose(np.array(deviation(*pairs)), np.log(expected), rtol=1e-4)


def test_the_estimator_is_the_least_squares_fit(fitted):
    model = load(str(fitted))
    windows = [token_ids(64, seed=seed)[0].tolist() for seed in range(8)]
    explained = fit_deviation(model, windows)
    assert 0 < explained <= 1
    told, true = [], []
    for window in windows:
        ids = mx.array([window])
        _, raw = run_layers(model.base, ids, make_prompt_cache(model.base), range(len(model.base.layers)))
        inputs, _ = auxiliary_prefill(model, ids, make_prompt_cache(model.auxiliary))
        told.append(np.array(model.predictor.deviations(inputs))[0, 1:])
        true.append(by_hand(model.predictor(inputs), raw)[1:])
    told, true = np.concatenate(told), np.concatenate(true)
    assert told.mean() == pytest.approx(true.mean(), abs=1e-3)
    assert 1 - np.square(told - true).mean() / true.var() == pytest.approx(explained, abs=1e-3)


def by_hand(predicted, raw: dict[int, RawLayer]):
    """Return the deviations (T,) of one sequence in NumPy."""
    total = 0.0
    for layer, pair in predicted.items():
        values = np.array(raw[layer].values)[0]
        total = total + np.square(np.array(pair["values"])[0] - values).sum(-1) / np.square(values).sum(-1).mean()
    return np.log(total)


def test_a_fitted_bundle_can_recompute_and_does_not_unless_asked(fitted):
    assert load(str(fitted)).recompute == 0
    assert load(str(fitted), recompute=0.25).recompute == 0.25
    for bad in (-0.1, 1.5):
        with pytest.raises(InputError, match="between 0 and 1"):
            load(str(fitted), recompute=bad)
