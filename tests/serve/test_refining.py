"""Answers behind predicted prompts are refined as the engine does, alone and among others, and are kept exact."""

from dataclasses import replace

import mlx.core as mx
import pytest
from support.scheduling import FULL, alone, ask, plain, prompts, recomputing, replies, scheduler_of

import kvp_mlx.serve.work as work_module
from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.engine.dial import Dial
from kvp_mlx.serve.decoding import Batch
from kvp_mlx.serve.requests import GenerationRequest, Sampling

PREDICTED = Dial("kvp", 5, 3, 0.3)
REFINED = replace(PREDICTED, refine_tokens=13)


@pytest.fixture(scope="module")
def model() -> KVPModel:
    return recomputing()


@pytest.mark.parametrize("dial", [REFINED, Dial("kvp", 0, 0, 0.0, refine_tokens=13)])
def test_refined_answers_are_the_engines(model: KVPModel, dial: Dial) -> None:
    asked = prompts(90, 20, 140, 60)
    with scheduler_of(model) as scheduler:
        scheduler._prefixes._refining = lambda: iter(())
        single = ask(scheduler, asked[0], dial, 24)
        dials = [dial, FULL, dial, PREDICTED]
        requests = [GenerationRequest(ids, each, 24, reuse=False) for ids, each in zip(asked, dials, strict=True)]
        together = replies(*map(scheduler.submit, requests))
        longer = ask(scheduler, [*asked[0], *single.tokens, 9], FULL)
    expected = [alone(model, ids, each, 24) for ids, each in zip(asked, dials, strict=True)]
    assert [each.tokens for each in together] == expected
    assert single.tokens == expected[0] != alone(model, asked[0], replace(dial, refine_tokens=0), 24)
    assert longer.usage.cached_tokens >= 90 + 22  # exact, or a full request would not have them
    assert longer.tokens == plain(model.base, [*asked[0], *single.tokens, 9])


def test_an_answer_joins_the_others_when_it_is_exact(model: KVPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, step = [], Batch.step

    def noted(batch: Batch) -> list:
        sizes.append(len(batch))
        return step(batch)

    monkeypatch.setattr(Batch, "step", noted)
    with scheduler_of(model) as scheduler:
        found = ask(scheduler, prompts(90)[0], REFINED, 24)
    assert len(found.tokens) == 24
    assert 10 < len(sizes) < 20  # 85 tokens at 12 a step, one is new each time; then in the batch


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9])
def test_one_that_ends_or_is_given_up_meanwhile_is_kept(model: KVPModel, tokens: int) -> None:
    (ids,) = prompts(90)
    expected = alone(model, ids, REFINED, tokens)
    with scheduler_of(model) as scheduler:
        scheduler._prefixes._refining = lambda: iter(())
        found = ask(scheduler, ids, REFINED, tokens)
        again = ask(scheduler, [*ids, *found.tokens, 9], REFINED, 2)
    assert found.tokens == expected
    assert again.usage.cached_tokens >= 90 + tokens - 1


def test_a_seed_gives_the_same_answer_while_it_is_refined(model: KVPModel) -> None:
    ids, other = prompts(90, 70)
    sampling = Sampling(temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, seed=7)
    with scheduler_of(model, cache_bytes=0) as scheduler:
        request = GenerationRequest(ids, REFINED, 24, sampling)
        (single,) = replies(scheduler.submit(request))
        among, *_ = replies(*map(scheduler.submit, [request, replace(request, ids=other), replace(request, ids=other)]))
    assert single.tokens == among.tokens
    assert len(set(single.tokens)) > 12


@pytest.mark.parametrize("call", [2, 5, 12])
def test_a_step_that_fails_leaves_no_entry_out_of_place(
    model: KVPModel, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The network has read a token by then that the answer does not have yet."""
    (ids,), calls = prompts(90), iter(range(1, 100))

    def failing(_: mx.array, logits: mx.array) -> mx.array:
        if next(calls) == call:
            raise RuntimeError("out of memory")
        return logits

    with scheduler_of(model) as scheduler:
        scheduler._prefixes._refining = lambda: iter(())
        with monkeypatch.context() as patch:
            patch.setattr(work_module, "processors_of", lambda *_: [failing])
            with pytest.raises(RuntimeError, match="out of memory"):
                ask(scheduler, ids, REFINED, 24)
        found = ask(scheduler, [*ids, 9], FULL, 12)
    assert found.usage.cached_tokens > 5
    assert found.tokens == plain(model.base, [*ids, 9], 12)
