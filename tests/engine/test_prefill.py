"""Prefill and prediction against the NumPy oracle and against mlx-lm's own prefill."""

import functools
import io
import re

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import stream_generate as mlx_lm_stream_generate
from mlx_lm.models.cache import make_prompt_cache
from support.tiny import (
    BASES,
    FAMILIES,
    assert_cache_equal,
    chat_tokenizer,
    entries_of,
    itself,
    llama,
    openelm,
    paired,
    prefixed,
    pruned,
    quantised,
    small_llama,
    small_openelm,
    token_ids,
)

from kvp_mlx.engine.auxiliary import auxiliary_cache_for, auxiliary_prefill
from kvp_mlx.engine.clock import Ready, time_first_token
from kvp_mlx.engine.decode import decode
from kvp_mlx.engine.prefill import (
    PrefillTimes,
    base_prefill,
    predict_base_cache,
)
from kvp_mlx.engine.prompt import encode
from kvp_mlx.engine.reply import stream_generate
from kvp_mlx.errors import InputError

TWO_SOURCES = ((0, 1), (0, 1), (1, 2), (2, 1))
ONE_SOURCE = ((0,), (0,), (1,), (2,))

SETUPS = {
    "llama from llama": lambda: paired(llama(), small_llama(), ONE_SOURCE),
    "openelm from openelm": lambda: paired(openelm(), small_openelm(), ONE_SOURCE),
    "llama from openelm, two sources": lambda: paired(llama(), small_openelm(), TWO_SOURCES),
    "openelm from llama, two sources": lambda: paired(openelm(), small_llama(), TWO_SOURCES),
    "openelm from hidden states": lambda: paired(openelm(), small_llama(), TWO_SOURCES, reads="hidden_state"),
    "8-bit openelm from 8-bit openelm": lambda: paired(quantised(openelm()), quantised(small_openelm()), ONE_SOURCE),
    "pruned llama": lambda: paired(llama(), pruned(llama(), [0, 2]), ((0,), (0,), (1,), (1,)), retained=[0, 2]),
    "pruned openelm": lambda: paired(openelm(), pruned(openelm(), [0, 2]), ((0,), (0,), (1,), (1,)), retained=[0, 2]),
    "llama prefix": lambda: prefixed(llama(), 1),
    "openelm prefix": lambda: prefixed(openelm(), 1),
    "8-bit llama prefix": lambda: prefixed(quantised(llama()), 1),
    "openelm prefix, two sources": lambda: prefixed(openelm(), 1, (None, None, (0, 1), (1, 0))),
    "llama prefix, a token before": lambda: prefixed(llama(), 1, preceding=1),
    "openelm prefix, three tokens before": lambda: prefixed(openelm(), 1, preceding=3),
    "openelm from openelm, a token before": lambda: paired(openelm(), small_openelm(), ONE_SOURCE, preceding=1),
    "openelm prefix from keys and values": lambda: prefixed(openelm(), 1, reads="keys_values"),
}
KINDS = [
    "llama from openelm, two sources",
    "pruned openelm",
    "llama prefix",
    "openelm prefix",
    "llama prefix, a token before",
]


@functools.cache
def setup(name):
    """Return a KVPModel and its oracle, made once: no test changes them."""
    return SETUPS[name]()


def with_tokenizer(model, **config):
    """Return a copy of a KVPModel that can turn tokens into text."""
    parts = vars(model) | {"tokenizer": chat_tokenizer(), "base_config": config}
    return type(model)(**parts)


def trimmed(layer, length):
    """Drop what mlx-lm read ahead of the first ``length`` positions."""
    layer.trim(layer.offset - length)
    return layer


def failing(*_args, **_options):
    raise RuntimeError("out of memory")


def next_logits(model, ids, cache):
    """Let the base read ids (B, T) one by one on a cache; returns all their logits."""
    return np.concatenate(
        [np.array(model.base(mx.array(ids[:, t : t + 1]), cache=cache)) for t in range(ids.shape[1])], 1
    )


def oracle_tokens(oracle, ids, cache, count):
    """Return what the oracle's base generates greedily when it reads ids on top of a cache."""
    tokens, ids = [], np.array(ids)
    for _ in range(count):
        read = oracle.base.forward(ids, cache)
        tokens.append(int(read.logits[0, -1].argmax()))
        ids, cache = np.array([[tokens[-1]]]), read.cache
    return tokens


def matmuls(outputs):
    """Count the matrix products that evaluating some arrays takes."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *[leaf for _, leaf in tree_flatten(outputs) if isinstance(leaf, mx.array)])
    return len(re.findall(r'label ?= ?"(?:Matmul|AddMM)"', graph.getvalue()))


@pytest.mark.parametrize("base", BASES)
def test_a_perfect_prediction_changes_nothing(base):
    model, ids = itself(BASES[base]()), token_ids(12, batch=2)
    cache, own = predict_base_cache(model, mx.array(ids[:, :-1])), make_prompt_cache(model.base)
    logits = model.base(mx.array(ids[:, -1:]), cache=cache)[:, -1]
    expected = model.base(mx.array(ids), cache=own)[:, -1]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    for _ in range(4):
        token = mx.argmax(expected, axis=-1)[:, None]
        logits, expected = (model.base(token, cache=kept)[:, -1] for kept in (cache, own))
        np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_a_prefix_of_all_layers_but_the_last_is_exact(base):
    model, oracle = prefixed(BASES[base](), 3)
    assert oracle.layer_map == [None] * 4
    ids, own = token_ids(12, batch=2), make_prompt_cache(model.base)
    cache = predict_base_cache(model, mx.array(ids[:, :-1]), prefill_step_size=5)
    # in the same chunks, since other shapes round differently (by up to 1.1e-5 here)
    *_, expected = [model.base(mx.array(part), cache=own) for part in np.split(ids, [5, 10, 11], axis=1)]
    assert_cache_equal(cache, [layer.first(11) for layer in entries_of(own)], atol=1e-5)
    np.testing.assert_allclose(next_logits(model, ids[:, -1:], cache), expected, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_a_prefix_is_exact_up_to_the_layer_it_reads_and_predicted_after(base):
    model, oracle = prefixed(BASES[base](), 2)
    ids, own = token_ids(11, batch=2), make_prompt_cache(model.base)
    cache = predict_base_cache(model, mx.array(ids), prefill_step_size=4)
    model.base(mx.array(ids), cache=own)
    assert_cache_equal(cache[:3], entries_of(own)[:3], atol=1e-5)
    assert_cache_equal(cache, oracle.prefill(ids)[0])
    assert np.abs(entries_of(cache)[3].values - entries_of(own)[3].values).max() > 0.1


@pytest.mark.parametrize("step_size", [1, 3, 5, 100])
@pytest.mark.parametrize("name", SETUPS)
def test_predictions_are_the_oracles_at_any_chunk_size(name, step_size):
    model, oracle = setup(name)
    ids = token_ids(14, batch=3)
    cache = predict_base_cache(model, mx.array(ids[:, :11]), prefill_step_size=step_size)
    expected, _ = oracle.prefill(ids[:, :11])
    assert_cache_equal(cache, expected)
    logits = oracle.base.forward(ids[:, 11:], expected).logits
    np.testing.assert_allclose(next_logits(model, ids[:, 11:], cache), logits, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_predictions_count_on_from_what_the_cache_holds(name):
    model, oracle = setup(name)
    ids = token_ids(13, batch=2)
    cache = base_prefill(model, mx.array(ids[:, :4]))
    auxiliary_cache = auxiliary_cache_for(model, cache)
    if not model.is_prefix:
        auxiliary_prefill(model, mx.array(ids[:, :4]), auxiliary_cache)
    predict_base_cache(model, mx.array(ids[:, 4:9]), cache, auxiliary_cache, prefill_step_size=2)
    base_prefill(model, mx.array(ids[:, 9:]), cache)

    expected = oracle.base.forward(ids[:, :4]).cache
    expected, _ = oracle.prefill(ids[:, 4:9], expected, oracle.auxiliary.forward(ids[:, :4]).cache)
    assert_cache_equal(cache, oracle.base.forward(ids[:, 9:], expected).cache)


@pytest.mark.parametrize("tail", [1, 3, 8])
@pytest.mark.parametrize("name", KINDS)
def test_the_base_reads_an_exact_tail_on_top_of_the_prediction(name, tail):
    model, oracle = setup(name)
    ids = token_ids(10)
    cache = predict_base_cache(model, mx.array(ids[:, :9]), exact_tail=tail, prefill_step_size=4)
    step = time_first_token(lambda times: Ready(model.base, cache), ids[0, -1:].tolist())
    (piece,) = decode(step, chat_tokenizer(), ids[0].tolist(), max_tokens=1)
    expected = oracle.base.forward(ids[:, 9 - tail :], oracle.prefill(ids[:, : 9 - tail])[0])
    logits = expected.logits[0, -1]
    logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    np.testing.assert_allclose(piece.logprobs, logprobs, atol=1e-4)
    assert_cache_equal([trimmed(layer, 10) for layer in cache], expected.cache)
    with pytest.raises(InputError, match="-1"):
        predict_base_cache(model, mx.array(ids), exact_tail=-1)


@pytest.mark.parametrize("step_size", [1, 4, 100])
@pytest.mark.parametrize("base", BASES)
def test_full_prefill_is_mlx_lms(base, step_size):
    model = itself(BASES[base]())
    ids, own = token_ids(11, batch=2), make_prompt_cache(model.base)
    model.base(mx.array(ids[:, :3]), cache=own)
    model.base(mx.array(ids[:, 3:]), cache=own)
    cache = base_prefill(model, mx.array(ids[:, :3]), prefill_step_size=step_size)
    assert base_prefill(model, mx.array(ids[:, 3:]), cache, prefill_step_size=step_size) is cache
    assert_cache_equal(cache, entries_of(own), atol=1e-5)


# matrix products of one full layer: projections and FFN, then scores and weighted values (not fused at these sizes)
FULL_LAYER = {"llama": 4 + 3 + 2, "openelm": 2 + 2 + 2}
KV_PROJECTIONS = {"llama": 2, "openelm": 1}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_prefix_computes_its_layers_and_one_pair_of_projections(family, layers):
    model, _ = prefixed(FAMILIES[family](), layers)
    cache = auxiliary_cache_for(model, make_prompt_cache(model.base))
    inputs, _ = auxiliary_prefill(model, mx.array(token_ids(5)), cache)
    assert len(cache) == layers + 1
    needed = layers * FULL_LAYER[family] + KV_PROJECTIONS[family]
    assert matmuls([inputs, [layer.state for layer in cache]]) == needed


@pytest.mark.parametrize("family", FAMILIES)
def test_an_auxiliary_computes_nothing_after_its_last_projections(family):
    model, _ = paired(FAMILIES[family](), FAMILIES[family](3), ((0,), (1,), (2,), (3,)))
    cache = make_prompt_cache(model.auxiliary)
    inputs, _ = auxiliary_prefill(model, mx.array(token_ids(5)), cache)
    needed = 3 * FULL_LAYER[family] + KV_PROJECTIONS[family]
    assert matmuls([inputs, [layer.state for layer in cache]]) == needed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chunk_evaluates_the_auxiliary_and_one_matmul_per_block(family, monkeypatch):
    model, _ = prefixed(FAMILIES[family](), 2)
    needed, evaluate, counts = 2 * FULL_LAYER[family] + KV_PROJECTIONS[family], mx.eval, []

    def counting(*outputs):
        counts.append(matmuls(outputs))
        evaluate(*outputs)

    monkeypatch.setattr(mx, "eval", counting)
    predict_base_cache(model, mx.array(token_ids(6)), prefill_step_size=3)
    assert sum(counts) == 2 * (needed + 1)
    counts.clear()
    base_prefill(model, mx.array(token_ids(6)), prefill_step_size=3)
    assert sum(counts) == 2 * (3 * FULL_LAYER[family] + KV_PROJECTIONS[family])


def test_progress_and_times_are_reported_per_chunk():
    model, _ = setup("llama from llama")
    calls, times = [], PrefillTimes()
    report = {"times": times, "progress": lambda *call: calls.append(call), "prefill_step_size": 4}
    predict_base_cache(model, mx.array(token_ids(9)), **report)
    assert calls == [(4, 9), (8, 9), (9, 9)]
    assert times.auxiliary_prefill_ms > 0
    assert times.predict_ms > 0
    assert times.base_prefill_ms == 0
    base_prefill(model, mx.array(token_ids(5)), **report)
    assert calls[3:] == [(4, 5), (5, 5)]
    assert times.base_prefill_ms > 0


def test_token_ids_are_passed_through():
    model, _ = setup("llama from llama")
    assert encode(model, [5, 6, 7]) == [5, 6, 7]


@pytest.mark.parametrize("key", ["max_position_embeddings", "max_context_length"])
def test_a_prompt_must_leave_room_in_the_context_window(key):
    model = with_tokenizer(setup("llama from llama")[0], **{key: 8})
    assert encode(model, list(range(7))) == list(range(7))
    with pytest.raises(InputError, match="8 tokens, the model's context window 8"):
        encode(model, list(range(8)))
    with pytest.raises(InputError, match="11 tokens"):
        encode(model, " ".join(["w1"] * 11), raw=True)


def test_an_empty_prompt_is_refused():
    model, _ = setup("llama from llama")
    with pytest.raises(InputError, match="empty"):
        encode(model, [])
    with pytest.raises(InputError, match="empty"):
        encode(with_tokenizer(model), "", raw=True)


def test_text_needs_a_tokeniser():
    model, _ = setup("llama from llama")
    with pytest.raises(InputError, match="no tokeniser"):
        encode(model, "w1")


def test_text_goes_through_the_chat_template_unless_raw():
    model = with_tokenizer(setup("llama from llama")[0])
    words = model.tokenizer.encode("w1 w2")
    assert encode(model, "w1 w2", raw=True) == words
    assert encode(model, "w1 w2") == model.tokenizer.encode("<user> w1 w2 <end> <assistant>")
    model.tokenizer.chat_template = None
    assert encode(model, "w1 w2") == words


PREDICTED = {"prefill": "kvp", "exact_head": 0, "exact_tail": 0}


def generated(model, ids, **options):
    """Return the pieces of a greedy answer of six tokens that no end mark cuts short."""
    model = with_tokenizer(model)
    model.tokenizer._eos_token_ids.clear()
    return list(stream_generate(model, ids, max_tokens=6, **(PREDICTED | options)))


@pytest.mark.parametrize("tail", [0, 2])
@pytest.mark.parametrize("name", KINDS)
def test_generation_follows_the_prediction(name, tail):
    model, oracle = setup(name)
    ids = token_ids(12)
    pieces = generated(model, ids[0].tolist(), exact_tail=tail, prefill_step_size=4)
    assert {(piece.path, piece.exact_tail, piece.prompt_tokens) for piece in pieces} == {("kvp", tail, 12)}
    predicted, _ = oracle.prefill(ids[:, : 11 - tail])
    assert [piece.token for piece in pieces] == oracle_tokens(oracle, ids[:, 11 - tail :], predicted, 6)
    assert pieces[0].ttft_ms > pieces[0].times.auxiliary_prefill_ms + pieces[0].times.predict_ms > 0
    assert [piece.finish_reason for piece in pieces] == [None] * 5 + ["length"]


@pytest.mark.parametrize(
    ("prompt", "options"),
    [(token_ids(9), {"prefill": "full"}), (token_ids(9), {"prefill": "auto", "exact_tail": 2}), (token_ids(1), {})],
)
def test_the_full_path_is_mlx_lms_own(prompt, options):
    model, oracle = setup("llama from llama")
    pieces = generated(model, prompt[0].tolist(), **options)
    assert {(piece.path, piece.exact_tail) for piece in pieces} == {("full", 0)}
    assert [piece.token for piece in pieces] == oracle_tokens(oracle, prompt, None, 6)
    assert pieces[0].times.auxiliary_prefill_ms == pieces[0].times.predict_ms == 0


def test_text_is_what_mlx_lm_streams():
    model = with_tokenizer(itself(llama()))
    ids = token_ids(9)[0].tolist()
    theirs = list(mlx_lm_stream_generate(model.base, model.tokenizer, ids, max_tokens=6))
    pieces = list(stream_generate(model, ids, max_tokens=6, **PREDICTED))
    assert [(p.text, p.token, p.finish_reason) for p in pieces] == [(p.text, p.token, p.finish_reason) for p in theirs]
    assert len("".join(p.text for p in pieces)) > 0


def test_an_answer_ends_with_the_context_window():
    model = with_tokenizer(setup("llama from llama")[0], max_position_embeddings=9)
    model.tokenizer._eos_token_ids.clear()
    pieces = list(stream_generate(model, token_ids(6)[0].tolist(), max_tokens=50, **PREDICTED))
    assert (len(pieces), pieces[-1].finish_reason) == (3, "length")


@pytest.mark.parametrize("name", KINDS)
def test_a_model_is_unchanged_by_a_run_even_one_that_fails(name, monkeypatch):
    model, _ = SETUPS[name]()
    parts = [model.base, model.auxiliary, model.predictor]
    before = [[key for key, _ in tree_flatten(part.parameters())] for part in parts]
    modules = [list(part.named_modules()) for part in parts]
    predict_base_cache(model, mx.array(token_ids(5)), prefill_step_size=2)
    base_prefill(model, mx.array(token_ids(5)))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(type(model.auxiliary.layers[1]), "__call__", failing)
        predict_base_cache(model, mx.array(token_ids(5)))
    assert [[key for key, _ in tree_flatten(part.parameters())] for part in parts] == before
    for part, then in zip(parts, modules, strict=True):
        now = list(part.named_modules())
        assert [key for key, _ in now] == [key for key, _ in then]
        assert all(a is b for (_, a), (_, b) in zip(now, then, strict=True))
