"""Many requests on one thread: the tokens are those of a request alone, and nobody waits longer than a slice."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import mlx.core as mx
import pytest
from support.directories import write_random
from support.scheduling import (
    FULL,
    alone,
    ask,
    endless,
    plain,
    prompts,
    read,
    recomputing,
    replies,
    scheduler_of,
)
from support.tiny import chat_tokenizer, llama, paired, small_llama

from kvp_mlx.bundle.config import MeasuredDial
from kvp_mlx.bundle.loading import KVPModel, load_any
from kvp_mlx.engine.cache_format import read_saved
from kvp_mlx.engine.context import Context
from kvp_mlx.engine.dial import Dial, dial_of
from kvp_mlx.engine.pace import Pace, Steps
from kvp_mlx.engine.reply import reply
from kvp_mlx.errors import InputError, KVPError
from kvp_mlx.serve.decoding import OneByOne
from kvp_mlx.serve.requests import GenerationRequest, Progress, Sampling, Token
from kvp_mlx.serve.scheduler import REFINE_AFTER_SECONDS, QueueFullError, Scheduler, Ticket

KVP = Dial("kvp", 5, 3, 0.3)


@pytest.fixture(scope="module")
def model() -> KVPModel:
    return recomputing()


@pytest.fixture(scope="module")
def pair() -> KVPModel:
    """A bundle whose auxiliary is a model of its own."""
    layer_map = [(0,), (0,), (1,), (2,)]
    bundle, _ = paired(llama(), small_llama(), layer_map, tokenizer=chat_tokenizer())
    return endless(bundle)


def test_full_is_mlx_lms_alone_cached_and_after_an_edit(model: KVPModel) -> None:
    (ids,) = prompts(60)
    edited = [*ids[:25], 7, *ids[26:]]
    with scheduler_of(model) as scheduler:
        first, again, other = ask(scheduler, ids), ask(scheduler, ids), ask(scheduler, edited)
        longer = ask(scheduler, [*ids, *first.tokens, 3, 4, 5])
    assert first.tokens == again.tokens == plain(model.base, ids)
    assert other.tokens == plain(model.base, edited)
    assert longer.tokens == plain(model.base, [*ids, *first.tokens, 3, 4, 5])
    cached = [each.usage.cached_tokens for each in (first, again, other, longer)]
    assert cached == [0, 59, 25, 68]
    assert {each.usage.exact_tokens for each in (first, again, other)} == {60}


@pytest.mark.parametrize("slice_ms", [1e-6, 50.0])
def test_eight_at_once_of_different_lengths_answer_as_they_do_alone(model: KVPModel, slice_ms: float) -> None:
    asked = prompts(1, 2, 70, 33, 120, 9, 200, 47)
    lengths = [3, 20, 9, 1, 12, 30, 2, 17]

    async def staggered(scheduler: Scheduler) -> list[list[int]]:
        readers = []
        for ids, length in zip(asked, lengths, strict=True):
            readers.append(asyncio.create_task(read(scheduler.submit(GenerationRequest(ids, FULL, length)))))
            await asyncio.sleep(0.01)
        return [each.tokens for each in await asyncio.gather(*readers)]

    with scheduler_of(model, slice_ms=slice_ms, max_batch=5) as scheduler:
        found = asyncio.run(staggered(scheduler))
    assert found == [plain(model.base, ids, length) for ids, length in zip(asked, lengths, strict=True)]


def test_caches_that_do_not_merge_are_decoded_one_after_the_other(model: KVPModel) -> None:
    asked = prompts(30, 55, 12)
    with scheduler_of(model) as scheduler:
        scheduler._decoder = OneByOne(model.base)
        found = replies(*(scheduler.submit(GenerationRequest(ids, FULL, 9)) for ids in asked))
        varied = ask(scheduler, asked[0], max_tokens=40, sampling=Sampling(presence_penalty=1000.0))
    assert [each.tokens for each in found] == [plain(model.base, ids, 9) for ids in asked]
    assert len(set(varied.tokens)) == 40


@pytest.mark.parametrize("slice_ms", [1e-6, 50.0])
@pytest.mark.parametrize("bundle", ["model", "pair"])
def test_prediction_gives_the_engines_tokens(bundle: str, slice_ms: float, request: pytest.FixtureRequest) -> None:
    model: KVPModel = request.getfixturevalue(bundle)
    dial = KVP if bundle == "model" else replace(KVP, recompute=None)
    asked = prompts(80, 40, 120)
    with scheduler_of(model, slice_ms=slice_ms) as scheduler:
        found = replies(*(scheduler.submit(GenerationRequest(ids, dial, 8)) for ids in asked))
    for ids, each in zip(asked, found, strict=True):
        (*_, last) = reply(Context(model), ids, dial, max_tokens=8)
        assert each.tokens == alone(model, ids, dial)
        usage = each.usage
        assert (usage.path, usage.prompt_tokens, usage.completion_tokens) == ("kvp", len(ids), 8)
        assert usage.predicted_tokens == last.predicted_tokens > 0
        assert (usage.recomputed_tokens, usage.exact_tokens) == (last.recomputed_tokens, last.exact_tokens)


def test_slices_change_no_number(model: KVPModel, pair: KVPModel) -> None:
    (ids,) = prompts(100)
    for bundle, asked in ((model, KVP), (model, FULL), (pair, replace(KVP, recompute=None)), (pair, FULL)):
        dial = asked.settled(bundle.config, len(ids), 0, 0)
        whole, sliced, pace = Context(bundle), Context(bundle), Pace(1e-6)
        whole.read(ids, dial, step_size=32)
        steps, pauses = sliced.reading(ids, dial, step_size=32, pace=pace), 0
        while pace.advance(steps):
            pauses += 1
        assert pauses > 12
        assert (whole.tokens, whole.exact_tokens) == (sliced.tokens, sliced.exact_tokens)
        for one, other in zip(whole.cache, sliced.cache, strict=True):
            assert all(map(mx.array_equal, one.keys_and_values(), other.keys_and_values()))


def test_decoding_waits_for_one_slice_at_most(model: KVPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    with scheduler_of(model, slice_ms=1e-6) as scheduler:
        read_slice, decode = scheduler._slice, scheduler._decoder.step

        def noted(name: str, function: object) -> object:
            return lambda *args: (order.append(name), function(*args))[1]

        monkeypatch.setattr(scheduler, "_slice", noted("slice", read_slice))
        monkeypatch.setattr(scheduler._decoder, "step", noted("step", decode))
        short, long = prompts(4, 700)
        running = scheduler.submit(GenerationRequest(short, FULL, 200))
        while "step" not in order:
            time.sleep(0.001)
        answers = replies(running, scheduler.submit(GenerationRequest(long, KVP, 4)))
    assert len(answers[0].tokens) == 200
    between = "".join(name[1] for name in order).split("t")  # step: t, slice: l
    assert max(map(len, between[1:-1])) == 1
    assert sum(map(len, between)) > 12


@pytest.mark.parametrize("dial", [FULL, replace(KVP, exact_head=300)], ids=["full", "kvp"])
def test_a_reading_given_up_at_any_point_leaves_right_answers_and_what_was_read(
    model: KVPModel, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ids,) = prompts(600)  # chunks of 256
    expected, kept, advance = alone(model, ids, dial), set(), Pace.advance
    monkeypatch.setattr("kvp_mlx.serve.scheduler.LONE_SLICE_MS", 0.0)
    for point in range(1, 14):
        tickets: list[Ticket] = []
        with scheduler_of(model, slice_ms=1e-6) as scheduler:
            monkeypatch.setattr(Pace, "advance", _cancelling(tickets, point, advance))
            tickets.append(scheduler.submit(GenerationRequest(ids, dial, 8)))
            (stopped,) = replies(tickets[0])
            monkeypatch.setattr(Pace, "advance", advance)
            assert stopped.tokens == []
            answer = ask(scheduler, ids, dial)
            assert scheduler.statistics()["slices"] - scheduler.statistics()["finished"] >= point
        kept.add(answer.usage.cached_tokens)
        assert answer.usage.exact_tokens == (600 if dial is FULL else 300)
        assert answer.tokens == expected
    assert kept == ({0, 256, 512, 599} if dial is FULL else {0, 256, 300})


def _cancelling(tickets: list[Ticket], point: int, advance: Callable[..., bool]) -> Callable[..., bool]:
    """Return what reads a slice, and in its ``point``-th one gives the request up."""
    slices: list[int] = []

    def advance_and_count(pace: Pace, steps: Steps[None]) -> bool:
        slices.append(0)
        assert len(slices) <= point
        if len(slices) == point:
            tickets[0].cancel()
        return advance(pace, steps)

    return advance_and_count


def test_an_answer_given_up_is_kept_and_others_go_on(model: KVPModel) -> None:
    ids, other = prompts(50, 30)

    async def give_up(ticket: Ticket) -> list[int]:
        tokens = []
        async for event in ticket:
            if isinstance(event, Token):
                tokens.append(event.token)
                if len(tokens) == 5:
                    ticket.cancel()
        return tokens

    async def both(scheduler: Scheduler) -> tuple[list[int], list[int]]:
        stopped = scheduler.submit(GenerationRequest(ids, FULL, 400))
        goes_on = scheduler.submit(GenerationRequest(other, FULL, 60))
        tokens, answer = await asyncio.gather(give_up(stopped), read(goes_on))
        return tokens, answer.tokens

    with scheduler_of(model) as scheduler:
        tokens, answer = asyncio.run(both(scheduler))
        again = ask(scheduler, [*ids, *tokens, 1])
        assert scheduler.statistics()["cancelled"] == 1
    assert tokens == plain(model.base, ids, 5)
    assert answer == plain(model.base, other, 60)
    assert again.usage.cached_tokens == 55
    assert again.tokens == plain(model.base, [*ids, *tokens, 1])


def test_progress_tells_how_far_a_prompt_is_read(model: KVPModel) -> None:
    (ids,) = prompts(600)
    with scheduler_of(model) as scheduler:
        scheduler._prefixes._refining = lambda: iter(())
        ask(scheduler, ids[:100])
        predicted = ask(scheduler, ids, KVP)
        found = ask(scheduler, ids)
    assert {(each.total, each.cached) for each in found.progress} == {(600, 100)}
    assert [each.processed for each in found.progress] == [100, 356, 599]
    assert isinstance(found.events[0], Progress)
    done = [each.processed for each in predicted.progress]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (100, 599)
    assert 100 < done[1] < 356  # the base reads some of it again


def test_only_so_many_wait_and_what_cannot_be_answered_is_refused(model: KVPModel) -> None:
    ids, other = prompts(60, 20)
    with scheduler_of(model, max_batch=1, queue_limit=2) as scheduler:
        running = scheduler.submit(GenerationRequest(ids, FULL, 5000))
        while not scheduler.statistics()["running"]:
            time.sleep(0.001)
        waiting = [scheduler.submit(GenerationRequest(other, FULL, 4)) for _ in range(2)]
        with pytest.raises(QueueFullError) as full:
            scheduler.submit(GenerationRequest(other, FULL, 4))
        assert 1 <= full.value.retry_after_seconds <= 60
        assert scheduler.statistics()["waiting"] == 2
        waiting[0].cancel()
        waiting[0].cancel()
        running.cancel()
        _, gone, answered = replies(running, *waiting)
        assert (gone.tokens, answered.tokens) == ([], plain(model.base, other, 4))
        wrong = [
            GenerationRequest([], FULL),
            GenerationRequest([1, 97], FULL),
            GenerationRequest([1, -1], FULL),
            GenerationRequest([1], FULL, 0),
            GenerationRequest([1], FULL, sampling=Sampling(logit_bias={97: 1.0})),
        ]
        for request in wrong:
            with pytest.raises(InputError):
                scheduler.submit(request)
        assert scheduler.statistics()["waiting"] == 0


def test_what_an_idle_server_has_room_for_does_not_wait(model: KVPModel) -> None:
    asked = [GenerationRequest(ids, FULL, 4) for ids in prompts(*range(20, 29))]
    with scheduler_of(model, max_batch=8, queue_limit=1) as scheduler:
        assert scheduler.capacity == 9
        tickets = list(map(scheduler.submit, asked))  # before any of them can have ended
        with pytest.raises(QueueFullError):
            scheduler.submit(GenerationRequest(prompts(30)[0], FULL, 4))
        assert [len(found.tokens) for found in replies(*tickets)] == [4] * 9


def test_a_short_prompt_does_not_wait_for_a_long_one(model: KVPModel) -> None:
    long, short = prompts(20_000, 20)
    with scheduler_of(model, slice_ms=5.0) as scheduler:
        slow = scheduler.submit(GenerationRequest(long, FULL, 1))
        ask(scheduler, short)
        assert scheduler.statistics()["reading"] == 1
        slow.cancel()


def test_idle_work_rests_while_a_request_is_being_prepared(model: KVPModel) -> None:
    steps: list[float] = []

    def idle_work() -> Iterator[float]:
        while True:
            steps.append(time.monotonic())
            yield 0.001

    def wait_for_more() -> None:
        before, end = len(steps), time.monotonic() + 10
        while len(steps) < before + 3:
            assert time.monotonic() < end
            time.sleep(0.001)

    (ids,) = prompts(20)
    with scheduler_of(model) as scheduler:
        scheduler._prefixes.idle_work = idle_work
        ask(scheduler, ids)
        wait_for_more()
        with scheduler.expecting(), scheduler.expecting():
            time.sleep(0.05)  # a step may be under way
            before = len(steps)
            time.sleep(0.05)
            assert len(steps) == before
            ask(scheduler, ids)
            ended = time.monotonic()
        wait_for_more()
        assert steps[before] > ended + 0.8 * REFINE_AFTER_SECONDS  # the next request may come at once


def test_what_fails_is_told_and_the_next_request_is_answered(model: KVPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, other = prompts(30, 40)
    with scheduler_of(model) as scheduler:
        monkeypatch.setattr(scheduler._decoder, "step", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ask(scheduler, ids)
        assert ask(scheduler, other).tokens == plain(model.base, other)
        assert scheduler.statistics()["failed"] == 1


def test_closing_tells_those_that_run_and_those_that_wait(model: KVPModel) -> None:
    ids, other = prompts(30, 40)
    with scheduler_of(model, max_batch=1) as scheduler:
        tickets = [scheduler.submit(GenerationRequest(each, FULL, 50_000)) for each in (ids, other)]
        threading.Timer(0.2, scheduler.close).start()
        for ticket in tickets:
            with pytest.raises(KVPError, match="stopping"):
                replies(ticket)
        with pytest.raises(KVPError, match="stopping"):
            scheduler.submit(GenerationRequest(ids, FULL))
    scheduler = Scheduler(model)
    ticket = scheduler.submit(GenerationRequest(ids, FULL, 30))
    scheduler.close(grace_seconds=60)
    assert replies(ticket)[0].tokens == plain(model.base, ids, 30)


OTHER_KINDS = {
    "recurrent": {
        "model_type": "mamba", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "state_size": 8,
        "num_hidden_layers": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4,
    },
    "rotating": {
        "model_type": "gemma3_text", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8,
        "sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_models_whose_caches_cannot_be_cut(kind: str, base_dir, tmp_path) -> None:
    write_random(tmp_path, OTHER_KINDS[kind])
    for file in base_dir.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = endless(load_any(str(tmp_path)))
    asked = prompts(90, 20, 55)
    with scheduler_of(model, slice_ms=1e-6) as scheduler:
        found = replies(*(scheduler.submit(GenerationRequest(ids, FULL, 6, stable_tokens=10)) for ids in asked))
        again = ask(scheduler, asked[0])
        longer = ask(scheduler, [*asked[0], *again.tokens, 5], Dial())
        edited = ask(scheduler, [*asked[0][:12], 5, 6, 7])
    for ids, each in zip(asked, found, strict=True):
        assert each.tokens == plain(model.base, ids, 6)
    assert again.tokens == plain(model.base, asked[0])
    assert longer.tokens == plain(model.base, [*asked[0], *again.tokens, 5])
    assert edited.tokens == plain(model.base, [*asked[0][:12], 5, 6, 7])
    assert [each.usage.cached_tokens for each in (again, longer, edited)] == [89, 98, 10]


def test_on_disk_too_a_shorter_conversation_is_found_where_the_longer_cannot_be_cut(base_dir, tmp_path) -> None:
    place, saved = tmp_path / "model", tmp_path / "saved"
    place.mkdir()
    write_random(place, OTHER_KINDS["rotating"])
    for file in base_dir.glob("token*"):
        (place / file.name).write_bytes(file.read_bytes())
    model, (ids,) = endless(load_any(str(place))), prompts(90)
    with scheduler_of(model, cache_dir=saved) as scheduler:
        replies(scheduler.submit(GenerationRequest(ids, FULL, 6, stable_tokens=10)))
    assert {10, len(ids) - 1} < {len(read_saved(each).tokens) for each in saved.iterdir()}
    with scheduler_of(model, cache_dir=saved) as scheduler:
        edited = ask(scheduler, [*ids[:12], 5, 6, 7])
    assert edited.usage.cached_tokens == 10
    assert edited.tokens == plain(model.base, [*ids[:12], 5, 6, 7])


def test_what_one_measured_dial_predicted_is_not_given_to_the_next(model: KVPModel) -> None:
    measured = [
        MeasuredDial(quality="balanced", from_tokens=length, exact_head=head, exact_tail=2, recompute=0.1)
        for length, head in ((0, 9), (120, 12))
    ]
    config = model.config.model_copy(update={"dials": tuple(measured)})
    (ids,), auto = prompts(180), dial_of("balanced", path="kvp")
    with scheduler_of(replace(model, config=config)) as scheduler:
        scheduler._prefixes._refining = lambda: iter(())  # so that what was predicted stays so
        turns = [ask(scheduler, ids[:length], auto, 1) for length in (90, 110, 130, 170)]
        fast = ask(scheduler, ids[:100], dial_of("fast"), 1)
        plain_one = ask(scheduler, ids[:100], Dial("kvp", 9, 2, 0.1), 1)
    assert [turn.usage.exact_tokens for turn in turns] == [9, 9, 12, 12]
    assert [turn.usage.cached_tokens for turn in turns] == [0, 90, 9, 130]  # 9: exact, whoever reads it
    assert (fast.usage.cached_tokens, plain_one.usage.cached_tokens) == (12, 99)  # another's, and the same by number
    assert turns[0].tokens == alone(model, ids[:90], Dial("kvp", 9, 2, 0.1), 1)
