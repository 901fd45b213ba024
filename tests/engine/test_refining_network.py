"""Refinement while decoding: the first token is that of prediction, and soon all entries are full prefill's."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support import architectures, families
from support.architectures import CONFIGS as ARCHITECTURES
from support.architectures import bundle, random_ids
from support.families import CONFIGS as FAMILIES
from support.scheduling import endless, plain
from support.tiny import (
    VOCABULARY,
    assert_cache_equal,
    chat_tokenizer,
    entries_of,
    estimating,
    llama,
    openelm,
    paired,
    prefixed,
    small_llama,
    token_ids,
)

import kvp_mlx.engine.reply as reply_module
from kvp_mlx import stream_generate
from kvp_mlx.bundle.config import MeasuredDial
from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.cli.output import summary
from kvp_mlx.engine.context import Context
from kvp_mlx.engine.dial import Dial
from kvp_mlx.engine.prefill import base_prefill, predict_base_cache
from kvp_mlx.engine.refining import refine
from kvp_mlx.engine.refining_network import RefiningNetwork, refining_network
from kvp_mlx.engine.reply import Piece, reply
from kvp_mlx.errors import InputError

KINDS = {
    "prefix": lambda: estimating(prefixed(llama(), 1, tokenizer=chat_tokenizer())[0]),
    "openelm prefix": lambda: prefixed(openelm(), 2, tokenizer=chat_tokenizer())[0],
    "model": lambda: paired(llama(), small_llama(), ((0,), (0,), (1,), (2,)), tokenizer=chat_tokenizer())[0],
}
PREDICTED = Dial("kvp", 4, 8, 0.0)
REFINED = replace(PREDICTED, refine_tokens=13)


def prompt(length: int = 60) -> list[int]:
    return token_ids(length)[0].tolist()


def answered(model: KVPModel, dial: Dial, max_tokens: int = 24) -> tuple[list[Piece], Context]:
    context = Context(model)
    return list(reply(context, prompt(), dial, max_tokens=max_tokens)), context


@pytest.mark.parametrize("tokens", [1, 13, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_entries_become_full_prefills(kind: str, tokens: int) -> None:
    model, ids, rest = KINDS[kind](), prompt(), token_ids(70, seed=3)[0].tolist()
    full = make_prompt_cache(model.base)
    base_prefill(model, mx.array([ids]), full)
    context = Context(model)
    context.read([*ids, 0], PREDICTED)
    network, errors = refining_network(context, ids, tokens), []
    for number, token in enumerate(rest):
        one = mx.array([[token]])
        expected, found = model.base(one, cache=full), network(one, context.cache)
        errors.append(float(mx.abs(found - expected).max()))
        held = len(ids) + number
        exact = 4 + tokens * (number + 1)
        assert network.exact_tokens == (held + 1 if exact >= held else exact)
    assert errors[0] > 0.01 or tokens == 100
    if tokens > 1:  # else each step leaves one more to read than it reads
        assert max(errors[-(-56 // (tokens - 1)) :]) < 1e-4
        assert_cache_equal(context.cache, entries_of(full), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_begins_as_predicted_and_leaves_exact_entries(kind: str) -> None:
    model = endless(KINDS[kind]())
    predicted, left = answered(model, PREDICTED)
    refined, context = answered(model, REFINED)
    assert left.exact_tokens == 4
    counts = [piece.refined_tokens for piece in refined]
    beside = next(number for number, count in enumerate(counts) if count >= 60)  # from then on full prefill's
    before, after = zip(
        *[(piece.token, other.token) for piece, other in zip(predicted, refined, strict=True)], strict=True
    )
    assert 4 <= beside <= 6
    assert before[:beside] == after[:beside]
    assert before[beside:] != after[beside:]
    assert (context.exact_tokens, len(context.tokens)) == (84, 84)
    assert counts == sorted(counts)
    assert (counts[0], refined[0].exact_tokens, refined[-1].exact_tokens) == (4, 4, 4)
    assert counts[-1] >= 60 + 23
    expected = Context(model)
    expected.read([*context.tokens, 0], Dial("full", 0, 0))
    assert_cache_equal(context.cache, entries_of(expected.cache), atol=1e-4)


def test_what_follows_is_the_bases_own_answer() -> None:
    """Behind the same tokens, as soon as all is exact."""
    model = endless(KINDS["prefix"]())
    pieces, _ = answered(model, REFINED)
    tokens = [piece.token for piece in pieces]
    exact = next(n for n, piece in enumerate(pieces) if piece.refined_tokens >= 60 + n)
    assert 3 <= exact <= 8
    assert tokens[exact + 1 :] == plain(model.base, prompt() + tokens[: exact + 1], 23 - exact)


def test_a_reply_that_ends_early_leaves_what_it_refined() -> None:
    model = endless(KINDS["prefix"]())
    context = Context(model)
    pieces = reply(context, prompt(), REFINED, max_tokens=24)
    next(pieces)
    next(pieces)
    pieces.close()
    assert 4 < context.exact_tokens < 60
    expected = Context(model)
    expected.read([*context.tokens, 0], Dial("full", 0, 0))
    for ours, theirs in zip(context.cache, expected.cache, strict=True):
        for one, other in zip(ours.keys_and_values(), theirs.keys_and_values(), strict=True):
            end = context.exact_tokens
            np.testing.assert_allclose(one[..., :end, :], other[..., :end, :], atol=1e-4)
    refine(context)
    assert_cache_equal(context.cache, entries_of(expected.cache), atol=1e-4)


@pytest.mark.parametrize("idle", [False, True])
def test_what_an_exact_prefix_has_made_of_the_prompt_is_not_read_again(idle: bool) -> None:
    model, ids = KINDS["prefix"](), prompt()
    context, expected = Context(model), make_prompt_cache(model.base)
    context.read([*ids, 0], PREDICTED)
    base_prefill(model, mx.array([ids]), expected)
    if idle:
        context.tokens = [7] * 60
        refine(context)
    else:
        network = refining_network(context, [7] * 60, 20)
        for token in (5, 6, 8, 9, 10):
            one = mx.array([[token]])
            wanted, found = model.base(one, cache=expected), network(one, context.cache)
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        network.leave(context, [*context.tokens, 5, 6, 8, 9, 10])
    assert context.prefix_stream is None
    assert_cache_equal(context.cache, entries_of(expected), atol=1e-4)


def cannot_be_cut(name: str) -> KVPModel:
    """A tiny model of an architecture, by name and window, whose answers never end."""
    architecture, _, window = name.partition(" ")
    sizes = {"sliding_window": int(window)} if window else {}
    base = architectures.tiny_model(architecture, vocab_size=VOCABULARY, **sizes)
    return endless(bundle(base, 1, chat_tokenizer()))


def assert_is_full_prefills(context: Context) -> None:
    """What a context holds is exact, says so, and stands for its tokens."""
    assert context.exact_tokens == len(context.tokens)
    expected, after = Context(context.model), mx.array([[7, 8, 9]])
    expected.read([*context.tokens, 0], Dial("full", 0, 0))
    found, wanted = (context.model.base(after, cache=each.copy(len(each.tokens)).cache) for each in (context, expected))
    np.testing.assert_allclose(found, wanted, atol=1e-3)


CANNOT_BE_CUT = ["qwen3_5", "gemma3_text 8", "gemma3_text 128", "gpt_oss 8", "gpt_oss 128", "lfm2"]


@pytest.mark.parametrize("tokens", [2, 4, 24])
@pytest.mark.parametrize("name", [*CANNOT_BE_CUT, "deepseek_v3"])
def test_caches_that_cannot_be_cut_are_refined_too(name: str, tokens: int) -> None:
    """What an answer leaves unfinished, idle time goes on with; and a later turn comes back to where one was."""
    context = Context(cannot_be_cut(name))
    context.read(prompt()[:31], PREDICTED)
    context.remember()
    generated = [piece.token for piece in reply(context, prompt(), REFINED, max_tokens=tokens)]
    held = [*prompt(), *generated][: len(context.tokens)]
    assert len(held) >= 60 + tokens - 1
    assert (context.exact_tokens == len(held)) == (tokens == 24)
    refine(context)
    for length in (len(held), 30):
        context.keep(length)
        assert context.tokens == held[:length]
        assert_is_full_prefills(context)


@pytest.mark.parametrize("call", [2, 4, 9, 15])
@pytest.mark.parametrize("name", [*CANNOT_BE_CUT, "prefix", "model"])
def test_an_answer_that_is_interrupted_leaves_what_it_says(name: str, call: int) -> None:
    """A sampler that is interrupted before and behind the swap: the cache is a token ahead of the answer."""
    context, calls = Context(KINDS[name]() if name in KINDS else cannot_be_cut(name)), iter(range(1, 100))

    def sampler(logprobs: mx.array) -> mx.array:
        if next(calls) == call:
            raise KeyboardInterrupt
        return mx.argmax(logprobs, axis=-1)

    with pytest.raises(KeyboardInterrupt):
        list(reply(context, prompt(), REFINED, max_tokens=24, sampler=sampler))
    refine(context)
    assert_is_full_prefills(context)
    list(reply(context, [*context.tokens, 5, 6], REFINED, max_tokens=3))


def test_a_context_that_was_cut_is_refined_on_another_thread() -> None:
    context = Context(KINDS["prefix"]())

    def here() -> None:
        context.read([*prompt(), 0], PREDICTED)
        context.keep(40)

    for work in (here, partial(refine, context)):
        with ThreadPoolExecutor(1) as other:
            other.submit(work).result()
    assert context.prefix_stream is None
    expected = Context(context.model)
    expected.read([*prompt()[:40], 0], Dial("full", 0, 0))
    assert_cache_equal(context.cache, entries_of(expected.cache), atol=1e-4)


def test_the_next_turn_goes_on_refining_what_the_last_one_left() -> None:
    """Also where its own tokens are so few that they are read in full."""
    model = endless(KINDS["prefix"]())
    context = Context(model)
    first = list(reply(context, prompt(), PREDICTED, max_tokens=2))
    assert context.exact_tokens == 4
    longer = [*prompt(), *(piece.token for piece in first), 9, 8]
    pieces = list(reply(context, longer, replace(REFINED, path="auto"), max_tokens=12))
    assert pieces[0].path == "full"
    assert_is_full_prefills(context)


def test_what_is_not_refined() -> None:
    """Exact context, quantised caches and drafted replies: these are refused by name where refinement was asked for."""
    pair = endless(KINDS["model"]())
    full, _ = answered(pair, replace(REFINED, path="full", exact_head=0, exact_tail=0))
    assert [piece.token for piece in full] == plain(pair.base, prompt(), 24)
    given, quantised = replace(REFINED, given=("refine_tokens",)), {"kv_bits": 8, "kv_group_size": 32}
    for options in ({"draft": "auxiliary"}, quantised):
        with pytest.raises(InputError, match="are not refined"):
            next(reply(Context(pair), prompt(), given, **options))
    drafted = list(reply(Context(pair), prompt(), REFINED, max_tokens=24, draft="auxiliary"))
    assert [piece.token for piece in drafted] == [piece.token for piece in answered(pair, PREDICTED)[0]]
    with pytest.raises(InputError, match="refine tokens"):
        list(stream_generate(pair, prompt(), prefill="full", refine_tokens=5))
    with pytest.raises(InputError, match="refine_tokens counts tokens"):
        Dial("kvp", 0, 0, refine_tokens=-1)


def test_the_line_behind_an_answer_tells_of_it() -> None:
    model = endless(KINDS["prefix"]())
    assert summary(answered(model, REFINED)[0][-1]).endswith("; 4 of 60 exact at first, 84 in the end")
    assert summary(answered(model, PREDICTED)[0][-1]).endswith("; 4 of 60 exact")
    assert summary(answered(model, Dial("full", 0, 0))[0][-1]).endswith("; all exact")


def test_what_refines_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quality, as many tokens as its bundle says; not who wants prediction by name."""
    monkeypatch.setattr(reply_module, "auto_min_tokens", lambda _: 1)
    model = endless(KINDS["prefix"]())
    dial = MeasuredDial(quality="balanced", from_tokens=0, exact_head=4, exact_tail=8, recompute=0.0, refine_tokens=13)
    measured = replace(model, config=model.config.model_copy(update={"dials": (dial,)}))

    def tokens(of: KVPModel, **how: object) -> list[int]:
        return [piece.token for piece in stream_generate(of, prompt(), max_tokens=24, **how)]

    predicted, refined = ([piece.token for piece in answered(model, each)[0]] for each in (PREDICTED, REFINED))
    assert tokens(measured) == refined
    assert tokens(measured, refine_tokens=0) == tokens(measured, prefill="kvp") == predicted
    assert tokens(measured, prefill="kvp", refine_tokens=13) == refined
    own = {"exact_head": 4, "exact_tail": 8, "recompute": 0.0}
    assert tokens(model, **own) == tokens(model, **own, refine_tokens=32) != predicted
    assert tokens(model, quality="fast", **own) == tokens(model, **own)
    without = Dial("auto", quality="balanced").without_refinement().at(measured.config, 60)
    assert (without.exact_tail, without.refine_tokens) == (8, 0)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *FAMILIES])
def test_every_architecture_is_refined(name: str) -> None:
    base = architectures.tiny_model(name) if name in ARCHITECTURES else families.tiny_model(name)
    model, ids = bundle(base, 1), random_ids(30, 1)
    full, cache = (make_prompt_cache(base) for _ in range(2))
    base_prefill(model, ids, full)
    predict_base_cache(model, ids, cache)
    network = RefiningNetwork(Context(model), ids[0].tolist(), 9)
    for token in random_ids(10, 1)[0].tolist():
        expected, found = base(mx.array([[token]]), cache=full), network(mx.array([[token]]), cache)
    assert network.exact_tokens == 40
    np.testing.assert_allclose(found, expected, atol=1e-4)
