"""The arms of prediction read as the engine does: with the dial of their name, or as a quality is read."""

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from support.tiny import assert_cache_equal, entries_of, estimating, llama, prefixed, token_ids

from kvp_mlx.arms.kinds import parse_arm
from kvp_mlx.arms.work import kvp_work, recompute_work
from kvp_mlx.bundle.config import MeasuredDial
from kvp_mlx.engine.context import Context
from kvp_mlx.engine.dial import dial_of
from kvp_mlx.engine.prefill import predict_base_cache
from kvp_mlx.errors import InputError


def test_an_arm_sets_its_own_ratio_and_tail():
    model = estimating(prefixed(llama(), 1)[0])
    ids = mx.array(token_ids(40))
    _, found = parse_arm("kvp-2-0.5").read(model, ids)
    expected = predict_base_cache(model, ids[:, :-1], exact_tail=2, recompute=0.5)
    assert_cache_equal(found, entries_of(expected))
    assert parse_arm("kvp-0-0").numbers == (0, 0.0)


def test_an_arm_refines_what_it_predicts_as_its_name_says():
    model = estimating(prefixed(llama(), 1)[0])
    refined = parse_arm("kvp-2-0.5+32")
    assert [refined.refine_tokens(model, tokens) for tokens in (2, 40)] == [0, 32]  # two are read in full
    assert refined.work(model, 40) == parse_arm("kvp-2-0.5").work(model, 40)
    assert parse_arm("kvp-2-0.5").refine_tokens(model, 40) == parse_arm("full").refine_tokens(model, 40) == 0
    dials = (MeasuredDial(quality="balanced", from_tokens=90, exact_head=0, exact_tail=8, refine_tokens=16),)
    model = replace(model, config=model.config.model_copy(update={"dials": dials}))
    assert [parse_arm("balanced").refine_tokens(model, tokens) for tokens in (80, 100)] == [0, 16]
    assert parse_arm("fast").refine_tokens(model, 100) == 32


@pytest.mark.parametrize("name", ["kvp-x", "kvp-1-2", "kvp-1-a", "kvp-1-0.5-3", "kvp-1+3", "kvp-1-0.5+", "kvp-1-0+0.5"])
def test_a_bad_arm_is_named(name):
    with pytest.raises(InputError):
        parse_arm(name)


DIALS = (
    MeasuredDial(quality="balanced", from_tokens=0, path="full"),
    MeasuredDial(quality="balanced", from_tokens=90, exact_head=0, exact_tail=8, recompute=0.5),
    MeasuredDial(quality="balanced", from_tokens=120, exact_head=0, exact_tail=4, recompute=0.1),
)


@pytest.mark.parametrize("quality", ["balanced", "fast"])
@pytest.mark.parametrize("dials", [(), DIALS])
@pytest.mark.parametrize("tokens", [20, 80, 100, 140])
def test_a_quality_is_read_as_a_request_of_it_is(quality, dials, tokens):
    model = estimating(prefixed(llama(), 1)[0])
    model = replace(model, config=model.config.model_copy(update={"dials": dials}))
    ids = token_ids(tokens)[0].tolist()
    _, found = parse_arm(quality).read(model, mx.array([ids]))
    context = Context(model)
    context.read(ids, dial_of(quality).at(model.config, tokens).settled(model.config, tokens, 0, 64))
    assert_cache_equal(found, entries_of(context.cache))


@pytest.mark.parametrize("tokens", [80, 100, 140])
def test_the_work_of_a_quality_is_that_of_what_it_means(tokens):
    model = estimating(prefixed(llama(), 1)[0])
    model = replace(model, config=model.config.model_copy(update={"dials": DIALS}))
    meant = {80: "full", 100: "kvp-8-0.5", 140: "kvp-4-0.1"}[tokens]
    assert parse_arm("balanced").work(model, tokens) == parse_arm(meant).work(model, tokens)


def test_an_exact_head_is_work_too():
    model = estimating(prefixed(llama(), 1)[0])
    without = parse_arm("kvp-32").work(model, 140).flops
    assert without < parse_arm("balanced").work(model, 140).flops < parse_arm("full").work(model, 140).flops


def test_the_bases_weights_are_read_once():
    """The last token goes through its layers with what is recomputed; with nothing, it goes alone."""
    model = estimating(prefixed(llama(), 1)[0])
    layers = [sum(array.nbytes for _, array in tree_flatten(layer.parameters())) for layer in model.base.layers]
    alone, joined = (kvp_work(model, 200, 1, share) for share in (0.0, 1.0))
    again = recompute_work(model, 199, 1, 1.0, 0)
    assert joined.weight_bytes == pytest.approx(alone.weight_bytes + again.weight_bytes - sum(layers[:-1]))
    assert joined.flops == pytest.approx(alone.flops + again.flops)


def test_what_lazyllm_left_out_does_not_come_back():
    with pytest.raises(InputError, match="falls with depth"):
        parse_arm("lazy-0.3-0.9")
    assert parse_arm("lazy-0.3-0.3").numbers == (0.3, 0.3)
