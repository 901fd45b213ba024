"""Selective recomputation and the exact tail against the NumPy oracle, and what chooses the tokens."""

import itertools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support.oracle import rotate, split_heads
from support.tiny import assert_cache_equal, entries_of, llama, openelm, paired, prefixed, small_llama, token_ids

from kvp_mlx import load
from kvp_mlx.arms.arm import arm_prefill, parse_arm
from kvp_mlx.engine.prefill import PrefillTimes, auxiliary_prefill, base_prefill, predict_base_cache
from kvp_mlx.engine.recompute import ASKING_TOKENS, ATTENTION_REACH, ATTENTION_WEIGHT, first_layer, largest, spread
from kvp_mlx.errors import InputError
from kvp_mlx.train.deviation import PENALTY, deviation, fit_deviation, harm, with_estimator
from kvp_mlx.train.objectives import predict
from kvp_mlx.train.teacher import make_batch, read, teach

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
    model.predictor.deviation.linear.weight = 0.2 * mx.random.normal(width, key=mx.random.key(3))
    return replace(model, recompute=ratio), oracle


def repaired_by_hand(model, oracle, ids, cache=None, auxiliary_cache=None, *, tail=0):
    """Return the oracle's cache of one sequence, ids (1, T) after a cache, and the positions that the base reads."""
    predicted, _ = oracle.prefill(ids[:, len(cache[0]) if cache else 0 :], cache, auxiliary_cache)
    begin, end = len(cache[0]) if cache else 0, ids.shape[1]
    start, depth = first_layer(model), oracle.base.depth
    middle = start + round(2 / 3 * (depth - start))
    others = end - begin - tail
    wanted = tail + read_below(model.recompute, others)
    above = tail + round(max(0, 4 * model.recompute - 1) / 3 * others)
    certain = max(tail, min(ASKING_TOKENS, wanted))
    harm = np.zeros(end - begin)
    if wanted > certain:
        inputs, _ = auxiliary_prefill(model, mx.array(ids), make_prompt_cache(model.auxiliary))
        harm = np.array(model.predictor.deviations(inputs))[0, begin:]
        if wanted - certain >= ASKING_TOKENS:
            asking = np.arange(end - ASKING_TOKENS, end)
            predicted = oracle.base.rewrite(ids, predicted, {start: asking})
            asked = most_attention(oracle.base, ids, predicted, asking, range(start, middle))
            asked = np.array([asked[max(0, i - ATTENTION_REACH) : i + 1].max() for i in range(begin, end)])
            harm = harm + ATTENTION_WEIGHT * np.log(asked + 1e-9)
    order = begin + np.concatenate([np.arange(end - begin)[-certain:], np.argsort(-harm[:-certain])])
    positions, few = np.sort(order[:wanted]), np.sort(order[: max(above, certain)])
    return oracle.base.rewrite(ids, predicted, {start: positions, middle: few}), positions


def read_below(ratio, others):
    """Return how many of the other tokens the lower layers read: half as many again up to a quarter, then less so."""
    return round((1.5 * ratio if ratio <= 0.25 else 1 / 6 + ratio * 5 / 6) * others)


def most_attention(base, ids, cache, asking, listened):
    """Return the largest attention (T,) of the asking tokens to each entry, over heads and some layers."""
    x, most = base.weights[f"{base.inner}.{base.embedding}.weight"][ids[:, asking]], np.zeros(ids.shape[1])
    for layer in range(base.depth):
        queries, _, _ = base.project(layer, base.norm(layer, base.attention_norm, x))
        queries = base.head_norm(layer, "q_norm", split_heads(queries, base.query_heads(layer)))
        queries = rotate(queries, asking, base.rope_base)
        keys = np.repeat(cache[layer].keys, queries.shape[1] // cache[layer].keys.shape[1], axis=1)
        scores = queries @ keys.swapaxes(2, 3) / np.sqrt(queries.shape[-1])
        weights = np.exp(np.where(np.arange(ids.shape[1]) <= asking[:, None], scores, -np.inf))
        weights /= weights.sum(axis=-1, keepdims=True)
        if layer in listened:
            most = np.maximum(most, weights.max(axis=(0, 1, 2)))
        values = np.repeat(cache[layer].values, queries.shape[1] // cache[layer].values.shape[1], axis=1)
        heads = (weights @ values).swapaxes(1, 2).reshape(1, len(asking), -1)
        x = x + base.output(layer, heads)
        x = x + base.ffn(layer, base.norm(layer, base.ffn_norm, x))
    return most


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("step_size", [2, 5, 100])
@pytest.mark.parametrize(("ratio", "tail"), [(0.1, 0), (0.3, 0), (0.6, 0), (0.9, 0), (0.6, 3), (0.5, 20), (0.0, 4)])
def test_entries_of_the_chosen_tokens_are_the_bases_own_reading_of_them(name, step_size, ratio, tail):
    model, oracle = repairing(name, ratio)
    ids, times = token_ids(60), PrefillTimes()
    found = predict_base_cache(model, mx.array(ids), exact_tail=tail, prefill_step_size=step_size, times=times)
    expected, positions = repaired_by_hand(model, oracle, ids, tail=tail)
    assert_cache_equal(found, expected)
    assert times.recomputed_tokens == len(positions) == tail + read_below(ratio, 60 - tail)
    assert times.recompute_ms > 0


@pytest.mark.parametrize("name", ["openelm prefix", "openelm from llama"])
def test_every_sequence_of_a_batch_has_its_own_tokens(name):
    model, oracle = repairing(name, 0.6)
    ids = token_ids(54, batch=3)
    found = entries_of(predict_base_cache(model, mx.array(ids), prefill_step_size=4))
    rows = [repaired_by_hand(model, oracle, ids[row : row + 1]) for row in range(3)]
    assert len({tuple(positions) for _, positions in rows}) > 1
    for row, (expected, _) in enumerate(rows):
        for entries, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(entries.keys[row : row + 1], wanted.keys, atol=1e-5)
            np.testing.assert_allclose(entries.values[row : row + 1], wanted.values, atol=1e-5)


def test_on_top_of_a_cache_the_positions_count_on():
    model, oracle = repairing("llama prefix", 0.6)
    ids = token_ids(100)
    cache = predict_base_cache(model, mx.array(ids[:, :34]))
    before = entries_of(cache)
    predict_base_cache(model, mx.array(ids[:, 34:]), cache)
    held, _ = repaired_by_hand(model, oracle, ids[:, :34])
    expected, positions = repaired_by_hand(model, oracle, ids, held, held)
    assert positions.min() >= 34
    assert_cache_equal(cache, expected)
    for entries, old in zip(entries_of(cache), before, strict=True):
        np.testing.assert_array_equal(entries.first(34).keys, old.keys)
        np.testing.assert_array_equal(entries.first(34).values, old.values)


@pytest.mark.parametrize("name", SETUPS)
def test_recomputing_everything_is_full_prefill(name):
    model, _ = repairing(name, 1.0)
    ids = mx.array(token_ids(12, batch=2))
    assert_cache_equal(predict_base_cache(model, ids), entries_of(base_prefill(model, ids)))


def test_the_largest_are_found_per_sequence_and_rise():
    numbers = mx.array([[0.0, 5.0, 1.0, 4.0], [9.0, 0.0, 8.0, 7.0]])
    assert largest(numbers, 2).tolist() == [[1, 3], [0, 2]]
    assert largest(numbers, 0).shape == (2, 0)


def test_what_stands_after_an_attended_token_counts_as_attended():
    one = np.zeros((2, 20), dtype=np.float32)
    one[0, 7], one[1, 18], one[1, 0] = 0.5, 0.9, 0.1
    found = np.array(spread(mx.array(one)))
    assert np.flatnonzero(found[0]).tolist() == list(range(7, 7 + ATTENTION_REACH + 1))
    assert found[1].nonzero()[0].tolist() == [*range(ATTENTION_REACH + 1), 18, 19]
    assert found[1, 19] == np.float32(0.9)


def test_what_the_end_attends_to_decides_where_all_deviate_alike():
    model, _ = repairing("llama prefix", 0.5)
    model.predictor.deviation.linear.weight = mx.zeros_like(model.predictor.deviation.linear.weight)
    ids, entries = token_ids(60), []
    for seed in (1, 2):
        ids[:, -ASKING_TOKENS:] = token_ids(ASKING_TOKENS, seed=seed)
        entries.append(entries_of(predict_base_cache(model, mx.array(ids)))[2].keys[:, :, :-ASKING_TOKENS])
    assert np.abs(entries[0] - entries[1]).max() > 1e-3


def test_an_arm_sets_its_own_ratio_and_tail():
    model, _ = repairing("llama prefix", 0.0)
    ids = mx.array(token_ids(40))
    _, found = arm_prefill(model, parse_arm("kvp-2-0.5"), ids)
    expected = predict_base_cache(replace(model, recompute=0.5), ids[:, :-1], exact_tail=2)
    assert_cache_equal(found, entries_of(expected))
    assert parse_arm("kvp-0-0").numbers == (0, 0.0)


@pytest.mark.parametrize("name", ["kvp-x", "kvp-1-2", "kvp-1-a", "kvp-1-0.5-3"])
def test_a_bad_arm_is_named(name):
    with pytest.raises(InputError):
        parse_arm(name)


@pytest.mark.parametrize(
    "make", [SETUPS["llama prefix"], lambda: paired(llama(), small_llama(), ((0,), (0,), (1,), (2,)))]
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
    told = np.array(deviation(model, teacher, reading, split))[0]
    np.testing.assert_allclose(told, np.log(error) + 0.5 * np.log(found), atol=1e-4)
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
    explained = fit_deviation(model, [*windows, [1, 2, 3]])  # the last one is too short to tell anything
    assert 0 < explained <= 1
    x, y = [], []
    for window in windows:
        teacher = teach(model, make_batch([window]))
        centred = np.array(deviation(model, teacher, teacher.reading, 48), dtype=np.float64)[0, 1:-ASKING_TOKENS]
        y.append(centred - centred.mean())
        inputs, _ = auxiliary_prefill(model, mx.array([window]), make_prompt_cache(model.auxiliary))
        x.append(np.array(inputs[model.predictor.blocks[-1].name], dtype=np.float64)[0, 1 : 48 - ASKING_TOKENS])
        told = np.array(model.predictor.deviations(inputs))[0, 1 : 48 - ASKING_TOKENS]
        x[-1] = np.concatenate([x[-1], told[:, None]], axis=1)
    x, y = np.concatenate(x), np.concatenate(y)
    x, told = x[:, :-1] - x[:, :-1].mean(axis=0), x[:, -1]
    assert 1 - np.square(told - y).mean() / y.var() == pytest.approx(explained, abs=1e-3)
    penalty = PENALTY * np.square(x).sum() / x.shape[1]
    weight = np.array(model.predictor.deviation.linear.weight)[0]
    np.testing.assert_allclose(x.T @ (y - x @ weight), penalty * weight, atol=1e-3 * np.abs(penalty * weight).max())


def test_an_estimator_that_is_not_fitted_takes_all_tokens_for_alike():
    model = with_estimator(SETUPS["llama prefix"]()[0])
    inputs, _ = auxiliary_prefill(model, mx.array(token_ids(12)), make_prompt_cache(model.auxiliary))
    assert np.ptp(np.array(model.predictor.deviations(inputs))) == 0


def test_windows_too_short_to_judge_fit_nothing(fitted):
    assert fit_deviation(load(str(fitted)), [[1, 2, 3]] * 3) is None


def test_a_fitted_bundle_can_recompute_and_does_not_unless_asked(fitted):
    assert load(str(fitted)).recompute == 0
    assert load(str(fitted), recompute=0.25).recompute == 0.25
    for bad in (-0.1, 1.5):
        with pytest.raises(InputError, match="between 0 and 1"):
            load(str(fitted), recompute=bad)
