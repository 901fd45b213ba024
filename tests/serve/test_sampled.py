"""What a request asks of its answer: sampling, log-probabilities, where it ends."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support.scheduling import (
    FULL,
    ask,
    plain,
    prompts,
    recomputing,
    replies,
    scheduler_of,
)
from support.tiny import chat_tokenizer, llama, prefixed

from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.serve.requests import GenerationRequest, Sampling, Token


@pytest.fixture(scope="module")
def model() -> KVPModel:
    return recomputing()


def test_a_seed_gives_the_same_answer_alone_and_among_others(model: KVPModel) -> None:
    ids, other = prompts(40, 25)
    sampling = Sampling(temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, seed=7)
    with scheduler_of(model, cache_bytes=0) as scheduler:
        request = GenerationRequest(ids, FULL, 20, sampling)
        (first,) = replies(scheduler.submit(request))
        mx.random.seed(3)
        unseeded = replace(request, sampling=replace(sampling, seed=None))
        others = [replace(request, ids=other), unseeded, replace(request, sampling=replace(sampling, seed=8)), unseeded]
        among, *rest = replies(*(scheduler.submit(each) for each in [request, *others]))
    assert first.tokens == among.tokens
    assert len({tuple(each.tokens) for each in [first, *rest]}) == 5


def test_log_probabilities_are_the_models(model: KVPModel) -> None:
    (ids,) = prompts(30)
    with scheduler_of(model) as scheduler:
        found = ask(scheduler, ids, top_logprobs=3)
    logits = model.base(mx.array([[*ids, *found.tokens]]), cache=make_prompt_cache(model.base))[0, 29:-1]
    expected = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    events = [event for event in found.events if isinstance(event, Token)]
    for row, event in zip(expected, events, strict=True):
        best = np.argsort(-row)[:3]
        assert [token for token, _ in event.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in event.top], row[best], atol=1e-3)
        assert event.logprob == pytest.approx(row[event.token], abs=1e-3)
    with scheduler_of(model) as scheduler:
        events = [event for event in ask(scheduler, ids).events if isinstance(event, Token)]
    assert {(event.logprob, event.top) for event in events} == {(None, ())}


def test_stop_texts_end_an_answer_and_are_named(model: KVPModel) -> None:
    (ids,) = prompts(30)
    with scheduler_of(model) as scheduler:
        whole = ask(scheduler, ids, max_tokens=12)
        mark = whole.text[9:14]
        cut = ask(scheduler, ids, max_tokens=12, stop=("not there", mark))
    assert whole.finished.reason == "length"
    assert (cut.text, cut.finished.reason, cut.finished.stop_text) == (whole.text.split(mark)[0], "stop", mark)
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert cut.usage.completion_tokens == len(cut.tokens) < 12


def test_an_end_token_ends_an_answer() -> None:
    model, _ = prefixed(llama(), 1, tokenizer=chat_tokenizer())
    (ids,) = prompts(30)
    answer = plain(model.base, ids, 12)
    for place in (0, 4):
        model.text_tokenizer._eos_token_ids = {answer[place]}
        length = answer.index(answer[place]) + 1
        with scheduler_of(model) as scheduler:
            found = ask(scheduler, ids, max_tokens=12)
        assert (found.tokens, found.finished.reason, found.finished.stop_text) == (answer[:length], "stop", None)
        assert found.text.split() == [
            f"w{token - 5}" if token > 4 else found.text.split()[n] for n, token in enumerate(answer[: length - 1])
        ]


def test_bias_and_penalties_change_what_is_chosen(model: KVPModel) -> None:
    (ids,) = prompts(30)
    with scheduler_of(model) as scheduler:
        biased = ask(scheduler, ids, sampling=Sampling(logit_bias={17: 1000.0}))
        varied = ask(scheduler, ids, max_tokens=40, sampling=Sampling(presence_penalty=1000.0))
        repeated = ask(scheduler, ids, max_tokens=40, sampling=Sampling(frequency_penalty=-1000.0))
    assert biased.tokens == [17] * 8
    assert len(set(varied.tokens)) == 40
    assert len(set(repeated.tokens)) == 1
