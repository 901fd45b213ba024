"""What was read is found again: in memory, on disk, exact or predicted, refined meanwhile."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.scheduling import FULL, ask, plain, scheduler_of
from support.tiny import chat_tokenizer, llama, paired, prefixed, small_llama, token_ids
from support.waiting import wait_until

from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.engine import cache_format
from kvp_mlx.engine.cache_format import read_saved
from kvp_mlx.engine.context import Context
from kvp_mlx.engine.dial import Dial
from kvp_mlx.engine.prefill import base_prefill
from kvp_mlx.serve.prefixes import Prefixes
from kvp_mlx.serve.shelf import Shelf

KVP = Dial("kvp", 5, 0)
BYTES_PER_TOKEN = 4 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head_dim, fp32


@pytest.fixture(scope="module")
def model() -> KVPModel:
    bundle, _ = prefixed(llama(), 1, tokenizer=chat_tokenizer())
    bundle.text_tokenizer._eos_token_ids.clear()
    return bundle


def ids_of(length: int, seed: int = 0) -> list[int]:
    return token_ids(length, seed=seed)[0].tolist()


def read(model: KVPModel, ids: list[int], dial: Dial = FULL) -> Context:
    context = Context(model)
    context.read([*ids, 0], dial)
    return context


def assert_exact(model: KVPModel, context: Context) -> None:
    true = base_prefill(model, mx.array([context.tokens]))
    for mine, theirs in zip(context.cache, true, strict=True):
        for one, two in zip(mine.keys_and_values(), theirs.keys_and_values(), strict=True):
            np.testing.assert_allclose(one, two, atol=1e-4)


def test_the_longest_beginning_of_any_conversation_is_found(model: KVPModel) -> None:
    a, b = ids_of(50), [*ids_of(20), *ids_of(30, 1)]
    prefixes = Prefixes(model, 10**9)
    for ids in (a, b):
        prefixes.put(read(model, ids), FULL)
    for asked, shared in (
        (a, 50),
        ([*a, 1, 2], 50),
        ([*b[:25], 96, 96], 25),
        (a[:10], 10),
        ([96, *a], 0),
        ([], 0),
    ):
        found = prefixes.take(asked, FULL)
        assert (found.tokens, found.exact_tokens) == (asked[:shared], shared)
        assert prefixes.shared(asked, FULL) == shared
        if shared:
            assert_exact(model, found)
    assert len(prefixes) == 2


def test_what_was_taken_is_nobody_elses(model: KVPModel) -> None:
    ids, prefixes = ids_of(40), Prefixes(model, 10**9)
    prefixes.put(read(model, ids), FULL)
    one = prefixes.take(ids[:30], FULL)
    one.read([*ids[:30], *ids_of(30, 5), 0], FULL)
    other = prefixes.take(ids, FULL)
    assert other.tokens == ids
    assert_exact(model, other)
    assert_exact(model, one)


def test_exact_requests_take_nothing_that_was_predicted(model: KVPModel) -> None:
    ids, prefixes = ids_of(40), Prefixes(model, 10**9)
    prefixes.put(read(model, ids, KVP), KVP)
    assert prefixes.take(ids, FULL).tokens == ids[:5]
    predicted = prefixes.take(ids, KVP)
    assert (predicted.tokens, predicted.exact_tokens) == (ids, 5)
    assert_exact(model, prefixes.take(ids, FULL))


def test_what_one_dial_predicted_is_never_given_to_another(model: KVPModel, tmp_path: Path) -> None:
    ids, prefixes = ids_of(40), Prefixes(model, 10**9, tmp_path)
    prefixes.put(read(model, ids, KVP), KVP)
    other = Dial("kvp", 3, 0)
    assert (prefixes.shared(ids, KVP), prefixes.shared(ids, other)) == (40, 5)
    assert prefixes.take(ids, other).tokens == ids[:5]
    prefixes.put(read(model, ids, other), other)
    assert [prefixes.shared(ids, dial) for dial in (KVP, other, FULL)] == [40, 40, 5]
    prefixes.save_all()
    again = Prefixes(model, 10**9, tmp_path)
    assert [again.shared(ids, dial) for dial in (KVP, other, FULL, Dial("kvp", 5, 1))] == [40, 40, 5, 5]


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        ((40, FULL), (60, FULL), 1),
        ((60, FULL), (40, FULL), 1),
        ((40, KVP), (60, FULL), 1),
        ((40, FULL), (60, KVP), 2),
        ((60, KVP), (40, FULL), 2),
        ((40, KVP), (40, FULL), 1),
    ],
)
def test_only_what_another_cannot_replace_is_kept(model: KVPModel, first: tuple, second: tuple, left: int) -> None:
    prefixes = Prefixes(model, 10**9)
    for length, dial in (first, second):
        prefixes.put(read(model, ids_of(60)[:length], dial), dial)
    assert len(prefixes) == left


def test_memory_is_bounded_and_the_least_recently_used_goes_first(model: KVPModel) -> None:
    prefixes = Prefixes(model, 100 * BYTES_PER_TOKEN)
    asked = [ids_of(40, seed) for seed in range(3)]
    for ids in asked[:2]:
        prefixes.put(read(model, ids).compacted(), FULL)
    prefixes.take(asked[0], FULL)
    prefixes.put(read(model, asked[2]).compacted(), FULL)
    assert [prefixes.shared(ids, FULL) > 5 for ids in asked] == [True, False, True]
    assert prefixes.nbytes <= 100 * BYTES_PER_TOKEN
    prefixes.put(read(model, ids_of(200, 9)).compacted(), FULL)
    assert (len(prefixes), prefixes.nbytes) == (0, 0)


def test_the_stable_part_outlives_its_conversation(model: KVPModel) -> None:
    prefixes = Prefixes(model, 100 * BYTES_PER_TOKEN)
    asked = [ids_of(60, seed) for seed in range(3)]
    prefixes.put(read(model, asked[0]).compacted(), FULL, stable_tokens=20)
    for ids in asked[1:]:
        prefixes.put(read(model, ids).compacted(), FULL)
        assert prefixes.nbytes <= 100 * BYTES_PER_TOKEN
    assert prefixes.shared(asked[0], FULL) == 20
    assert_exact(model, prefixes.take(asked[0], FULL))


def test_stable_tokens_are_read_exactly_whatever_the_dial(model: KVPModel) -> None:
    ids = ids_of(60)
    with scheduler_of(model) as scheduler:
        first = ask(scheduler, ids, KVP, stable_tokens=30)
        other = ask(scheduler, [*ids[:30], *ids_of(20, 3)])
    assert (first.usage.path, first.usage.exact_tokens, first.usage.predicted_tokens) == ("kvp", 30, 29)
    assert other.usage.cached_tokens >= 30


def test_a_full_request_after_a_predicted_one_is_mlx_lms(model: KVPModel) -> None:
    ids = ids_of(60)
    with scheduler_of(model) as scheduler:
        scheduler._prefixes._refining = lambda: iter(())
        predicted = ask(scheduler, ids, KVP)
        full = ask(scheduler, ids)
        on_top = ask(scheduler, [*ids, *predicted.tokens, 4], KVP)
    assert (full.usage.cached_tokens, full.tokens) == (5, plain(model.base, ids))
    assert on_top.usage.cached_tokens >= 60


@pytest.mark.parametrize("kind", ["prefix", "pair"])
def test_idle_time_makes_what_was_predicted_exact(kind: str, model: KVPModel) -> None:
    bundle = model
    if kind == "pair":
        bundle, _ = paired(llama(), small_llama(), [(0,), (0,), (1,), (2,)], tokenizer=chat_tokenizer())
        bundle.text_tokenizer._eos_token_ids.clear()
    ids = ids_of(150)
    with scheduler_of(bundle) as scheduler:
        predicted = ask(scheduler, ids, KVP)
        wait_until(lambda: scheduler._prefixes.shared([*ids, *predicted.tokens], FULL) == 158)
        full = ask(scheduler, [*ids, *predicted.tokens, 9])
    assert (full.usage.cached_tokens, full.usage.exact_tokens) == (158, 159)
    assert full.tokens == plain(bundle.base, [*ids, *predicted.tokens, 9])


def test_the_conversation_that_waited_longest_is_refined_first_and_interrupts_lose_a_chunk_at_most(
    model: KVPModel,
) -> None:
    prefixes, asked = Prefixes(model, 10**9), [ids_of(100, seed) for seed in range(2)]
    for ids in asked:
        prefixes.put(read(model, ids, KVP), KVP)
    seen = []
    for interrupted in range(1, 10):
        steps = prefixes.idle_work()
        for _ in range(interrupted):
            next(steps, None)
        steps.close()
        seen.append([prefixes.shared(ids, FULL) for ids in asked])
    assert seen[0] == [5, 5]
    assert all(second == 5 for first, second in seen if first < 100)
    for _ in prefixes.idle_work():
        pass
    for ids in asked:
        assert prefixes.shared(ids, FULL) == 100
        assert_exact(model, prefixes.take(ids, FULL))


# On disk


def test_conversations_outlive_the_process_in_private_files(model: KVPModel, tmp_path: Path) -> None:
    place, asked = tmp_path / "served", [ids_of(60), ids_of(70, 1)]
    with scheduler_of(model, cache_dir=place) as scheduler:
        scheduler._prefixes._refining = lambda: iter(())
        answers = [ask(scheduler, asked[0]), ask(scheduler, asked[1], KVP)]
    found = sorted(place.rglob("*"))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [place, *found] if path.is_dir()}
    assert modes == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_file()} == {0o600}
    saved = [read_saved(path) for path in place.iterdir()]
    assert sorted(each.exact_tokens for each in saved) == [5, 68]
    with scheduler_of(model, cache_dir=place) as scheduler:
        assert scheduler.statistics()["cached_bytes"] == 0
        scheduler._prefixes._refining = lambda: iter(())
        again = [ask(scheduler, [*ids, *one.tokens, 3]) for ids, one in zip(asked, answers, strict=True)]
        on_top = ask(scheduler, [*asked[1], *answers[1].tokens, 3], KVP)
    assert [each.usage.cached_tokens for each in again] == [68, 5]
    assert on_top.usage.cached_tokens == 78
    for ids, one, each in zip(asked, answers, again, strict=True):
        assert each.tokens == plain(model.base, [*ids, *one.tokens, 3])


def test_a_longer_turn_takes_the_place_of_the_shorter_on_disk(model: KVPModel, tmp_path: Path) -> None:
    ids = ids_of(60)
    for length in (20, 40, 60):
        with scheduler_of(model, cache_dir=tmp_path) as scheduler:
            ask(scheduler, ids[:length], max_tokens=1)
    assert [len(read_saved(place).tokens) for place in tmp_path.iterdir()] == [60]


def test_the_disk_is_bounded_and_memory_gives_way_to_it(model: KVPModel, tmp_path: Path) -> None:
    asked = [ids_of(60, seed) for seed in range(4)]
    limit = 150 * BYTES_PER_TOKEN
    prefixes = Prefixes(model, limit, tmp_path)
    for ids in asked:
        prefixes.put(read(model, ids).compacted(), FULL)
        prefixes.save_all()
        assert prefixes.nbytes <= limit
    assert prefixes.disk_bytes <= limit + 70 * BYTES_PER_TOKEN
    assert prefixes.shared(asked[3], FULL) == prefixes.shared(asked[2], FULL) == 60
    assert prefixes.shared(asked[0], FULL) < 5


def test_what_is_loaded_again_is_as_exact_as_it_was_saved(model: KVPModel, tmp_path: Path) -> None:
    """Refining went on after saving, and was interrupted before the conversation left memory."""
    ids, other = ids_of(100), ids_of(100, 1)
    prefixes = Prefixes(model, 150 * BYTES_PER_TOKEN, tmp_path)
    prefixes.put(read(model, ids, KVP).compacted(), KVP)
    refining, prefixes._refining = prefixes._refining, lambda: iter(())
    prefixes.save_all()
    (entry,) = prefixes._entries
    saved = entry.exact_tokens
    steps = refining()
    while entry.context.exact_tokens == saved:
        next(steps)
    steps.close()
    assert saved < prefixes.shared(ids, FULL) < 100
    prefixes.put(read(model, other).compacted(), FULL)
    assert entry.context is None
    found = prefixes.take(ids, FULL)
    assert (found.tokens, found.exact_tokens) == (ids[:saved], saved)
    assert_exact(model, found)


def test_damaged_and_other_models_conversations_are_passed_over(model: KVPModel, tmp_path: Path) -> None:
    ids = ids_of(60)
    with scheduler_of(model, cache_dir=tmp_path) as scheduler:
        answer = ask(scheduler, ids)
    other, _ = prefixed(llama(seed=5), 1, tokenizer=chat_tokenizer())
    with scheduler_of(other, cache_dir=tmp_path) as scheduler:
        assert ask(scheduler, ids, max_tokens=1).usage.cached_tokens == 0
    assert len(list(tmp_path.iterdir())) == 2
    for place in tmp_path.iterdir():
        data = bytearray((place / "cache.safetensors").read_bytes())
        data[-1] ^= 1
        (place / "cache.safetensors").write_bytes(data)
    (tmp_path / "0123456789abcdef01234567").mkdir()
    with scheduler_of(model, cache_dir=tmp_path) as scheduler:
        found = ask(scheduler, ids)
    assert (found.usage.cached_tokens, found.tokens) == (0, answer.tokens)


def test_only_what_is_damaged_is_said_to_be(model: KVPModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf(model, tmp_path, limit_bytes=2**30)
    places = [shelf.write(read(model, ids_of(60, seed)), None, replacing=None) for seed in range(3)]
    shelf.remove(places[0])
    while shelf.is_writing:
        time.sleep(0.01)
    assert shelf.load(places[0]) is None
    shutil.rmtree(places[2])  # by another server
    assert shelf.load(places[2]) is None
    assert "damaged" not in caplog.text
    (places[1] / "cache.safetensors").write_bytes(b"")
    assert shelf.load(places[1]) is None
    assert "damaged" in caplog.text


def test_what_cannot_be_written_leaves_no_earlier_state_that_nobody_knows(
    model: KVPModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = Shelf(model, tmp_path, limit_bytes=2**30)
    first = shelf.write(read(model, ids_of(40)), None, replacing=None)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_format, "_write_entries", full)
    second = shelf.write(read(model, ids_of(60)), None, replacing=first)
    while shelf.is_writing:
        time.sleep(0.01)
    assert "not kept" in caplog.text
    assert (shelf.holds(first), shelf.holds(second), shelf.nbytes) == (False, False, 0)
    assert not list(tmp_path.iterdir())


SERVING = """
import sys
sys.path.insert(0, {tests!r})
import kvp_mlx
from pathlib import Path
from support.scheduling import ask, scheduler_of
from support.tiny import chat_tokenizer, llama, prefixed, token_ids
model, _ = prefixed(llama(), 1, tokenizer=chat_tokenizer())
model.text_tokenizer._eos_token_ids.clear()
with scheduler_of(model, cache_dir=Path({place!r})) as scheduler:
    seed = 0
    while True:
        ask(scheduler, token_ids(60, seed=seed)[0].tolist(), max_tokens=4)
        while len(list(Path({place!r}).glob("[0-9a-f]*"))) <= seed:
            pass
        print("saved", flush=True)
        seed += 1
"""


def test_a_killed_process_leaves_what_it_had_saved(model: KVPModel, tmp_path: Path) -> None:
    script = SERVING.format(tests=str(Path(__file__).parents[1]), place=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline() == "saved\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with scheduler_of(model, cache_dir=tmp_path) as scheduler:
        for seed in range(2):
            ids = ids_of(60, seed)
            found = ask(scheduler, ids)
            assert (found.usage.cached_tokens, found.tokens) == (59, plain(model.base, ids))
