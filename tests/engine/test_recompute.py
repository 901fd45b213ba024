"""Selective recomputation and the exact tail against the NumPy oracle, and what chooses the tokens."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support import architectures, families
from support.architectures import CONFIGS as ARCHITECTURES
from support.architectures import bundle, random_ids
from support.families import CONFIGS as FAMILIES
from support.repair import ASKING_TOKENS, ATTENTION_REACH, SETUPS, read_below, repaired_by_hand, repairing
from support.tiny import (
    assert_cache_equal,
    entries_of,
    token_ids,
)

from kvp_mlx import load
from kvp_mlx.bundle.config import RecomputeConfig
from kvp_mlx.engine.auxiliary import auxiliary_prefill
from kvp_mlx.engine.context import Context
from kvp_mlx.engine.dial import Dial
from kvp_mlx.engine.prefill import PrefillTimes, base_prefill, predict_base_cache
from kvp_mlx.engine.recompute import largest, reached, spans
from kvp_mlx.errors import InputError
from kvp_mlx.models.families import kinds_of


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("step_size", [2, 5, 100])
@pytest.mark.parametrize(("ratio", "tail"), [(0.1, 0), (0.3, 0), (0.6, 0), (0.9, 0), (0.6, 3), (0.5, 20), (0.0, 4)])
def test_entries_of_the_chosen_tokens_are_the_bases_own_reading_of_them(name, step_size, ratio, tail):
    model, oracle = repairing(name)
    ids, times = token_ids(60), PrefillTimes()
    how = {"exact_tail": tail, "recompute": ratio, "prefill_step_size": step_size}
    found = predict_base_cache(model, mx.array(ids), times=times, **how)
    expected, positions = repaired_by_hand(model, oracle, ids, ratio, tail=tail)
    assert_cache_equal(found, expected)
    assert times.recomputed_tokens == len(positions) == tail + read_below(ratio, 60 - tail)
    assert times.recompute_ms > 0


@pytest.mark.parametrize("name", ["openelm prefix", "openelm from llama"])
def test_every_sequence_of_a_batch_has_its_own_tokens(name):
    model, oracle = repairing(name)
    ids = token_ids(54, batch=3)
    found = entries_of(predict_base_cache(model, mx.array(ids), recompute=0.6, prefill_step_size=4))
    rows = [repaired_by_hand(model, oracle, ids[row : row + 1], 0.6) for row in range(3)]
    assert len({tuple(positions) for _, positions in rows}) > 1
    for row, (expected, _) in enumerate(rows):
        for entries, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(entries.keys[row : row + 1], wanted.keys, atol=1e-5)
            np.testing.assert_allclose(entries.values[row : row + 1], wanted.values, atol=1e-5)


@pytest.mark.parametrize(("ratio", "tail"), [(0.6, 0), (0.0, 12), (0.9, 3)])
def test_progress_counts_what_the_base_reads_itself(ratio, tail):
    model, _ = repairing("llama prefix")
    calls = []
    how = {"exact_tail": tail, "recompute": ratio, "prefill_step_size": 10}
    predict_base_cache(model, mx.array(token_ids(60)), progress=lambda *call: calls.append(call), **how)
    done, totals = zip(*calls, strict=True)
    assert set(totals) == {60}
    assert list(done) == sorted(set(done))
    read_again = sum((span.last - span.first) * span.tokens for span in spans(model, ratio, 60, tail))
    assert done[5] == 60 * 60 // (60 + read_again) < 60 == done[-1]  # its one layer has read six chunks
    assert len(done) > 7


def test_progress_counts_what_is_read_before_and_after_prediction():
    model, _ = repairing("llama prefix")
    context, calls = Context(model), []
    how = {"progress": lambda *call: calls.append(call), "step_size": 10}
    context.read(token_ids(121)[0].tolist(), Dial("kvp", 80, 9), **how)
    done, totals = zip(*calls, strict=True)
    assert (set(totals), done[:8], done[-1]) == ({120}, tuple(range(10, 90, 10)), 120)
    assert list(done) == sorted(done)


def test_on_top_of_a_cache_the_positions_count_on():
    model, oracle = repairing("llama prefix")
    ids = token_ids(100)
    cache = predict_base_cache(model, mx.array(ids[:, :34]), recompute=0.6)
    before = entries_of(cache)
    predict_base_cache(model, mx.array(ids[:, 34:]), cache, recompute=0.6)
    held, _ = repaired_by_hand(model, oracle, ids[:, :34], 0.6)
    expected, positions = repaired_by_hand(model, oracle, ids, 0.6, held, held)
    assert positions.min() >= 34
    assert_cache_equal(cache, expected)
    for entries, old in zip(entries_of(cache), before, strict=True):
        np.testing.assert_array_equal(entries.first(34).keys, old.keys)
        np.testing.assert_array_equal(entries.first(34).values, old.values)


@pytest.mark.parametrize("name", SETUPS)
def test_recomputing_everything_is_full_prefill(name):
    model, _ = repairing(name)
    ids = mx.array(token_ids(12, batch=2))
    assert_cache_equal(predict_base_cache(model, ids, recompute=1.0), entries_of(base_prefill(model, ids)))


@pytest.mark.parametrize("name", [*ARCHITECTURES, *FAMILIES])
def test_every_architecture_that_keeps_entries_reads_them_again_in_their_places(name):
    base = architectures.tiny_model(name) if name in ARCHITECTURES else families.tiny_model(name)
    model, ids = bundle(base, 1), random_ids(30, 1)
    expected, found = (make_prompt_cache(base) for _ in range(2))
    base_prefill(model, ids, expected)
    predict_base_cache(model, ids, found, exact_tail=30)
    if all(kind.is_rewritable for kind in kinds_of(base)):
        assert_cache_equal(found, entries_of(expected), atol=2e-3)


def test_the_largest_are_found_per_sequence_and_rise():
    numbers = mx.array([[0.0, 5.0, 1.0, 4.0], [9.0, 0.0, 8.0, 7.0]])
    assert largest(numbers, 2).tolist() == [[1, 3], [0, 2]]
    assert largest(numbers, 0).shape == (2, 0)


def test_what_stands_after_an_attended_token_counts_as_attended():
    one = np.zeros((2, 20), dtype=np.float32)
    one[0, 7], one[1, 18], one[1, 0] = 0.5, 0.9, 0.1
    found = np.array(reached(mx.array(one), ATTENTION_REACH))
    assert np.flatnonzero(found[0]).tolist() == list(range(7, 7 + ATTENTION_REACH + 1))
    assert found[1].nonzero()[0].tolist() == [*range(ATTENTION_REACH + 1), 18, 19]
    assert found[1, 19] == np.float32(0.9)


def test_what_stands_before_an_attended_token_can_count_too():
    one = np.zeros((1, 20), dtype=np.float32)
    one[0, 1], one[0, 12] = 0.1, 0.5
    found = np.array(reached(mx.array(one), 2, 4))[0]
    assert found[:4] == pytest.approx([0.1] * 4)
    assert found[8:15] == pytest.approx([0.5] * 7)
    assert not found[[4, 5, 6, 7, *range(15, 20)]].any()


def test_what_the_end_attends_to_decides_where_all_deviate_alike():
    model, _ = repairing("llama prefix")
    model.predictor.deviation.linear.weight = mx.zeros_like(model.predictor.deviation.linear.weight)
    ids, entries = token_ids(60), []
    for seed in (1, 2):
        ids[:, -ASKING_TOKENS:] = token_ids(ASKING_TOKENS, seed=seed)
        found = predict_base_cache(model, mx.array(ids), recompute=0.5)
        entries.append(entries_of(found)[2].keys[:, :, :-ASKING_TOKENS])
    assert np.abs(entries[0] - entries[1]).max() > 1e-3


def test_a_fitted_bundle_can_recompute_and_does_not_unless_asked(fitted):
    config = load(str(fitted)).config
    assert Dial("kvp").share(config) == 0
    assert Dial("kvp", recompute=0.25).share(config) == 0.25
    for bad in (-0.1, 1.5):
        with pytest.raises(InputError, match="between 0 and 1"):
            Dial("kvp", recompute=bad)


def test_the_bundles_own_share_is_what_is_recomputed_unless_it_is_given():
    model, oracle = repairing("llama prefix")
    model = replace(model, config=model.config.model_copy(update={"recompute": RecomputeConfig(share=0.3)}))
    ids = token_ids(60)
    for given, ratio in ((None, 0.3), (0.6, 0.6)):
        found = predict_base_cache(model, mx.array(ids), recompute=given)
        assert_cache_equal(found, repaired_by_hand(model, oracle, ids, ratio)[0])


def test_a_bundles_own_settings_are_what_chooses():
    """Without attention and with all layers alike, the tokens that deviate most are read, and no others."""
    model, oracle = repairing("llama prefix")
    own = RecomputeConfig(asking_tokens=4, attention_weight=0.0, attention_reach=0, lower_layers=1.0, upper_from=0.0)
    model = replace(model, config=model.config.model_copy(update={"recompute": own}))
    ids = token_ids(60)
    inputs, _ = auxiliary_prefill(model, mx.array(ids), make_prompt_cache(model.auxiliary))
    harm = np.array(model.predictor.deviations(inputs))[0]
    wanted = np.sort([*np.argsort(-harm[:-4])[: round(0.3 * 60) - 4], *range(56, 60)])
    asked = oracle.base.rewrite(ids, oracle.prefill(ids)[0], {1: np.arange(56, 60)})
    expected = oracle.base.rewrite(ids, asked, {1: wanted})
    assert_cache_equal(predict_base_cache(model, mx.array(ids), recompute=0.3), expected)
