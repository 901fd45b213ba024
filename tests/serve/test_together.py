"""Prompts that wait together: they are read in one batch where that can be, and their answers begin together."""

import threading
import time

import pytest
from support.scheduling import FULL, alone, ask, plain, prompts, recomputing, replies, scheduler_of

from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.engine.context import Context
from kvp_mlx.engine.dial import Dial
from kvp_mlx.engine.pace import Pace, Steps
from kvp_mlx.serve import work as work_module
from kvp_mlx.serve.requests import GenerationRequest
from kvp_mlx.serve.scheduler import Scheduler, Ticket

KVP = Dial("kvp", 5, 3, 0.3)


@pytest.fixture(scope="module")
def model() -> KVPModel:
    return recomputing()


@pytest.mark.parametrize("dial", [FULL, KVP], ids=["full", "kvp"])
@pytest.mark.parametrize("longest", [90, 1500])
def test_short_prompts_that_wait_together_begin_together(
    model: KVPModel, dial: Dial, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompts(60, 20, longest, 40)
    with scheduler_of(model) as scheduler:
        found = replies(*asked_at_once(scheduler, [GenerationRequest(ids, dial, 8) for ids in asked], monkeypatch))
    steps = scheduler.statistics()["steps"]
    assert [each.tokens for each in found] == [alone(model, ids, dial) for ids in asked]
    first_ms = [each.usage.queue_ms + each.usage.ttft_ms for each in found]
    if longest == 90:
        assert steps == (9 if dial is FULL else 8)  # one of them joins; predictions bring their first tokens along
    else:
        assert max(first_ms[0], first_ms[1], first_ms[3]) < first_ms[2]
        assert steps > 9


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each batch read that was read."""
    sizes, read_batch = [], work_module.reading_together

    def noted(contexts: list[Context], *rest: object, **how: object) -> Steps[None]:
        sizes.append(len(contexts))
        return read_batch(contexts, *rest, **how)

    monkeypatch.setattr(work_module, "reading_together", noted)
    return sizes


def asked_at_once(scheduler: Scheduler, requests: list[GenerationRequest], patch: pytest.MonkeyPatch) -> list[Ticket]:
    arrived, receive = threading.Event(), scheduler._receive
    patch.setattr(scheduler, "_receive", lambda: (arrived.wait(), receive()))
    tickets = [scheduler.submit(request) for request in requests]
    arrived.set()
    return tickets


def test_prompts_about_as_long_are_read_in_one_batch(
    model: KVPModel, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    head, same = prompts(40, 50)
    asked = [[*head, *ids] for ids in prompts(60, 70, 90, 12)] + [same, same]
    with scheduler_of(model) as scheduler:
        ask(scheduler, [*head, 1])
        found = replies(*asked_at_once(scheduler, [GenerationRequest(ids, FULL, 8) for ids in asked], monkeypatch))
    assert batches == [3]
    assert [each.tokens for each in found] == [plain(model.base, ids) for ids in asked]
    cached = [each.usage.cached_tokens for each in found]
    assert cached[:4] == [40, 40, 40, 40]
    assert sorted(cached[4:]) == [0, 49]  # the same prompt is read once
    assert all(each.progress[-1].processed == len(ids) - 1 for each, ids in zip(found, asked, strict=True))


def test_a_short_prompt_waits_for_those_that_are_being_prepared(
    model: KVPModel, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvp_mlx.serve.scheduler.PREPARED_SECONDS", 10.0)
    asked, tickets = prompts(60, 70, 80), []
    with scheduler_of(model) as scheduler:
        with scheduler.expecting():
            for ids in asked:
                tickets.append(scheduler.submit(GenerationRequest(ids, FULL, 8)))
                time.sleep(0.02)
        found = replies(*tickets)
    assert batches == [3]
    assert [each.tokens for each in found] == [plain(model.base, ids) for ids in asked]


def test_one_of_a_batch_that_goes_away_or_fails_leaves_the_others(
    model: KVPModel, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, advance, slices = prompts(60, 70, 80), Pace.advance, []
    with scheduler_of(model, slice_ms=1e-6) as scheduler:
        monkeypatch.setattr("kvp_mlx.serve.scheduler.LONE_SLICE_MS", 0.0)
        tickets: list[Ticket] = []

        def advance_and_cancel(pace: Pace, steps: Steps[None]) -> bool:
            slices.append(0)
            if len(slices) == 2:
                tickets[0].cancel()
            return advance(pace, steps)

        requests = [GenerationRequest(ids, FULL, 8) for ids in asked]
        monkeypatch.setattr(Pace, "advance", advance_and_cancel)
        tickets += asked_at_once(scheduler, requests, monkeypatch)
        gone, *others = replies(*tickets)
        monkeypatch.setattr(Pace, "advance", advance)
        again = ask(scheduler, asked[0])
    assert batches == [3]
    assert gone.tokens == []
    assert [each.tokens for each in [again, *others]] == [plain(model.base, ids) for ids in asked]
