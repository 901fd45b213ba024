"""Decoding with the auxiliary's drafts: the same tokens as without, and caches that hold no rejected one."""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.generate import speculative_generate_step as mlx_lms
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from scipy.stats import chisquare
from support import architectures
from support.drafting import bundle, check_replay
from support.tiny import chat_tokenizer, llama, prefixed, token_ids

from kvp_mlx import stream_generate
from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.engine.clock import Chooser
from kvp_mlx.engine.context import Context
from kvp_mlx.engine.conversation import Conversation
from kvp_mlx.engine.dial import FULL, Dial
from kvp_mlx.engine.reply import Piece, first_token_on, reply
from kvp_mlx.engine.speculative import Drafting, speculate
from kvp_mlx.errors import InputError

DIALS = {"full": FULL, "kvp": Dial("kvp", 0, 0), "kvp, exact ends": Dial("kvp", 7, 5)}


def answer(model: KVPModel, ids: list[int], dial: Dial, draft: str, seed: int = 3, **options: Any) -> tuple:
    """Return what an answer is made of, its draft aside, and where MLX's generator stands after it."""
    mx.random.seed(seed)
    pieces = list(reply(Context(model), ids, dial, draft=draft, **{"max_tokens": 16} | options))
    return [(p.text, p.token, p.finish_reason, p.generation_tokens) for p in pieces], mx.random.state[0].tolist()


def prompt(seed: int) -> list[int]:
    return token_ids(30 + seed, seed=seed)[0].tolist()


@pytest.mark.parametrize("dial", DIALS)
@pytest.mark.parametrize("kind", ["model", "pruned"])
def test_greedy_answers_to_twenty_prompts_are_those_without_drafts(kind: str, dial: str) -> None:
    for seed in range(20):
        plain, *drafted = (
            answer(bundle(kind), prompt(seed), DIALS[dial], draft, max_tokens=16)
            for draft in ("none", "auxiliary", *["auto"] * (seed < 3))
        )
        assert all(each == plain for each in drafted)


@pytest.mark.parametrize(("ends", "tokens"), [(False, 1), (True, 2), (True, 5)])
def test_what_else_chooses_and_ends_an_answer_does_so_with_drafts(ends: bool, tokens: int) -> None:
    model = bundle(ends=ends)
    penalties = make_logits_processors(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2)
    choices = ({"temp": 1.0}, {"temp": 0.7, "top_p": 0.9}, {"temp": 1.5, "xtc_probability": 0.5, "top_k": 9})
    for seed, choice in enumerate(choices):
        for options in ({"max_tokens": 2}, {"stop": ("w1", "w22")}, {"logits_processors": penalties}):
            sampler = make_sampler(**choice)
            plain, drafted = (
                answer(model, prompt(seed), FULL, draft, sampler=sampler, draft_tokens=tokens, **options)
                for draft in ("none", "auxiliary")
            )
            assert drafted == plain


def test_drafts_are_counted_and_save_steps() -> None:
    pieces = list(reply(Context(bundle()), prompt(1), FULL, draft="auxiliary", max_tokens=40))
    accepted = sum(piece.from_draft for piece in pieces)
    assert 5 < accepted < pieces[-1].drafted_tokens
    assert [piece.drafted_tokens for piece in pieces] == sorted(piece.drafted_tokens for piece in pieces)
    assert not pieces[0].from_draft
    assert sum(not piece.from_draft for piece in pieces) == 40 - accepted


def test_processors_see_the_prompt_and_the_answer_before_each_token_that_goes_out() -> None:
    model, ids, seen = bundle(), prompt(2), []

    def note(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return logits

    plain = [p.token for p in reply(Context(model), ids, FULL, max_tokens=12)]
    drafted = [
        p.token for p in reply(Context(model), ids, FULL, max_tokens=12, draft="auxiliary", logits_processors=[note])
    ]
    assert drafted == plain
    assert all(ids + plain[:count] in seen for count in range(12))
    assert all(tokens[: len(ids)] == ids for tokens in seen)


def test_log_probabilities_are_the_bases() -> None:
    model, ids = bundle(), prompt(4)
    context = Context(model)
    speculation = speculate(context, ids, first_token_on(context, ids, FULL), Drafting("auxiliary"), max_tokens=10)
    responses = list(speculation.responses(model.text_tokenizer))
    tokens = [response.token for response in responses]
    logits = model.base(mx.array([ids + tokens[:-1]]))[0, len(ids) - 1 :]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    np.testing.assert_allclose(mx.stack([response.logprobs for response in responses]), expected, atol=1e-3)


def of_numpy(seed: int) -> Chooser:
    """Return a sampler with a generator of its own, which nobody puts back."""
    rng = np.random.default_rng(seed)
    return lambda logprobs: mx.argmax(logprobs + mx.array(rng.gumbel(size=logprobs.shape)), axis=-1)


def uniformity(base: nn.Module, ids: list[int], tokens: list[int]) -> float:
    """Return the p-value of ``tokens`` as draws from what the base says after ``ids`` and those before each."""
    logits = base(mx.array([ids + tokens[:-1]]))[0, len(ids) - 1 :]
    shares = np.array(mx.softmax(logits, axis=-1), np.float64)
    rows, rng = np.arange(len(tokens)), np.random.default_rng(0)
    below = np.cumsum(shares, axis=1)[rows, tokens] - shares[rows, tokens]
    places = below + rng.uniform(size=len(tokens)) * shares[rows, tokens]  # uniform, if they are
    return float(chisquare(np.histogram(places, bins=10, range=(0, 1))[0]).pvalue)


@pytest.mark.parametrize("sampler", [make_sampler(temp=1.0), of_numpy(0)], ids=["mlx-lm", "own generator"])
def test_samples_come_from_the_bases_distribution(sampler: Chooser) -> None:
    model, ids = bundle(noise=0.3, vocab_size=8), [1, 5, 2, 7]
    mx.random.seed(1)
    pieces = list(reply(Context(model), ids, FULL, draft="auxiliary", sampler=sampler, max_tokens=400))
    assert sum(piece.from_draft for piece in pieces) > 30
    assert uniformity(model.base, ids, [piece.token for piece in pieces]) > 0.01
    other = generate_step(mx.array(ids), model.auxiliary, sampler=sampler, max_tokens=400)
    assert uniformity(model.base, ids, [token for token, _ in other]) < 1e-6  # the test sees what a draft would say


@pytest.mark.parametrize("draft", ["auxiliary", "auto"])
@pytest.mark.parametrize("dial", ["full", "kvp"])
def test_closing_anywhere_leaves_the_caches_of_a_replay(dial: str, draft: str) -> None:
    model, ids = bundle(), prompt(3)
    for count in range(1, 14):
        context = Context(model)
        pieces = reply(context, ids, DIALS[dial], draft=draft, max_tokens=20)
        taken = [piece.token for piece in itertools.islice(pieces, count)]
        pieces.close()
        assert len(ids) + count - 1 <= len(context.tokens) <= len(ids) + count
        assert context.tokens == (ids + taken)[: len(context.tokens)]
        check_replay(context, ids, DIALS[dial])


def interrupting(at: int) -> Callable[..., Any]:
    """Return a tracer that interrupts before the so-manieth line of mlx-lm's loop, wherever that is."""
    lines = itertools.count(1)

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != mlx_lms.__code__.co_filename:
            return None
        if event == "line" and next(lines) == at:
            raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.parametrize("dial", ["full", "kvp"])
def test_an_interrupt_at_any_line_leaves_the_caches_of_a_replay(dial: str) -> None:
    model, ids, left = bundle(), prompt(3), set()
    for at in (*range(1, 150, 4), *range(150, 400, 32)):
        context = Context(model)
        pieces: Iterator = reply(context, ids, DIALS[dial], draft="auxiliary", max_tokens=20)
        taken, before = [next(pieces).token], sys.gettrace()
        sys.settrace(interrupting(at))
        try:
            with pytest.raises(KeyboardInterrupt):
                for piece in pieces:
                    taken.append(piece.token)
        finally:
            sys.settrace(before)
        assert context.tokens == (ids + taken)[: len(context.tokens)]
        left.add(len(context.tokens))
        check_replay(context, ids, DIALS[dial])
    assert len(left) > 5


@pytest.mark.parametrize("path", ["full", "kvp", "auto"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_conversation_with_edits_is_that_without_drafts(path: str, sampled: bool) -> None:
    def turns(draft: str) -> list[list[int]]:
        conversation = Conversation(bundle(ends=True), "w1 w2")
        mx.random.seed(8)
        how = {"dial": Dial(path, 0, 0), "max_tokens": 12, "draft": draft}
        how["sampler"] = make_sampler(temp=1.0) if sampled else None
        asked: list[tuple] = [
            (conversation.reply, "w5 w6 w7"),
            (conversation.reply, "w8 w9 w10"),
            (conversation.regenerate,),
        ]
        asked += [(conversation.edit, "w8 w44"), (conversation.reply, "w30 w31")]
        return [[piece.token for piece in ask(*text, **how)] for ask, *text in asked]

    plain = turns("none")
    assert turns("auxiliary") == turns("auto") == plain
    assert sum(map(len, plain)) > 20


def test_the_auxiliary_catches_up_with_what_it_has_not_read() -> None:
    model, ids = bundle(), prompt(5)
    context = Context(model)
    (piece,) = reply(context, ids, FULL, draft="auxiliary", max_tokens=1)
    assert context.auxiliary_cache[0].offset == 0
    (*_, piece) = reply(context, [*ids, piece.token, 7, 8], FULL, draft="auxiliary", max_tokens=9)
    assert context.auxiliary_cache[0].offset >= len(ids) + 9
    assert piece.drafted_tokens > 0


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Callable[[KVPModel, float, str], tuple[float, list[Piece]]]:
    """Return what takes a reply of 60 tokens; its time after the first one, in steps of the base, and its pieces."""
    clock, costs = [0.0], {}
    run = type(llama()).__call__

    def costly(self: nn.Module, ids: mx.array, **options: Any) -> mx.array:
        clock[0] += costs[id(self)] * (1 + 0.1 * (ids.shape[1] - 1))
        return run(self, ids, **options)

    monkeypatch.setattr(type(llama()), "__call__", costly)

    def tick() -> float:
        clock[0] += 1e-6  # mlx-lm divides by what has passed
        return clock[0]

    monkeypatch.setattr("kvp_mlx.engine.speculative.time.perf_counter", tick)

    def taken(model: KVPModel, auxiliary: float, draft: str) -> tuple[float, list[Piece]]:
        costs.update({id(model.base): 1.0, id(model.auxiliary): auxiliary})
        pieces = reply(Context(model), prompt(1), FULL, draft=draft, max_tokens=60)
        found, start = [next(pieces)], clock[0]
        found += pieces
        return clock[0] - start, found

    return taken


def test_auto_drafts_as_long_as_it_pays(costs: Callable) -> None:
    _, cheap = costs(bundle(), 0.05, "auto")
    _, dear = costs(bundle(), 0.9, "auto")
    assert [piece.token for piece in cheap] == [piece.token for piece in dear]
    assert cheap[-1].drafted_tokens > 60 > dear[-1].drafted_tokens > 0
    assert not any(piece.from_draft for piece in dear[30:])
    assert any(piece.from_draft for piece in cheap[40:])


@pytest.mark.parametrize(("noise", "cost"), [(5.0, 0.05), (5.0, 0.5), (5.0, 0.9), (0.02, 0.9)])
def test_auto_loses_little_where_drafts_do_not_pay(noise: float, cost: float, costs: Callable) -> None:
    plain, drafted, auto = (costs(bundle(noise=noise), cost, draft)[0] for draft in ("none", "auxiliary", "auto"))
    assert drafted > plain
    assert auto < plain + 6


@pytest.mark.parametrize("cost", [0.05, 0.25])
def test_auto_gains_most_of_it_where_they_pay(cost: float, costs: Callable) -> None:
    plain, drafted, auto = (costs(bundle(noise=0.0), cost, draft)[0] for draft in ("none", "auxiliary", "auto"))
    assert drafted < 0.7 * plain
    assert auto < drafted + 6


def test_auto_has_the_auxiliary_read_no_more_than_the_answer_may_have() -> None:
    for max_tokens, drafts in ((20, False), (80, True)):
        (*_, last) = reply(Context(bundle()), prompt(10), FULL, draft="auto", max_tokens=max_tokens)
        assert (last.drafted_tokens > 0) is drafts


def test_an_auxiliary_that_cannot_draft_is_refused_and_auto_does_without() -> None:
    prefix, _ = prefixed(llama(), 1, tokenizer=chat_tokenizer())
    sliding = replace(bundle(), auxiliary=architectures.tiny_model("gemma3_text"))
    recurrent = replace(bundle(), base=architectures.tiny_model("lfm2"))
    for model, reason in ((prefix, "first layers"), (sliding, "sliding attention"), (recurrent, "short convolution")):
        with pytest.raises(InputError, match=f"cannot draft: .*{reason}"):
            Drafting("auxiliary").settled(model, is_quantised=False)
        assert Drafting("auto").settled(model, is_quantised=False).who == "none"
    context = Context(bundle())
    for options, reason in (
        ({"draft": "auxiliary", "kv_bits": 8}, "quantised"),
        ({"draft": "always"}, "none, auxiliary, auto"),
        ({"draft": "auxiliary", "draft_tokens": 0}, "at least 1"),
        ({"draft_model": bundle().base}, "draft_model"),
    ):
        with pytest.raises(InputError, match=reason):
            next(reply(context, prompt(1), FULL, **options))
    assert context.tokens == []
    (piece,) = stream_generate(prefix, prompt(1), draft="auto", max_tokens=1)
    assert piece.drafted_tokens == 0
