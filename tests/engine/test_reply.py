"""A request from end to end: what logits processors see, quantised caches, counts, and what a context holds after."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import QuantizedKVCache
from support.tiny import chat_tokenizer, entries_of, estimating, llama, paired, prefixed, small_llama, token_ids

from kvp_mlx import stream_generate
from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.engine.context import Context
from kvp_mlx.engine.dial import Dial
from kvp_mlx.engine.prefill import base_prefill, predict_base_cache
from kvp_mlx.engine.reply import reply
from kvp_mlx.errors import InputError

PATHS = {"kvp": Dial("kvp", 0, 0), "kvp, exact ends": Dial("kvp", 5, 3), "full": Dial("full", 0, 0)}
QUANTISED = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}


def speaking(**changes: int) -> KVPModel:
    """Return a prefix bundle with a tokeniser that never ends an answer."""
    model, _ = prefixed(llama(**changes), 1, tokenizer=chat_tokenizer())
    model.text_tokenizer._eos_token_ids.clear()
    return model


def wide() -> KVPModel:
    """Return one whose heads are wide enough for mlx-lm's cache quantisation."""
    return speaking(num_attention_heads=2, num_key_value_heads=1, head_dim=32)


def recorder(seen: list[list[int]]) -> Callable[[mx.array, mx.array], mx.array]:
    """Return a processor that notes the tokens it is given, and forbids them all: each answer depends on them."""

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return mx.put_along_axis(logits, tokens[None].astype(mx.int32), mx.array(-1e9), axis=-1)

    return process


@pytest.mark.parametrize("max_tokens", [1, 2, 8])
@pytest.mark.parametrize("path", PATHS)
def test_processors_see_the_whole_prompt_as_mlx_lms_do(path: str, max_tokens: int) -> None:
    model, ids = speaking(), token_ids(40)[0].tolist()
    ours, theirs, last = [], [], []
    options = {"max_tokens": max_tokens, "prefill_step_size": 16}
    pieces = list(reply(Context(model), ids, PATHS[path], logits_processors=[recorder(ours)], **options))
    answer = [piece.token for piece in pieces]
    plain = list(generate_step(mx.array(ids), model.base, logits_processors=[recorder(theirs)], **options))
    assert len(answer) == len(plain) == max_tokens
    assert not set(answer) & set(ids)
    assert [len(tokens) for tokens in ours] == [len(tokens) for tokens in theirs]
    assert ours[0] == theirs[0] == ids
    assert [tokens[len(ids) :] for tokens in ours[1:]] == [answer[:count] for count in range(1, len(ours))]
    assert all(tokens[: len(ids)] == ids for tokens in ours)
    if path == "full":
        assert answer == [token for token, _ in plain]
        assert ours == theirs
    on_context = Context(model)
    list(reply(on_context, ids[:30], Dial("full", 0, 0), max_tokens=1))
    list(reply(on_context, ids, PATHS[path], logits_processors=[recorder(last)], **options))
    assert [len(tokens) for tokens in last] == [len(tokens) for tokens in ours]
    assert all(tokens[: len(ids)] == ids for tokens in last)


@pytest.mark.parametrize("path", ["kvp", "full"])
def test_processors_leave_what_they_do_not_change(path: str) -> None:
    model, ids = speaking(), token_ids(40)[0].tolist()
    plain, processed = (
        [piece.token for piece in reply(Context(model), ids, PATHS[path], max_tokens=8, logits_processors=processors)]
        for processors in ([], [lambda tokens, logits: logits] * 2)
    )
    assert plain == processed


@pytest.mark.parametrize("start", [0, 42])
@pytest.mark.parametrize("path", ["kvp", "full"])
def test_a_cache_is_quantised_while_decoding_on_either_path(path: str, start: int) -> None:
    """As mlx-lm does with the same cache in its own hands; the prompt is read before anything is quantised."""
    model, ids = wide(), token_ids(40)[0].tolist()
    options = QUANTISED | {"quantized_kv_start": start, "max_tokens": 8}
    context = Context(model)
    pieces = list(reply(context, ids, PATHS[path], **options))
    fill = predict_base_cache if path == "kvp" else base_prefill
    cache = fill(model, mx.array([ids[:-1]]))
    theirs = list(generate_step(mx.array(ids[-1:]), model.base, prompt_cache=cache, **options))
    assert [piece.path for piece in pieces] == [path] * 8
    assert [piece.token for piece in pieces] == [token for token, _ in theirs]
    assert all(isinstance(layer, QuantizedKVCache) for layer in context.cache)
    assert {layer.offset for layer in context.cache} == {len(context.tokens)}
    for mine, other in zip(context.cache, cache, strict=True):
        for one, two in zip(mine.keys_and_values(), other.keys_and_values(), strict=True):
            entries = [mx.dequantize(*part, group_size=32, bits=8)[..., :40, :] for part in (one, two)]
            np.testing.assert_allclose(*entries, atol=1e-5)


@pytest.mark.parametrize("path", ["kvp", "full"])
def test_a_quantised_context_is_gone_on_from(path: str) -> None:
    model, ids = wide(), token_ids(40)[0].tolist()
    context = Context(model)
    list(reply(context, ids[:20], PATHS[path], max_tokens=1, **QUANTISED))
    (*_, last) = reply(context, ids, PATHS[path], max_tokens=4, **QUANTISED)
    assert (last.path, last.cached_tokens, last.new_tokens) == (path, 20, 20)
    assert {layer.offset for layer in context.cache} == {len(context.tokens)} == {44}


def test_the_counts_of_a_piece_add_up() -> None:
    model, ids = estimating(speaking()), token_ids(60)[0].tolist()
    context = Context(model)
    list(reply(context, ids[:20], Dial("full", 0, 0), max_tokens=1))
    pieces = list(reply(context, ids, Dial("kvp", 25, 4, 0.5), max_tokens=3))
    assert {(piece.prompt_tokens, piece.cached_tokens, piece.new_tokens) for piece in pieces} == {(60, 20, 40)}
    assert {(piece.predicted_tokens, piece.exact_tail) for piece in pieces} == {(30, 4)}  # 25 exact, 4 and 1 at the end
    assert {piece.recomputed_tokens for piece in pieces} == {pieces[0].times.recomputed_tokens}
    assert 4 < pieces[0].recomputed_tokens < 34
    assert [piece.generation_tokens for piece in pieces] == [1, 2, 3]
    assert pieces[0].ttft_ms > pieces[0].first_step_ms > 0
    assert context.tokens == ids + [piece.token for piece in pieces]


def test_a_context_keeps_what_it_shares_with_the_prompt_and_drops_the_rest() -> None:
    model, ids = speaking(), token_ids(40)[0].tolist()
    context, other = Context(model), [*ids[:25], *token_ids(10, seed=1)[0].tolist()]
    list(reply(context, ids, Dial("full", 0, 0), max_tokens=3))
    (piece,) = reply(context, other, Dial("full", 0, 0), max_tokens=1)
    assert piece.cached_tokens == 25
    fresh = Context(model)
    (expected,) = reply(fresh, other, Dial("full", 0, 0), max_tokens=1)
    assert piece.token == expected.token
    for mine, theirs in zip(entries_of(context.cache), entries_of(fresh.cache), strict=True):
        np.testing.assert_allclose(mine.keys, theirs.keys, atol=1e-5)


def test_what_is_refused_leaves_the_context_alone() -> None:
    model, _ = paired(llama(), small_llama(), ((0,), (0,), (1,), (2,)), tokenizer=chat_tokenizer())
    context, ids = Context(model), token_ids(40)[0].tolist()
    list(reply(context, ids, Dial("full", 0, 0), max_tokens=1))
    held = list(context.tokens)
    for dial, options, reason in (
        (Dial("kvp", 0, 0, 0.5), {}, "cannot tell which tokens to recompute"),
        (Dial("kvp", 0, 0), {"max_tokens": 0}, "at least 1"),
        (Dial("kvp", 0, 0), {"draft_model": model.base}, "draft_model"),
    ):
        with pytest.raises(InputError, match=reason):
            next(reply(context, ids[:10], dial, **options))
    assert context.tokens == held


def test_stream_generate_takes_its_dial_in_parts() -> None:
    model, ids = speaking(), token_ids(100)[0].tolist()
    for given, path, tail, predicted in (
        ({}, "full", 0, 0),  # balanced leaves 35 tokens, too few to predict
        ({"prefill": "kvp"}, "kvp", 32, 35),
        ({"quality": "fast"}, "kvp", 32, 67),
        ({"quality": "exact"}, "full", 0, 0),
        ({"quality": "exact", "prefill": "kvp"}, "kvp", 0, 99),
        ({"prefill": "kvp", "exact_head": 0, "exact_tail": 1}, "kvp", 1, 98),
    ):
        (piece,) = stream_generate(model, ids, **given, max_tokens=1)
        assert (piece.path, piece.exact_tail, piece.predicted_tokens) == (path, tail, predicted), given
