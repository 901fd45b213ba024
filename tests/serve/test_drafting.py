"""Answers that are decoded alone have drafts: the tokens are those without, and another request may join at any one."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.drafting import bundle, check_replay
from support.scheduling import FULL, Reply, ask, replies, scheduler_of
from support.serving import serving
from support.tiny import chat_tokenizer, llama, prefixed, token_ids

from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.engine.context import Context
from kvp_mlx.engine.dial import Dial
from kvp_mlx.engine.speculative import NO_DRAFTS, Drafting
from kvp_mlx.errors import InputError
from kvp_mlx.serve.decoding import Drafted
from kvp_mlx.serve.requests import GenerationRequest, Sampling, Token
from kvp_mlx.serve.scheduler import Scheduler

DRAFTS = Drafting("auxiliary")
DIALS = {"full": FULL, "kvp": Dial("kvp", 0, 0)}
VARIED = Sampling(0.9, top_p=0.95, top_k=50, min_p=0.01, seed=7)
CHOICES = {
    "greedy": Sampling(),
    "seed": VARIED,
    "penalties": replace(VARIED, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3),
    "greedy penalties": Sampling(repetition_penalty=1.3, frequency_penalty=0.5, logit_bias={17: 2.0}),
}


@contextlib.contextmanager
def still(model: KVPModel, drafting: Drafting = NO_DRAFTS, **options: Any) -> Iterator[Scheduler]:
    """As ``scheduler_of``; what was predicted stays so, whatever time there is."""
    with scheduler_of(model, drafting=drafting, **options) as scheduler:
        scheduler._prefixes._refining = lambda: iter(())
        yield scheduler


def prompt(length: int, seed: int = 1) -> list[int]:
    return token_ids(length, seed=seed)[0].tolist()


def same(found: Reply, expected: Reply) -> None:
    """Compare answers, log-probabilities included, and what was cached."""
    ours, theirs = ([each for each in reply.events if isinstance(each, Token)] for reply in (found, expected))
    assert [(each.token, each.text) for each in ours] == [(each.token, each.text) for each in theirs]
    assert (found.finished.reason, found.finished.stop_text) == (
        expected.finished.reason,
        expected.finished.stop_text,
    )
    assert found.usage.cached_tokens == expected.usage.cached_tokens
    for one, other in zip(ours, theirs, strict=True):
        assert one.logprob == (None if other.logprob is None else pytest.approx(other.logprob, abs=1e-3))
        assert [token for token, _ in one.top[:1]] == [token for token, _ in other.top[:1]]


def asked(scheduler: Scheduler, dial: Dial, **fields: Any) -> list[Reply]:
    """Return answers to a prompt, to the same again, and to one that goes on."""
    ids = prompt(30)
    first, again = (ask(scheduler, ids, dial, **fields) for _ in range(2))
    return [first, again, ask(scheduler, [*ids, *first.tokens, 7, 8, 9], dial, **fields)]


@pytest.mark.parametrize(
    ("kind", "dial", "choice"),
    [("model", "full", "penalties"), ("model", "kvp", "greedy"), ("pruned", "kvp", "seed")],
)
def test_alone_the_answers_are_those_without_drafts(kind: str, dial: str, choice: str) -> None:
    fields: dict[str, Any] = {"sampling": CHOICES[choice], "max_tokens": 40, "top_logprobs": 2}
    with still(bundle(kind)) as scheduler:
        expected = asked(scheduler, DIALS[dial], **fields)
        fields["stop"] = (mark := expected[0].text[40:50],)
        expected += asked(scheduler, DIALS[dial], **fields)
    assert expected[3].finished.stop_text == mark
    for who in ("auxiliary", "auto"):
        with still(bundle(kind), Drafting(who, 2)) as scheduler:
            fields.pop("stop", None)
            found = asked(scheduler, DIALS[dial], **fields)
            fields["stop"] = (mark,)
            found += asked(scheduler, DIALS[dial], **fields)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
        assert found[0].usage.drafted_tokens > 0
        if (kind, who) == ("model", "auxiliary"):  # a pruned one at random weights guesses nothing
            assert found[0].usage.drafted_tokens > found[0].usage.accepted_tokens > 0
    assert all(each.usage.drafted_tokens == 0 for each in expected)


def test_an_end_token_ends_an_answer() -> None:
    model, ids = replace(bundle(), tokenizer=chat_tokenizer()), prompt(30)
    model.text_tokenizer._eos_token_ids.clear()
    with still(model) as scheduler:
        tokens = ask(scheduler, ids, max_tokens=20).tokens
    for place in (0, 5):
        model.text_tokenizer._eos_token_ids = {tokens[place]}
        with still(model, DRAFTS) as scheduler:
            found = ask(scheduler, ids, max_tokens=20)
        assert (found.tokens, found.finished.reason) == (tokens[: tokens.index(tokens[place]) + 1], "stop")


def at_step(scheduler: Scheduler, number: int, do: Callable[[], object]) -> None:
    """Do something on the scheduler's thread after its so-manieth step of decoding."""
    step, steps = scheduler._decoder.step, []

    def counted() -> list:
        decoded = step()
        steps.append(decoded)
        if len(steps) == number:
            do()
        return decoded

    scheduler._decoder.step = counted


def joined(scheduler: Scheduler, number: int, first: GenerationRequest, second: GenerationRequest) -> list[Reply]:
    """Return the answers to two requests, the second of which comes at a step of the first."""
    tickets = []
    at_step(scheduler, number, lambda: tickets.append(scheduler.submit(second)))
    tickets.insert(0, scheduler.submit(first))
    (one,) = replies(tickets[0])
    return [one, *replies(tickets[1])]


@pytest.mark.parametrize(
    ("dial", "choice"), [("full", "greedy"), ("full", "penalties"), ("kvp", "seed"), ("kvp", "greedy penalties")]
)
def test_another_may_join_at_any_step(dial: str, choice: str) -> None:
    how: dict[str, Any] = {"dial": DIALS[dial], "sampling": CHOICES[choice]}
    first = GenerationRequest(prompt(30), max_tokens=40, top_logprobs=1, **how)
    second = GenerationRequest(prompt(20, seed=2), max_tokens=9, **how)
    with still(bundle()) as scheduler:
        expected = [*replies(scheduler.submit(first)), *replies(scheduler.submit(second))]
        goes_on = replace(first, ids=[*first.ids, *expected[0].tokens, 5, 6])
        expected += replies(scheduler.submit(goes_on))
    drafted = []
    for number, who in [
        (1, "auxiliary"),
        (2, "auxiliary"),
        (4, "auxiliary"),
        (9, "auxiliary"),
        (3, "auto"),
        (12, "auto"),
    ]:
        with still(bundle(), Drafting(who)) as scheduler:
            found = joined(scheduler, number, first, second)
            found += replies(scheduler.submit(goes_on))
        for one, other in zip(found, expected, strict=True):
            same(one, other)
        assert found[1].usage.drafted_tokens == 0
        drafted.append(found[0].usage.drafted_tokens)
    assert drafted[0] < drafted[3]  # it waits for a step or two until it is read


def test_another_may_join_while_the_auxiliary_catches_up() -> None:
    first, second = GenerationRequest(prompt(600), FULL, 20), GenerationRequest(prompt(20), FULL, 60)
    with still(bundle()) as scheduler:
        expected = [*replies(scheduler.submit(first)), *replies(scheduler.submit(second))]
    for number, drafts in ((1, False), (3, False), (5, False), (24, True)):
        with still(bundle(), DRAFTS, slice_ms=1e-6) as scheduler:
            found = joined(scheduler, number, first, second)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
        assert (found[0].usage.drafted_tokens > 0) is drafts


def test_requests_that_begin_together_have_no_drafts() -> None:
    requests = [GenerationRequest(prompt(20, seed), FULL, 8) for seed in range(3)]
    arrived = threading.Event()
    with still(bundle(), DRAFTS) as scheduler:
        receive, scheduler._receive = scheduler._receive, lambda: (arrived.wait(), receive())
        tickets = [scheduler.submit(each) for each in requests]
        arrived.set()
        found = replies(*tickets)
        assert isinstance(scheduler._decoder, Drafted)
        after = ask(scheduler, prompt(25, seed=9))
    assert [each.usage.drafted_tokens for each in found] == [0, 0, 0]
    assert after.usage.drafted_tokens > 0


def kept_after(request: GenerationRequest, who: str, cancelled_at: int | None) -> tuple[Reply, Context]:
    """Return an answer, to its end or given up at a step, and the one context that is kept then."""
    kept: list[Context] = []
    quiet, ready = threading.Event(), threading.Event()
    with still(bundle(), Drafting(who)) as scheduler:
        receive = scheduler._receive

        def idle() -> Iterator[None]:
            if scheduler.statistics()["requests"]:
                kept.extend(entry.context.compacted() for entry in scheduler._prefixes._entries)
                quiet.set()
            yield from ()

        scheduler._prefixes._refining = idle
        scheduler._receive = lambda: (ready.wait(), receive())
        ticket = scheduler.submit(request)
        if cancelled_at is not None:
            at_step(scheduler, cancelled_at, ticket.cancel)
        ready.set()
        (found,) = replies(ticket)
        assert quiet.wait(30)
    (context,) = kept
    return found, context


@pytest.mark.parametrize("who", ["auxiliary", "auto"])
@pytest.mark.parametrize("dial", DIALS)
def test_what_is_kept_of_an_answer_is_a_replay(dial: str, who: str) -> None:
    ids, lengths = prompt(30), set()
    for number in (1, 3, 4, 5, 9, None):
        found, context = kept_after(GenerationRequest(ids, DIALS[dial], 36), who, number)
        assert context.tokens[: len(ids)] == ids
        answer = context.tokens[len(ids) :]
        assert answer[: len(found.tokens)] == found.tokens
        lengths.add(len(answer))
        check_replay(context, ids, DIALS[dial])
    assert max(lengths) == 36
    assert len(lengths) > 3


def test_a_step_that_fails_leaves_a_server_that_goes_on_drafting() -> None:
    with still(bundle(), DRAFTS) as scheduler:
        at_step(scheduler, 3, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ask(scheduler, prompt(30))
        again = ask(scheduler, prompt(30))
    with still(bundle()) as scheduler:
        assert again.tokens == ask(scheduler, prompt(30)).tokens
    assert again.usage.drafted_tokens > 0


def test_an_auxiliary_that_cannot_draft_is_refused() -> None:
    prefix, _ = prefixed(llama(), 1, tokenizer=chat_tokenizer())
    with pytest.raises(InputError, match=r"cannot draft: .*first layers"):
        Scheduler(prefix, drafting=DRAFTS)
    with still(prefix, Drafting("auto")) as scheduler:
        assert ask(scheduler, prompt(20)).usage.drafted_tokens == 0


def test_usage_tells_of_drafts_where_there_were_any(starts: dict[str, Path]) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["wave", "lamp"]}}}
    body = {"model": "tiny", "max_tokens": 12, "messages": [{"role": "user", "content": "one two"}]}

    def answer(url: str, **fields: Any) -> tuple[str, dict[str, Any]]:
        found = httpx.post(f"{url}/v1/chat/completions", json=body | fields, timeout=60).raise_for_status().json()
        return found["choices"][0]["message"]["content"], found["usage"]["kvp"]

    with serving(starts["pruned"]) as (url, _):
        expected, kvp = answer(url)
        assert "draft" not in kvp
    with serving(starts["pruned"], drafting=DRAFTS) as (url, _):
        text, kvp = answer(url)
        assert text == expected
        assert kvp["draft"]["tokens"] >= kvp["draft"]["accepted"] >= 0
        text, kvp = answer(url, response_format=schema)
        assert json.loads(text) in ("wave", "lamp")
        assert "draft" not in kvp
