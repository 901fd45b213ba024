"""A conversation's caches, rebuilt from its tokens by the NumPy oracle after every kind of turn."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from support.tiny import (
    CHAT_TEMPLATE,
    assert_cache_equal,
    chat_tokenizer,
    llama,
    openelm,
    paired,
    prefixed,
    pruned,
    small_llama,
    small_openelm,
)

from kvp_mlx.bundle.config import MeasuredDial
from kvp_mlx.engine.calibration import AUTO_MIN_PROMPT_TOKENS
from kvp_mlx.engine.conversation import Conversation
from kvp_mlx.engine.dial import Dial, dial_of
from kvp_mlx.engine.reply import Piece
from kvp_mlx.errors import InputError


def wide_llama():
    """Return a Llama whose heads are wide enough for mlx-lm's cache quantisation."""
    return llama(num_attention_heads=2, num_key_value_heads=1, head_dim=32)


HALF = ((0,), (0,), (1,), (1,))
KINDS = {
    "model": lambda **parts: paired(llama(), small_llama(), ((0,), (0,), (1,), (2,)), **parts),
    "pruned": lambda **parts: paired(llama(), pruned(llama(), [0, 2]), HALF, retained=[0, 2], **parts),
    "prefix": lambda **parts: prefixed(llama(), 1, **parts),
    "openelm model": lambda **parts: paired(openelm(), small_openelm(), ((0,), (0, 1), (1,), (2,)), **parts),
    "openelm prefix": lambda **parts: prefixed(openelm(), 2, **parts),
}
QUANTISABLE = {
    "model with wide heads": lambda **parts: paired(wide_llama(), small_llama(), ((0,), (0,), (1,), (2,)), **parts),
    "prefix with wide heads": lambda **parts: prefixed(wide_llama(), 1, **parts),
}


class Chat:
    """A conversation, and by which path each of its cached tokens was read."""

    def __init__(self, kind, *, template=CHAT_TEMPLATE, context=None, system=None):
        config = {"max_position_embeddings": context} if context else {}
        model, self.oracle = (KINDS | QUANTISABLE)[kind](tokenizer=chat_tokenizer(template), base_config=config)
        self.conversation = Conversation(model, system)
        self.paths = []

    def say(self, text, *, path="auto", exact_tail=0, pieces=None, max_tokens=4, **options):
        """Take one turn (its first ``pieces`` only) and return the last of them."""
        reply = self.conversation.reply(text, dial=Dial(path, 0, exact_tail), max_tokens=max_tokens, **options)
        turn = list(itertools.islice(reply, pieces))[-1]
        reply.close()
        tail = exact_tail if turn.path == "kvp" else 0
        self.paths = self.paths[: turn.cached_tokens]
        self.paths += [turn.path] * (turn.new_tokens - 1 - tail)
        self.paths += ["full"] * (len(self.conversation.context.tokens) - len(self.paths))
        return turn

    def rebuilt(self):
        """Return the oracle's caches, base and auxiliary, for the tokens so far."""
        oracle, tokens = self.oracle, self.conversation.context.tokens
        cache = auxiliary_cache = None
        start = 0
        assert len(self.paths) == len(tokens)
        for path, run in itertools.groupby(self.paths):
            stop = start + len(list(run))
            ids = np.array([tokens[start:stop]])
            if path == "kvp":
                cache, auxiliary_cache = oracle.prefill(ids, cache, auxiliary_cache)
            else:
                auxiliary_cache = oracle.auxiliary.forward(ids, auxiliary_cache).cache
                cache = oracle.base.forward(ids, cache).cache
            start = stop
        return cache, auxiliary_cache

    def check(self):
        """Compare both caches with the oracle's."""
        conversation, (cache, auxiliary_cache) = self.conversation, self.rebuilt()
        assert_cache_equal(conversation.context.cache, cache)
        read = conversation.context.auxiliary_cache[0].offset
        assert read <= len(conversation.context.tokens)
        if conversation.model.is_prefix:
            assert all(
                a is b for a, b in zip(conversation.context.auxiliary_cache, conversation.context.cache, strict=False)
            )
        elif read:
            assert_cache_equal(conversation.context.auxiliary_cache, [layer.first(read) for layer in auxiliary_cache])


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_turns_leave_the_caches_of_a_rebuilt_conversation(kind):
    chat = Chat(kind)
    for text in ("w1 w2 w3", "w4 w5", "w6 w7 w8 w9"):
        held = len(chat.conversation.context.tokens)
        turn = chat.say(text, path="kvp")
        assert (turn.path, turn.cached_tokens) == ("kvp", held)
        chat.check()
    assert chat.paths.count("kvp") > 12
    assert len(chat.conversation.messages) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_paths_can_be_mixed(kind):
    chat = Chat(kind, system="w20 w21")
    for path, tail in [("full", 0), ("kvp", 2), ("full", 0), ("auto", 0), ("kvp", 0), ("kvp", 1)]:
        turn = chat.say("w1 w2 w3", path=path, exact_tail=tail)
        assert turn.path == ("kvp" if path == "kvp" else "full")
        chat.check()


def test_the_auxiliary_catches_up_before_it_predicts():
    chat = Chat("model")
    auxiliary_cache = chat.conversation.context.auxiliary_cache
    chat.say("w1 w2 w3", path="full")
    assert [layer.offset for layer in auxiliary_cache] == [0, 0, 0]
    turn = chat.say("w4 w5", path="kvp")
    assert [layer.offset for layer in auxiliary_cache] == [turn.cached_tokens + turn.new_tokens - 1] * 3
    chat.check()


@pytest.mark.parametrize("kind", ["model", "prefix"])
def test_tokens_are_the_rendered_messages(kind):
    chat = Chat(kind, system="w20")
    for text in ("w1 w2", "w3"):
        chat.say(text, path="kvp")
    tokens, messages = chat.conversation.context.tokens, chat.conversation.messages
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2]
    rendered = chat.conversation.model.tokenizer.apply_chat_template(messages)
    assert tokens == rendered[: len(tokens)]
    assert len(rendered) - len(tokens) <= 1  # the end mark, where the token limit cut the reply


@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_that_was_stopped_stays_and_the_next_turn_goes_on(kind):
    chat = Chat(kind)
    turn = chat.say("w1 w2 w3", path="kvp", pieces=2, max_tokens=20)
    assert len(chat.conversation.context.tokens) == turn.new_tokens + 2
    assert chat.conversation.messages[-1]["role"] == "assistant"
    assert chat.conversation.messages[-1]["content"].endswith(turn.text)
    chat.check()
    held = len(chat.conversation.context.tokens)
    assert chat.say("w4 w5", path="kvp").cached_tokens == held
    chat.check()


def test_only_new_tokens_decide_whether_a_turn_is_predicted():
    chat = Chat("prefix")
    long = " ".join(["w1"] * AUTO_MIN_PROMPT_TOKENS)
    paths = [chat.say(text, path="auto").path for text in (long, "w2", long)]
    assert paths == ["kvp", "full", "kvp"]
    chat.check()


def test_a_reply_that_is_rendered_differently_is_read_anew():
    loud = CHAT_TEMPLATE.replace("m.content", "(m.content | upper if m.role == 'assistant' else m.content)")
    for kind in ("model", "prefix"):
        chat = Chat(kind, template=loud)
        prompt = chat.say("w1 w2 w3", path="kvp").new_tokens
        assert chat.say("w4 w5", path="kvp").cached_tokens == prompt
        chat.check()


@pytest.mark.parametrize("kind", ["model", "prefix"])
def test_a_message_that_overflows_the_context_is_not_taken(kind):
    chat = Chat(kind, context=24)
    chat.say("w1 w2", path="kvp", max_tokens=2)
    before = [list(chat.conversation.messages), list(chat.conversation.context.tokens)]
    with pytest.raises(InputError, match="context window 24"):
        chat.say(" ".join(["w3"] * 24), path="kvp")
    assert [chat.conversation.messages, chat.conversation.context.tokens] == before
    chat.check()
    assert chat.say("w4", path="kvp").cached_tokens == len(before[1])
    chat.check()


def test_replies_end_with_the_context_window():
    chat = Chat("prefix", context=12)
    chat.conversation.model.tokenizer._eos_token_ids.clear()
    chat.say("w1 w2", max_tokens=50)
    assert len(chat.conversation.context.tokens) == 12


# Block calls of the second turn. model: 3 to catch up, 3 to predict, then the base's 4; prefix: 2 to predict, then 4.
INTERRUPTS = [("model", call) for call in range(1, 11)] + [("prefix", call) for call in range(1, 7)]


@pytest.mark.parametrize(("kind", "call"), INTERRUPTS)
def test_an_interrupt_between_layers_leaves_a_conversation_that_goes_on(kind, call, monkeypatch):
    chat = Chat(kind)
    chat.say("w1 w2 w3", path="full")
    held = len(chat.conversation.context.tokens)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_block(patch, chat.conversation.model.base, call)
        chat.say("w4 w5", path="kvp")
    kept = len(chat.conversation.context.tokens)
    assert kept >= held
    assert {layer.offset for layer in chat.conversation.context.cache} == {kept}
    chat.paths += ["kvp"] * (kept - held)
    assert chat.say("w6 w7", path="kvp").cached_tokens >= held
    chat.check()


def interrupt_block(patch, model, call):
    """Let the given call, counted from 1, of any transformer block raise a KeyboardInterrupt."""
    block, calls = type(model.layers[0]), itertools.count(1)
    run = block.__call__

    def counting(*args, **options):
        if next(calls) == call:
            raise KeyboardInterrupt
        return run(*args, **options)

    patch.setattr(block, "__call__", counting)


@pytest.mark.parametrize("kind", QUANTISABLE)
def test_a_cache_that_mlx_lm_quantised_is_carried_on(kind):
    chat = Chat(kind)
    for text in ("w1 w2 w3", "w4 w5", "w6 w7"):
        chat.say(text, path="kvp", kv_bits=8, kv_group_size=32, quantized_kv_start=0)
        for layer, expected in zip(chat.conversation.context.cache, chat.rebuilt()[0], strict=True):
            keys, values = (mx.dequantize(*x, group_size=32, bits=8) for x in layer.keys_and_values())
            np.testing.assert_allclose(keys, expected.keys, atol=0.3)
            np.testing.assert_allclose(values, expected.values, atol=0.3)


def test_a_quantised_cache_is_not_read_on_top_of():
    chat = Chat(next(iter(QUANTISABLE)))
    chat.say("w1 w2 w3", path="kvp", kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    with pytest.raises(InputError, match="kv_bits"):
        chat.say("w4 w5", path="kvp", exact_tail=2)


def test_a_chat_needs_a_tokeniser_with_a_chat_template():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    for mute, reason in [(None, "no tokeniser"), (tokenizer, "no chat template")]:
        model, _ = KINDS["prefix"](tokenizer=mute)
        with pytest.raises(InputError, match=reason):
            Conversation(model)


def test_a_quality_is_what_the_bundle_measured_for_the_whole_prompt():
    chat = Chat("prefix")
    config = chat.conversation.model.config
    measured = (
        MeasuredDial(quality="balanced", from_tokens=0, path="full"),
        MeasuredDial(quality="balanced", from_tokens=150, exact_head=0, exact_tail=3),
    )
    chat.conversation.model.config = config.model_copy(update={"dials": measured})

    def say(words: int) -> Piece:
        return list(chat.conversation.reply("w1 " * words, dial=dial_of("balanced"), max_tokens=1))[-1]

    first, second = say(120), say(100)
    assert (first.prompt_tokens < 150, first.path) == (True, "full")  # its constants would predict
    assert (second.prompt_tokens >= 150, second.path, second.exact_tail) == (True, "kvp", 3)
    assert second.cached_tokens > 100  # what the turn before read is read once


def test_a_full_window_is_emptied_to_three_quarters():
    chat, room = Chat("prefix", context=120), 4
    chat.conversation.model.text_tokenizer._eos_token_ids.clear()
    filled = []
    for number in range(12):
        turn = chat.say(f"w{number} w{number + 1} w{number + 2}", path="full", max_tokens=room)
        filled.append((turn.prompt_tokens + room, chat.conversation.dropped_turns > 0))
    turn_tokens = filled[1][0] - filled[0][0]
    (after,) = (tokens for tokens, dropped in filled if dropped)
    assert 90 - turn_tokens < after <= 90  # and no more turns left than that takes
    assert max(tokens for tokens, _ in filled) > 120 - turn_tokens


@pytest.mark.parametrize("more", [0, 1])
def test_what_just_fits_the_window_drops_nothing(more):
    chat = Chat("prefix", context=200)
    chat.conversation.model.text_tokenizer._eos_token_ids.clear()
    chat.say("w1 w2", path="full")
    probe = Chat("prefix", context=200)
    probe.conversation.model.text_tokenizer._eos_token_ids.clear()
    probe.say("w1 w2", path="full")
    one = probe.say("w3", path="full").prompt_tokens
    chat.say(" ".join(["w3"] * (1 + 200 - 4 - one + more)), path="full")
    assert chat.conversation.dropped_turns == more
