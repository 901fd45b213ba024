"""Arms on models of several kinds of layer: what is counted of their work, and what is refused."""

from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear
from support.architectures import WINDOW, bundle, random_ids, tiny_model
from support.tiny import estimating

import kvp_mlx
from kvp_mlx.arms.kinds import parse_arm
from kvp_mlx.arms.work import kv_work, layer_work, mean_entries, predictor_work, recompute_work, state_flops
from kvp_mlx.errors import InputError
from kvp_mlx.models.families import kinds_of, text_model
from kvp_mlx.models.kinds.sliding import Sliding

NAMES = ["qwen3_5", "qwen3_5_moe", "qwen3_next", "gpt_oss", "gemma3_text", "lfm2_moe", "deepseek_v3", "qwen3_moe"]
TOKENS, BATCH = 40, 2


@pytest.fixture
def counted(monkeypatch):
    """FLOPs of every linear map that is called, by the identity of the module."""
    flops = Counter()

    def count(kind, rows):
        call = kind.__call__

        def counting(self, x, *rest, **options):
            flops[id(self)] += 2 * rows(self, x, *rest) * self.weight.shape[-1] * self.weight.shape[-2]
            return call(self, x, *rest, **options)

        monkeypatch.setattr(kind, "__call__", counting)

    count(nn.Linear, lambda self, x: x.size // x.shape[-1])
    count(SwitchLinear, lambda self, x, indices, *_: indices.size)
    count(MultiLinear, lambda self, x, *_: x.shape[0] * self.weight.shape[0] * x.shape[-2])
    return flops


def attended(model, layer):
    """FLOPs of scores, weighted values and states of one layer, token by token."""
    kind, mixer = kinds_of(model)[layer], model.layers[layer][kinds_of(model)[layer].mixer]
    window = kind.window if isinstance(kind, Sliding) else TOKENS
    pairs = sum(min(token + 1, window) for token in range(TOKENS))
    return BATCH * (pairs * kind.pair_flops(mixer) + TOKENS * kind.state_flops(mixer))


@pytest.mark.parametrize("name", NAMES)
def test_work_of_a_layer_is_what_it_calls(name, counted):
    model = text_model(tiny_model(name))
    model(random_ids(TOKENS, BATCH), cache=make_prompt_cache(model))
    for number, layer in enumerate(model.layers):
        called = sum(counted[id(module)] for module in layer.modules())
        assert called > 0
        expected = called + attended(model, number)
        assert layer_work(model, number, TOKENS, BATCH).flops == pytest.approx(expected, rel=1e-9), number


@pytest.mark.parametrize("name", NAMES)
def test_work_of_the_maps_is_what_they_are_called_with(name, counted):
    model = bundle(text_model(tiny_model(name)), 1)
    kvp_mlx.predict_base_cache(model, random_ids(TOKENS, BATCH), prefill_step_size=TOKENS)
    called = sum(counted[id(linear)] for linear in model.predictor.maps.values())
    layers = {layer for block in model.predictor.blocks for layer, _, _ in block.targets}
    kept = sum(BATCH * TOKENS * state_flops(model.base, layer) for layer in layers)
    assert predictor_work(model, TOKENS, BATCH).flops == pytest.approx(called + kept, rel=1e-9)
    if any(isinstance(kind, Sliding) for kind in kinds_of(model.base)[2:]):
        whole = sum(2 * TOKENS * BATCH * linear.weight.size for linear in model.predictor.maps.values())
        assert called < whole


def test_experts_count_as_active():
    few, many = (tiny_model("qwen3_moe", num_experts=experts) for experts in (4, 16))
    routers = 2 * TOKENS * 32 * (16 - 4)
    assert layer_work(many, 0, TOKENS, 1).flops - layer_work(few, 0, TOKENS, 1).flops == routers


def test_entries_that_a_window_shows():
    model = tiny_model("gpt_oss")
    for tokens in (1, WINDOW - 1, WINDOW, WINDOW + 1, 100):
        expected = [np.mean([min(t + 1, window) for t in range(tokens)]) for window in (WINDOW, tokens)]
        assert [mean_entries(model, layer, tokens) for layer in (0, 1)] == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_alone_takes_less_than_a_layer(name):
    model = text_model(tiny_model(name))
    for layer in range(len(model.layers)):
        assert 0 < kv_work(model, layer, TOKENS, 1).flops < layer_work(model, layer, TOKENS, 1).flops


def test_recomputing_latents_counts():
    model = estimating(bundle(tiny_model("deepseek_v3"), 1))
    works = [recompute_work(model, 100, 1, share, 4).flops for share in (0.0, 0.2, 0.6)]
    assert 0 < works[0] < works[1] < works[2]


@pytest.mark.parametrize("arm", ["random-0.5", "static-0.5", "lazy-0.8-0.4", "spec-0.5"])
@pytest.mark.parametrize("name", ["qwen3_5", "gpt_oss", "lfm2"])
def test_arms_that_leave_tokens_out_are_refused_by_kind(name, arm):
    model = bundle(text_model(tiny_model(name)), 1)
    kinds = {"qwen3_5": "gated delta net", "gpt_oss": "sliding attention", "lfm2": "short convolution"}
    with pytest.raises(InputError, match=f"{arm} leaves tokens out, which layers of {kinds[name]}"):
        parse_arm(arm).read(model, random_ids(20, 1))


@pytest.mark.parametrize("arm", ["full", "kvp", "kvp-5", "random-1", "static-1", "lazy-1-1"])
def test_arms_on_latents_are_the_full_model_where_they_leave_nothing_out(arm):
    base, ids = tiny_model("deepseek_v3"), random_ids(30, 2)
    depth = len(base.layers)
    network, cache = parse_arm(arm).read(bundle(base, depth - 1), ids)
    own = make_prompt_cache(base)
    base(ids[:, :-1], cache=own)
    found = network(ids[:, -1:], cache=cache)
    np.testing.assert_allclose(found, base(ids[:, -1:], cache=own), atol=1e-4)
    assert mx.isfinite(found).all()
