"""Reading raw keys and values off mlx-lm's modules, and writing them back, against the NumPy oracle."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4_text, gpt2
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from support.oracle import rms_norm, rotate, split_heads
from support.tiny import (
    BASES,
    FAMILIES,
    assert_cache_equal,
    llama,
    openelm,
    oracle_of,
    quantised,
    small_llama,
    small_openelm,
    token_ids,
)

from kvp_mlx.errors import UnsupportedModelError
from kvp_mlx.models import sections
from kvp_mlx.models.entries import append_raw
from kvp_mlx.models.families import KVShape, check_cache, family_of, hidden_size, kv_shapes
from kvp_mlx.models.sections import output_head, prefix_model, run_layers

VARIANTS = BASES | {
    "small-llama": small_llama,
    "small-openelm": small_openelm,
    "llama-with-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-untied": lambda: llama(tie_word_embeddings=False),
    "openelm-untied": lambda: openelm(share_input_output_layers=False),
    "openelm-without-norms": lambda: openelm(normalize_qk_projections=False),
}
PROJECTIONS = {"llama": ["k_proj", "v_proj"], "openelm": ["qkv_proj"]}


def attentions(model):
    """Return every layer's attention module."""
    return [layer.get("self_attn") or layer["attn"] for layer in model.layers]


def projections(model):
    """Return the modules that are listened to, of all layers."""
    return [attention[name] for attention in attentions(model) for name in PROJECTIONS[model.model_type]]


def mine(captured, what):
    """Return what was heard of a layer: its projections' input, or what they returned."""
    return captured.hidden if what == "hidden" else captured.raw[what]


def names(model):
    return [name for name, _ in tree_flatten(model.parameters())]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_oracle_agrees_with_mlx_lm(variant):
    model, ids = VARIANTS[variant](), token_ids(9, batch=2)
    oracle, cache = oracle_of(model), make_prompt_cache(model)
    expected = oracle.forward(ids[:, :6])
    np.testing.assert_allclose(model(mx.array(ids[:, :6]), cache=cache), expected.logits, atol=1e-4)
    assert_cache_equal(cache, expected.cache)
    for position in range(6, 9):
        last = ids[:, position : position + 1]
        expected = oracle.forward(last, expected.cache)
        np.testing.assert_allclose(model(mx.array(last), cache=cache), expected.logits, atol=1e-4)


def test_shapes_of_keys_and_values():
    assert kv_shapes(llama()) == [KVShape(2, 8)] * 4
    assert kv_shapes(openelm()) == [KVShape(2, 16), KVShape(1, 16), KVShape(4, 16), KVShape(2, 16)]
    assert kv_shapes(small_llama()) == [KVShape(4, 12)] * 3
    assert [shape.width for shape in kv_shapes(small_openelm())] == [12, 48, 24]
    assert [hidden_size(build()) for build in (llama, openelm, small_llama, small_openelm)] == [64, 64, 48, 48]


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_do_not_change_with_quantisation(family):
    plain, small = FAMILIES[family](), quantised(FAMILIES[family]())
    assert any("scales" in name for name in names(small))
    assert (kv_shapes(small), hidden_size(small)) == (kv_shapes(plain), hidden_size(plain))


def test_an_unknown_architecture_is_refused_by_name():
    sizes = {"n_ctx": 8, "n_positions": 8, "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 8}
    args = gpt2.ModelArgs("gpt2", layer_norm_epsilon=1e-5, **sizes)
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' is not supported; supported: .*llama.*openelm"):
        family_of(gpt2.Model(args))


def test_a_cache_of_no_kind_is_refused_by_name():
    model = llama()
    model.make_cache = lambda: [RotatingKVCache(max_size=8, keep=4) for _ in model.layers]
    with pytest.raises(UnsupportedModelError, match="this llama model uses RotatingKVCache"):
        check_cache(model)


def test_layers_that_read_anothers_cache_are_refused():
    shared = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    args = gemma4_text.ModelArgs(num_hidden_layers=4, hidden_size=16, hidden_size_per_layer_input=0, **shared)
    with pytest.raises(UnsupportedModelError, match="this gemma4_text model uses another layer's cache"):
        check_cache(gemma4_text.Model(args))


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_layers_read_and_return_is_raw(variant):
    model, ids = VARIANTS[variant](), token_ids(7, batch=2)
    cache, expected = make_prompt_cache(model), oracle_of(model).forward(ids)
    listen = [0, len(model.layers) - 1]
    _, captured = run_layers(model, mx.array(ids), cache, listen)
    assert list(captured) == listen
    for layer in listen:
        for what in ("hidden", "keys", "values"):
            theirs = getattr(expected.readings[layer], what)
            np.testing.assert_allclose(mine(captured[layer], what), theirs, atol=1e-4, err_msg=f"{what} of {layer}")
    assert_cache_equal(cache, expected.cache)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_output_head_turns_what_comes_out_into_logits(variant):
    model, ids = VARIANTS[variant](), token_ids(7, batch=2)
    output, captured = run_layers(model, mx.array(ids), make_prompt_cache(model))
    assert captured == {}
    np.testing.assert_allclose(output_head(model, output), oracle_of(model).forward(ids).logits, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_appending_what_a_layer_returned_is_what_the_layer_appends(variant):
    model, ids = VARIANTS[variant](), token_ids(8, batch=2)
    cache, rebuilt = make_prompt_cache(model), make_prompt_cache(model)
    for chunk in (ids[:, :5], ids[:, 5:]):
        _, captured = run_layers(model, mx.array(chunk), cache, range(len(model.layers)))
        append_raw(model, {layer: one.raw for layer, one in captured.items()}, rebuilt)
    assert_cache_equal(rebuilt, oracle_of(model).forward(ids).cache)


def test_a_norm_over_all_heads_is_applied_over_all_heads():
    model, cache = llama(), KVCache()
    rng = np.random.default_rng(0)
    keys, weight = rng.normal(size=(2, 5, 16)), rng.uniform(0.5, 1.5, 16)
    model.layers[1].self_attn.k_norm = nn.RMSNorm(16, eps=1e-6)
    model.layers[1].self_attn.k_norm.weight = mx.array(weight, mx.float32)
    append_raw(model, {1: {"keys": mx.array(keys, mx.float32), "values": mx.array(keys, mx.float32)}}, {1: cache})
    expected = rotate(split_heads(rms_norm(keys, weight, 1e-6), 2), np.arange(5), 10000.0)
    np.testing.assert_allclose(cache.keys_and_values()[0], expected, atol=1e-5)
    np.testing.assert_allclose(cache.keys_and_values()[1], split_heads(keys, 2), atol=1e-5)


@pytest.mark.parametrize("variant", BASES)
def test_a_model_is_unchanged_by_listening(variant):
    model = BASES[variant]()
    before, modules = names(model), projections(model)
    run_layers(model, mx.array(token_ids(3)), make_prompt_cache(model), range(len(model.layers)))
    assert names(model) == before
    assert all(now is then for now, then in zip(projections(model), modules, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_unchanged_by_listening_that_fails(family, monkeypatch):
    model = FAMILIES[family]()
    before, modules = names(model), projections(model)
    ffn = type(model.layers[2].get("mlp") or model.layers[2]["ffn"])
    run_ffn, listen, calls, listened, meanwhile = ffn.__call__, sections._Listener.__call__, [], [], []

    def failing(*args):
        calls.append(args)
        if len(calls) < 3:
            return run_ffn(*args)
        meanwhile.extend(projections(model))
        raise RuntimeError("out of memory")

    def counting(self, *args):
        listened.append(self.module)
        return listen(self, *args)

    monkeypatch.setattr(ffn, "__call__", failing)
    monkeypatch.setattr(sections._Listener, "__call__", counting)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_layers(model, mx.array(token_ids(3)), make_prompt_cache(model), [1, 2])
    assert len(listened) == len(PROJECTIONS[family]) * 2
    assert all(now is then for now, then in zip(meanwhile, modules, strict=True))  # not even while it runs
    assert names(model) == before
    assert all(now is then for now, then in zip(projections(model), modules, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_shares_its_layers_and_leaves_the_base_alone(family):
    base = FAMILIES[family]()
    before = names(base)
    prefix = prefix_model(base, 2)
    assert [a is b for a, b in zip(prefix.layers, base.layers, strict=False)] == [True] * 3
    assert (len(prefix.layers), len(base.layers)) == (3, 4)
    assert names(base) == before
    assert len(make_prompt_cache(prefix)) == 3


@pytest.mark.parametrize("variant", BASES)
def test_a_prefix_reads_what_the_base_would(variant):
    base, ids = BASES[variant](), token_ids(7, batch=2)
    expected = oracle_of(base).forward(ids)
    prefix = prefix_model(base, 2)
    cache = make_prompt_cache(prefix)
    _, captured = run_layers(prefix, mx.array(ids), cache, [2])
    for what in ("hidden", "keys", "values"):
        np.testing.assert_allclose(mine(captured[2], what), getattr(expected.readings[2], what), atol=1e-4)
    assert_cache_equal(cache, expected.cache[:3])
