"""The prompt's last token and its exact head, read with the tail, and the layer that tells what the end looks at."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support.oracle import Entries
from support.repair import SETUPS, most_attention, read_below, repaired_by_hand, repairing
from support.tiny import assert_cache_equal, entries_of, token_ids

from kvp_mlx.arms.clock import first_token
from kvp_mlx.arms.kinds import parse_arm
from kvp_mlx.bundle.config import BundleConfig, RecomputeConfig
from kvp_mlx.engine import prefill
from kvp_mlx.engine.auxiliary import auxiliary_cache_for, auxiliary_prefill
from kvp_mlx.engine.context import Context
from kvp_mlx.engine.dial import Dial
from kvp_mlx.engine.prefill import PrefillTimes, fill
from kvp_mlx.engine.recompute import largest
from kvp_mlx.models.sections import output_head

N = 60


def filled(model, ids, dial, **how):
    """Return the caches after a prompt, and what was made of its last token."""
    cache = make_prompt_cache(model.base)
    return cache, fill(model, mx.array(ids), cache, auxiliary_cache_for(model, cache), dial, **how).output


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("step_size", [7, 100])
@pytest.mark.parametrize(("ratio", "tail"), [(0.0, 4), (0.3, 0), (0.6, 3), (0.5, 100), (1.0, 0)])
def test_it_is_one_more_token_of_the_tail(name, step_size, ratio, tail):
    model, oracle = repairing(name)
    ids, times, calls = token_ids(N), PrefillTimes(), []
    how = {"prefill_step_size": step_size, "times": times, "progress": lambda *call: calls.append(call)}
    cache, output = filled(model, ids, Dial("kvp", 0, tail, ratio), with_last=True, **how)
    tail = min(tail, N - 1)
    expected, _ = repaired_by_hand(model, oracle, ids, ratio, tail=tail + 1)
    assert_cache_equal(cache, expected)
    assert times.recomputed_tokens == tail + read_below(ratio, N - 1 - tail)
    assert calls[-1] == (N - 1, N - 1)
    assert calls == sorted(calls)
    before = [Entries(layer.keys[:, :, :-1], layer.values[:, :, :-1], layer.positions[:-1]) for layer in expected]
    step = oracle.base.forward(ids[:, -1:], before)
    np.testing.assert_allclose(output_head(model.base, output)[0, -1], step.logits[0, -1], atol=1e-4)


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("step_size", [7, 100])
@pytest.mark.parametrize(
    ("ratio", "tail", "head"), [(0.0, 4, 6), (0.3, 0, 12), (0.6, 3, 1), (0.5, 100, 40), (1.0, 0, 9)]
)
def test_a_short_head_is_read_with_the_tail(name, step_size, ratio, tail, head):
    model, oracle = repairing(name)
    ids, times, dial = token_ids(N), PrefillTimes(), Dial("kvp", head, tail, ratio)
    cache, output = filled(model, ids, dial, with_last=True, prefill_step_size=step_size, times=times)
    tail = min(tail, N - 1 - head)
    expected, _ = repaired_by_hand(model, oracle, ids, ratio, tail=tail + 1, head=head)
    assert_cache_equal(cache, expected)
    assert times.recomputed_tokens == tail + read_below(ratio, N - 1 - tail - head)
    assert times.base_prefill_ms == 0
    exact = oracle.base.forward(ids[:, :head]).cache
    for layer, true in zip(cache, exact, strict=True):
        keys, values = layer.keys_and_values()
        np.testing.assert_allclose(keys[:, :, :head], true.keys, atol=1e-4)
        np.testing.assert_allclose(values[:, :, :head], true.values, atol=1e-4)
    assert output is not None


def test_a_long_head_is_read_ahead_and_so_is_one_before_mere_predictions(monkeypatch):
    model, oracle = repairing("llama prefix")
    ids = token_ids(N)
    for dial, most in ((Dial("kvp", 20, 4, 0.0), 19), (Dial("kvp", 20, 0, 0.0), 64)):
        monkeypatch.setattr(prefill, "MOST_JOINED_TOKENS", most)
        times = PrefillTimes()
        cache, _ = filled(model, ids, dial, times=times)
        assert times.base_prefill_ms > 0
        predicted, _ = oracle.prefill(ids[:, 20:-1], oracle.base.forward(ids[:, :20]).cache)
        if not dial.exact_tail:
            assert_cache_equal(cache, predicted)


@pytest.mark.parametrize("head", [8, 20])
def test_a_reading_that_is_cut_short_keeps_no_predicted_head(head, monkeypatch):
    """Entries that wait to be read by the base are not exact."""
    monkeypatch.setattr(prefill, "MOST_JOINED_TOKENS", 10)
    model, _ = repairing("llama prefix")
    ids, dial = token_ids(N)[0].tolist(), Dial("kvp", head, 4, 0.0)
    context = Context(model)
    steps = context.reading(ids, dial, with_last=True, step_size=16)
    for _ in range(4):
        next(steps)
    steps.close()
    kept = 0 if head == 8 else 20
    assert context.tokens == ids[:kept]
    assert context.exact_tokens == kept
    context.read(ids, dial, with_last=True)
    whole = Context(model)
    whole.read(ids, dial, with_last=True)
    assert_cache_equal(context.cache, entries_of(whole.cache))
    assert context.exact_tokens == whole.exact_tokens == head


@pytest.mark.parametrize("name", SETUPS)
def test_it_waits_for_its_own_step_where_nothing_is_read_on_top_of_a_prediction(name):
    model, _ = repairing(name)
    for dial in (Dial("kvp", 0, 0, 0.0), Dial("full", 0, 0), Dial("kvp", N, 4, 0.0)):
        cache, output = filled(model, token_ids(N), dial, with_last=True)
        assert output is None
        assert cache[0].offset == N - 1
    cache, output = filled(model, token_ids(N), Dial("kvp", 0, 4, 0.0))
    assert output is None
    assert cache[0].offset == N - 1


@pytest.mark.parametrize("name", SETUPS)
def test_the_clocks_first_token_is_that_of_a_step_of_its_own(name):
    model, _ = repairing(name)
    ids = mx.array(token_ids(N))
    arm = parse_arm("kvp-5")
    first = first_token(model, arm, ids)
    network, cache = arm.read(model, ids)
    logits = network(ids[:, -1:], cache=cache)[:, -1]
    np.testing.assert_allclose(first.logits, logits, atol=1e-4)
    assert_cache_equal(first.cache, entries_of(cache))


@pytest.mark.parametrize("name", SETUPS)
def test_a_context_holds_it_and_goes_on_behind_it(name):
    model, _ = repairing(name)
    ids, dial = token_ids(N)[0].tolist(), Dial("kvp", 0, 4, 0.0)
    context = Context(model)
    assert context.read(ids, dial, with_last=True) is not None
    assert context.tokens == ids
    assert context.exact_tokens == 0
    context.read([*ids, 5, 6, 7], dial)
    other = Context(model)
    other.read([*ids, 5], dial)
    other.read([*ids, 5, 6, 7], dial)
    assert context.tokens == other.tokens


def test_the_layer_behind_an_exact_prefix_can_tell_what_the_end_looks_at():
    """The prompt's end is not read ahead, and the tokens that it looks at there are chosen."""
    model, oracle = repairing("llama prefix")
    own = RecomputeConfig(asking_tokens=4, asks="prefix", attention_reach=0, lower_layers=1.0)
    model = replace(model, config=model.config.model_copy(update={"recompute": own}))
    ids = token_ids(N)
    inputs, _ = auxiliary_prefill(model, mx.array(ids), make_prompt_cache(model.auxiliary))
    predicted, _ = oracle.prefill(ids)
    asked = most_attention(oracle.base, ids, predicted, np.arange(N - 4, N), range(1, 2))
    harm = np.array(model.predictor.deviations(inputs))[0] + 0.5 * np.log(asked + 1e-9)
    harm[-4:] = np.inf
    wanted = np.array(largest(mx.array(harm[None]), round(0.3 * (N - 1)) + 1))[0]
    cache, _ = filled(model, ids, Dial("kvp", 0, 0, 0.3), with_last=True)
    assert_cache_equal(cache, oracle.base.rewrite(ids, predicted, {1: wanted}))


@pytest.mark.parametrize("kind", ["model", "pruned"])
def test_only_an_exact_prefix_can_ask(kind):
    retained = {"retained_layers": [0]} if kind == "pruned" else {}
    data = {
        "base": {"fingerprint": "", "path": "."},
        "auxiliary": {"kind": kind, "layers": 1, **retained},
        "predictor": {"input": "hidden_state", "layer_map": [[0]]},
        "recompute": {"asks": "prefix"},
    }
    with pytest.raises(ValueError, match="an exact prefix alone can ask"):
        BundleConfig.model_validate(data)
