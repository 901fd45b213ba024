"""What a conversation has read, against the oracle after every step of random ones; refinement against full prefill."""

import random

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from support.mirror import Mirror, StopReadingError, stop_reading
from support.tiny import chat_tokenizer, entries_of, llama, openelm, paired, prefixed, pruned, small_llama

from kvp_mlx.engine.context import Context
from kvp_mlx.engine.conversation import Conversation
from kvp_mlx.engine.dial import FULL, Dial
from kvp_mlx.engine.pace import Pace, finish
from kvp_mlx.engine.refining import refine, refining
from kvp_mlx.engine.together import reading_together
from kvp_mlx.errors import InputError

KINDS = {
    "model": lambda **parts: paired(llama(), small_llama(), ((0,), (0,), (1,), (2,)), **parts),
    "pruned": lambda **parts: paired(
        llama(), pruned(llama(), [0, 2]), ((0,), (0,), (1,), (1,)), retained=[0, 2], **parts
    ),
    "prefix": lambda **parts: prefixed(llama(), 1, **parts),
    "openelm prefix": lambda **parts: prefixed(openelm(), 2, **parts),
}


def predicted_context(kind, tokens, exact_head=0):
    """Return a context that was predicted, and the same tokens' entries by full prefill."""
    model, oracle = KINDS[kind]()
    context = Context(model)
    context.read([*tokens, 0], Dial("kvp", exact_head, 0))
    return context, oracle.base.forward(np.array([tokens])).cache


def largest_difference(context, expected):
    return max(
        np.abs(getattr(mine, part) - getattr(true, part)).max()
        for mine, true in zip(entries_of(context.cache), expected, strict=True)
        for part in ("keys", "values")
    )


@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_refinement_gives_the_cache_of_full_prefill(kind, chunk):
    context, true = predicted_context(kind, [7, 3, 9, 40, 8, 22, 51, 6, 33, 12, 90, 4, 61, 17, 2, 5] * 2)
    assert largest_difference(context, true) > 0.1
    refine(context, chunk_tokens=chunk)
    assert context.exact_tokens == len(context.tokens) == 32
    assert largest_difference(context, true) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_whose_reading_was_stopped_is_read_anew_with_its_tail(kind):
    model, _ = KINDS[kind]()
    ids = np.random.default_rng(5).integers(5, 97, 40).tolist()
    stopped, whole = Context(model), Context(model)
    for context in (stopped, whole):
        context.read(ids[:8], Dial("full", 0, 0))

    def stop_at_the_end(done, total):
        if done == total:
            raise StopReadingError

    with pytest.raises(StopReadingError):
        stopped.read(ids, Dial("kvp", 0, 6), progress=stop_at_the_end)
    assert len(stopped.tokens) == stopped.exact_tokens == 7
    for context in (stopped, whole):
        context.read(ids, Dial("kvp", 0, 6))
    assert largest_difference(stopped, entries_of(whole.cache)) < 1e-5


@pytest.mark.parametrize("held", [0, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_read_together_are_as_read_alone(kind, held):
    model, _ = KINDS[kind]()
    rng, pace = np.random.default_rng(4), Pace(1e-6)
    prompts = [rng.integers(5, 97, length).tolist() for length in (30, 41, 22)]
    contexts, alone = [Context(model) for _ in prompts], [Context(model) for _ in prompts]
    for context, ids in zip(contexts, prompts, strict=True):
        context.read(ids[: held + 1], FULL)
    stopped = reading_together(contexts, prompts, pace=pace)
    next(stopped)
    stopped.close()
    assert {len(context.tokens) for context in contexts} == {held}
    calls = []
    finish(reading_together(contexts, prompts, pace=pace, progress=lambda *call: calls.append(call)))
    assert calls[-1] == (40 - held, 40 - held)
    for context, other, ids in zip(contexts, alone, prompts, strict=True):
        other.read(ids, FULL)
        assert context.tokens == other.tokens == ids[:-1]
        assert context.exact_tokens == len(ids) - 1
        assert largest_difference(context, entries_of(other.cache)) < 1e-4
        context.read([*ids, 7, 8], Dial("kvp", 0, 0))  # an auxiliary of its own catches up
        other.read([*ids, 7, 8], Dial("kvp", 0, 0))
        assert largest_difference(context, entries_of(other.cache)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_after_refinement_is_the_one_full_prefill_gives(kind):
    ids = np.random.default_rng(3).integers(5, 97, 24).tolist()
    context, _ = predicted_context(kind, ids)
    refine(context, chunk_tokens=7)
    options = {"max_tokens": 12, "prompt_cache": context.cache}
    refined = [token for token, _ in generate_step(mx.array([11]), context.model.base, **options)]
    full = [token for token, _ in generate_step(mx.array([*ids, 11]), context.model.base, max_tokens=12)]
    assert refined == full


def test_a_refinement_that_is_closed_keeps_whole_chunks_and_nothing_of_the_one_begun():
    context, true = predicted_context("prefix", list(range(5, 25)))
    before = entries_of(context.cache)
    work = refining(context, chunk_tokens=8)
    for _ in range(2):  # two of the three layers that have predicted entries, of the first chunk
        next(work)
    work.close()
    assert context.exact_tokens == 0
    assert largest_difference(context, before) == 0
    work = refining(context, chunk_tokens=8)
    for _ in range(3 + 1 + 2):  # the first chunk's layers, its write, and a part of the second chunk
        next(work)
    work.close()
    assert context.exact_tokens == 8
    for mine, full, predicted in zip(entries_of(context.cache), true, before, strict=True):
        np.testing.assert_allclose(mine.values[:, :, :8], full.values[:, :, :8], atol=1e-4)
        np.testing.assert_array_equal(mine.values[:, :, 8:], predicted.values[:, :, 8:])


@pytest.mark.parametrize("call", range(1, 4))
def test_a_refinement_that_fails_leaves_what_is_exact(call, monkeypatch):
    context, true = predicted_context("prefix", list(range(5, 25)))
    work = refining(context, chunk_tokens=8)
    for _ in range(2 * 4 - 1):  # one chunk is written, the second only computed
        next(work)
    layer, calls = type(context.cache[0]), iter(range(1, 100))
    update = layer.update_and_fetch

    def failing(*args):
        if next(calls) == call:
            raise RuntimeError("out of memory")
        return update(*args)

    monkeypatch.setattr(layer, "update_and_fetch", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(work)
    assert context.exact_tokens == len(context.tokens) == 8
    assert largest_difference(context, [layer.first(8) for layer in true]) < 1e-4


def test_an_exact_head_is_exact_and_refinement_begins_behind_it():
    context, true = predicted_context("prefix", list(range(5, 25)), exact_head=6)
    assert context.exact_tokens == 6
    for mine, full in zip(entries_of(context.cache), true, strict=True):
        np.testing.assert_allclose(mine.keys[:, :, :6], full.keys[:, :, :6], atol=1e-4)
    refine(context)
    assert largest_difference(context, true) < 1e-4


def test_a_quantised_cache_is_not_refined():
    model, _ = prefixed(llama(num_attention_heads=2, num_key_value_heads=1, head_dim=32), 1, tokenizer=chat_tokenizer())
    conversation = Conversation(model)
    options = {"max_tokens": 3, "kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    list(conversation.reply("w1 w2", dial=Dial("kvp", 0, 0), **options))
    with pytest.raises(InputError, match="kv_bits"):
        refine(conversation.context)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_random_steps_leave_the_oracles_caches(kind, seed):
    rng = random.Random(seed)
    model, oracle = KINDS[kind](tokenizer=chat_tokenizer(), base_config={"max_position_embeddings": 64})
    mirror = Mirror(model, oracle, rng.choice([None, "w50 w51"]))
    done = dict.fromkeys(("reply", "edit", "regenerate", "stop", "refine", "clear", "dropped", "predicted"), 0)
    for _ in range(50):
        step = rng.choice(["reply", "reply", "edit", "regenerate", "stop", "refine", "refine"])
        if step in ("edit", "regenerate") and not mirror.conversation.messages[1:]:
            continue
        text = " ".join(f"w{rng.randrange(90)}" for _ in range(rng.randrange(1, 14)))
        exact = {"exact_head": rng.choice([0, 0, 5]), "exact_tail": rng.choice([0, 0, 2])}
        options = {"dial": Dial(rng.choice(["kvp", "kvp", "full"]), **exact), "max_tokens": 4}
        conversation = mirror.conversation
        if step == "stop":
            mirror.stopped_while_reading(conversation.reply(text, progress=stop_reading, **options))
        elif step == "refine":
            mirror.refine(rng.choice([None, 1, 3, 5]))
        else:
            turn = getattr(conversation, step)(*[text][: step != "regenerate"], **options)
            last = mirror.take(turn, pieces=rng.choice([None, None, 1, 2]), **exact)
            done["dropped"] += conversation.dropped_turns
            done["predicted"] += last.predicted_tokens
        done[step] += 1
        if rng.random() < 0.02:
            conversation.clear()
            done["clear"] += 1
        mirror.check()
    assert all(count for name, count in done.items() if name != "clear"), done
