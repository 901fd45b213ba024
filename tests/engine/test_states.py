"""Conversations on models whose caches cannot be trimmed, or hold latents: edits, refinement, saved caches."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache
from support.architectures import bundle, tiny_model
from support.tiny import VOCABULARY, chat_tokenizer

from kvp_mlx.engine.context import KEPT_SNAPSHOTS, Context
from kvp_mlx.engine.conversation import Conversation
from kvp_mlx.engine.dial import Dial
from kvp_mlx.engine.pace import Pace
from kvp_mlx.engine.refining import refine, refining
from kvp_mlx.engine.saved_caches import load_cache, save_cache
from kvp_mlx.errors import BundleError

FULL, KVP = Dial("full", 0, 0), Dial("kvp", 4, 3)
STATES = ["qwen3_5", "qwen3_next", "gpt_oss", "gemma3_text", "lfm2"]
NAMES = [*STATES, "deepseek_v3"]
IDS = np.random.default_rng(2).integers(5, VOCABULARY, 90).tolist()


def model_of(name):
    base = tiny_model(name, vocab_size=VOCABULARY)
    return bundle(base.get("language_model", base), 1, chat_tokenizer())


def assert_holds(context, ids):
    """The context's next logits are those of the base after these ids, within what its own chunks differ by."""
    assert context.tokens == ids
    base = context.model.base
    expected, other = (logits_after(base, ids, step_size) for step_size in (len(ids), 1))
    found = base(mx.array([[7, 8, 9]]), cache=context.copy(len(ids)).cache)
    np.testing.assert_allclose(found, expected, atol=1e-4 + np.abs(other - expected).max())


def logits_after(base, ids, step_size):
    own = make_prompt_cache(base)
    for start in range(0, len(ids), step_size):
        base(mx.array([ids[start : start + step_size]]), cache=own)
    return np.array(base(mx.array([[7, 8, 9]]), cache=own))


@pytest.mark.parametrize("name", NAMES)
def test_keeping_less_goes_back_to_the_last_snapshot(name):
    context = Context(model_of(name))
    for end in (20, 41, 55):
        context.read(IDS[: end + 1], FULL)
        context.remember()
    kept = context.keep(50)
    assert kept == (41 if name in STATES else 50)
    assert_holds(context, IDS[:kept])
    context.read([*IDS[:kept], *IDS[:9]], FULL)
    assert_holds(context, [*IDS[:kept], *IDS[:8]])
    assert context.keep(19) == (0 if name in STATES else 19)


@pytest.mark.parametrize("name", STATES)
def test_a_copy_goes_back_by_itself(name):
    context = Context(model_of(name))
    for end in (30, 50):
        context.read(IDS[: end + 1], FULL)
        context.remember()
    assert_holds(context.copy(42), IDS[:30])
    assert_holds(context, IDS[:50])
    assert context.copy(29).tokens == []


@pytest.mark.parametrize("name", ["qwen3_5", "gpt_oss"])
def test_only_the_last_snapshots_are_kept(name):
    context = Context(model_of(name))
    for end in range(20, 80, 8):
        context.read(IDS[: end + 1], FULL)
        context.remember()
    one = Context(context.model)
    one.read(IDS[:77], FULL)
    assert len(context._snapshots) == KEPT_SNAPSHOTS
    assert context.nbytes < (KEPT_SNAPSHOTS + 2) * one.nbytes


@pytest.mark.parametrize("stop_after", [1, 3, 7])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dial", [FULL, KVP], ids=["full", "kvp"])
def test_a_reading_that_is_closed_between_layers_leaves_what_was_held(name, dial, stop_after):
    context = Context(model_of(name))
    context.read(IDS[:21], FULL)
    steps = context.reading(IDS, dial, pace=Pace(0.0), step_size=16)
    for _ in range(stop_after):
        next(steps)
    steps.close()
    held = len(context.tokens)
    assert held == 20 or name not in STATES
    assert_holds(context, IDS[:held])


@pytest.mark.parametrize("name", NAMES)
def test_edits_and_other_answers_do_not_read_from_the_start(name):
    chat = Conversation(model_of(name))
    for message in ("one two three", "four five"):
        *_, last = chat.reply(message, dial=FULL, max_tokens=5)
    held = last.cached_tokens
    assert held > 0
    for turn in (chat.regenerate, lambda **how: chat.edit("five six seven", **how), chat.regenerate):
        first_messages = len(chat.messages)
        *_, last = turn(dial=FULL, max_tokens=5)
        assert len(chat.messages) == first_messages
        assert held <= last.cached_tokens < last.prompt_tokens
        assert_holds(chat.context, chat.context.tokens)
    assert last.cached_tokens == last.prompt_tokens - 1  # another answer reads one token


@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("name", NAMES)
def test_refinement_ends_in_what_full_prefill_gives_and_keeps_turns(name, chunk):
    context = Context(model_of(name))
    for end in (30, 60):
        context.remember()
        context.read(IDS[: end + 1], KVP)
        context.remember()
    assert context.exact_tokens < 60
    refine(context, chunk_tokens=chunk)
    assert context.exact_tokens == 60
    assert_holds(context, IDS[:60])
    kept = context.keep(40)
    assert (kept, context.exact_tokens) == ((30, 30) if name in STATES else (40, 40))
    assert_holds(context, IDS[:kept])


@pytest.mark.parametrize("steps", [1, 9, 20])
@pytest.mark.parametrize("name", STATES)
def test_refinement_that_is_closed_goes_on_where_it_was_and_follows_the_next_turn(name, steps):
    context = Context(model_of(name))
    context.read(IDS[:51], KVP)
    work = refining(context, chunk_tokens=8)
    for _ in range(steps):
        next(work, None)
    work.close()
    predicted = [np.array(array) for array in arrays_of(context)]
    context.read(IDS[:71], KVP)
    refine(context)
    assert_holds(context, IDS[:70])
    again = Context(context.model)
    again.read(IDS[:51], KVP)
    for mine, other in zip(predicted, arrays_of(again), strict=True):
        np.testing.assert_allclose(mine, np.array(other), atol=1e-5)


def arrays_of(context):
    return [array for layer in context.cache for _, array in tree_flatten(layer.state) if isinstance(array, mx.array)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("KVP_CACHE_DIR", str(tmp_path / "caches"))
    return tmp_path / "caches" / "prompts" / "mine"


@pytest.mark.parametrize("dial", [FULL, KVP], ids=["full", "kvp"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_caches_are_taken_up_again(name, dial, place):
    model = model_of(name)
    context = Context(model)
    context.read(IDS[:41], dial)
    save_cache(context, "mine", "conversation")
    _, loaded = load_cache(model, "mine")
    for mine, other in zip(arrays_of(context), arrays_of(loaded), strict=True):
        room = slice(None, other.shape[2]) if mine.ndim == 4 and mine.shape != other.shape else slice(None)
        np.testing.assert_array_equal(mine[:, :, room] if mine.ndim == 4 else mine, other)
    for each in (context, loaded):
        each.read(IDS[:60], FULL)
    np.testing.assert_array_equal(
        model.base(mx.array([[7]]), cache=context.cache), model.base(mx.array([[7]]), cache=loaded.cache)
    )
    assert loaded.exact_tokens == context.exact_tokens
    assert len(load_prompt_cache(str(place / "cache.safetensors"))) == len(context.cache)


@pytest.mark.parametrize("name", ["qwen3_next", "gpt_oss", "deepseek_v3"])
def test_a_saved_cache_that_lacks_tokens_is_damaged(name, place):
    context = Context(model_of(name))
    context.read(IDS[:41], FULL)
    context.cache[-1].trim(2)
    save_cache(context, "mine", "conversation")
    with pytest.raises(BundleError, match="damaged"):
        load_cache(context.model, "mine")
