"""Answers that arms give and texts that they score: as mlx-lm's own decoding and numpy have them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from support.directories import TEXT
from support.losses import log_softmax
from support.tiny import chat_tokenizer, itself, llama, paired, prefixed, small_llama, token_ids

import kvp_mlx
from kvp_mlx.arms.arm import Arm
from kvp_mlx.arms.kinds import parse_arm, parse_arms, with_dial
from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.engine import decode
from kvp_mlx.engine.clock import FirstToken
from kvp_mlx.engine.context import Context
from kvp_mlx.engine.dial import Dial
from kvp_mlx.engine.reply import reply
from kvp_mlx.errors import InputError
from kvp_mlx.evaluate import answer
from kvp_mlx.evaluate.answer import Question, generate
from kvp_mlx.evaluate.likelihood import Scoring, all_predicted, continuation_losses, predicted_losses, split_choices
from kvp_mlx.evaluate.rows import run_items
from kvp_mlx.evaluate.summary import summarise
from kvp_mlx.evaluate.task import Item
from kvp_mlx.evaluate.tasks import chat_agreement, humaneval, mcq
from kvp_mlx.train.deviation import with_estimator


def mlx_lms_tokens(model: Any, answering: Any, cache: Any, last: list[int], count: int) -> list[int]:
    steps = generate_step(mx.array(last), answering, max_tokens=count, prompt_cache=cache)
    tokens = []
    for token, _ in steps:
        tokens.append(int(token))
        if token in model.text_tokenizer.eos_token_ids:
            break
    return tokens


def test_generated_side_by_side_is_what_mlx_lm_generates_alone(fitted: Path) -> None:
    model = kvp_mlx.load(str(fitted))
    encoded = [model.text_tokenizer.encode(TEXT[start : start + 60 + 9 * start]) for start in range(4)]
    arms = [parse_arm(name) for name in ("full", "kvp-4", "auxiliary", "lazy-0.5-0.25")]
    questions = [Question(arm, ids) for ids in encoded for arm in arms]
    answers = list(generate(model, questions, max_tokens=8))
    for question, (found,) in zip(questions, answers, strict=True):
        answering, cache = question.arm.read(model, mx.array([question.ids]))
        expected = mlx_lms_tokens(model, answering, cache, question.ids[-1:], 8)
        assert found.tokens == expected
        assert found.text == model.text_tokenizer.decode(expected)
        assert found.ttft_ms > 0
    text = answers[0][0].text
    mark = text[len(text) // 2 :][:2]
    stopped = list(generate(model, questions, stop=[mark], max_tokens=8))
    lengths = []
    for (whole,), (cut,) in zip(answers, stopped, strict=True):
        assert cut.text == whole.text.split(mark)[0]
        assert cut.tokens == whole.tokens[: len(cut.tokens)]
        lengths.append((len(cut.tokens), len(whole.tokens)))
    assert lengths[0][0] < lengths[0][1]  # stopped, not cut afterwards
    assert any(cut == whole for cut, whole in lengths)  # while others of its batch went on
    with pytest.raises(InputError, match="context window"):
        generate(model, [Question(arms[0], encoded[0] * 40)], max_tokens=8)


@pytest.mark.parametrize("max_tokens", [1, 2, 24])
def test_arms_that_refine_answer_as_the_engine_does(fitted: Path, max_tokens: int) -> None:
    model = kvp_mlx.load(str(fitted))
    model.text_tokenizer._eos_token_ids.clear()
    encoded = [model.text_tokenizer.encode(TEXT[start : start + 90 + 9 * start]) for start in range(3)]
    questions = [Question(parse_arm(name), ids) for name in ("kvp-4-0+7", "kvp-4-0", "full") for ids in encoded]
    dials = [Dial("kvp", 0, 4, 0.0, refine_tokens=7)] * 3 + [Dial("kvp", 0, 4, 0.0)] * 3 + [Dial("full", 0, 0)] * 3
    answers = [found.tokens for (found,) in generate(model, questions, max_tokens=max_tokens)]
    for question, dial, tokens in zip(questions, dials, answers, strict=True):
        expected = reply(Context(model), question.ids, dial, max_tokens=max_tokens)
        assert tokens == [piece.token for piece in expected]
    assert max_tokens < 24 or answers[:3] != answers[3:6]


def test_no_more_prompts_are_read_than_memory_is_set_aside_for(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read, read_prompt = kvp_mlx.load(str(fitted)), [], answer.read_prompt
    questions = [Question(parse_arm("full"), list(range(3, 3 + tokens))) for tokens in (12, 8, 25, 1)]
    whole = list(generate(model, questions, max_tokens=4))

    def noted(model: KVPModel, arm: Arm, ids: list[int]) -> FirstToken:
        read.append(len(ids))
        return read_prompt(model, arm, ids)

    monkeypatch.setattr(answer, "read_prompt", noted)
    monkeypatch.setattr(answer, "BATCH_TOKENS", 20)
    answers, known = generate(model, questions, max_tokens=4), []
    for (found,), (expected,) in zip(answers, whole, strict=True):
        known.append(list(read))
        assert found.tokens == expected.tokens
    assert known == [[12, 8], [12, 8], [12, 8, 25], [12, 8, 25, 1]]


def test_answers_end_where_the_window_does() -> None:
    config = {"max_position_embeddings": 24}
    model, _ = prefixed(llama(), 1, tokenizer=chat_tokenizer(), base_config=config)
    questions = [Question(parse_arm(arm), list(range(3, 23))) for arm in ("full", "kvp", "lazy-0.5-0.25")]
    assert [len(found.tokens) for (found,) in generate(model, questions, max_tokens=8)] == [4, 4, 4]
    continuation_losses(model, parse_arm("full"), list(range(3, 23)), [[3, 4, 5, 6]])
    with pytest.raises(InputError, match="context window"):
        continuation_losses(model, parse_arm("full"), list(range(3, 23)), [[3, 4, 5, 6, 7]])


def test_samples_are_drawn_alike_in_any_batch(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kvp_mlx.load(str(fitted))
    ids = model.text_tokenizer.encode(TEXT[:80])

    def drawn(numbers: list[int]) -> list[list[int]]:
        samplers = tuple(humaneval.seeded_sampler(0.9, number) for number in numbers)
        (answers,) = generate(model, [Question(parse_arm("kvp"), ids, samplers)], max_tokens=8)
        return [each.tokens for each in answers]

    monkeypatch.setattr(decode, "BATCH_TOKENS", 2 * (len(ids) + 8))  # two at a time, the others wait
    together = drawn([1, 2, 3])
    assert [drawn([number])[0] for number in (1, 2, 3)] == together
    assert len(set(map(tuple, together))) > 1


def with_share(model: KVPModel, share: float) -> KVPModel:
    """Return the bundle with an estimator and a share to recompute of its own."""
    model = with_estimator(model)
    assert model.config.recompute is not None
    recompute = model.config.recompute.model_copy(update={"share": share})
    return replace(model, config=model.config.model_copy(update={"recompute": recompute}))


@pytest.mark.parametrize("kind", ["prefix", "model"])
def test_continuations_are_scored_as_numpy_does(kind: str) -> None:
    made = {
        "prefix": lambda: prefixed(llama(), 1),
        "model": lambda: paired(llama(), small_llama(), [(0,), (0,), (1,), (2,)]),
    }
    model, oracle = made[kind]()
    ids = token_ids(30)[0].tolist()
    prompt, continuations = ids[:20], [ids[20:23], ids[23:30], ids[20:21]]
    head, _ = oracle.prefill(np.array([prompt[:-1]]))
    for arm, cache in (("full", None), ("kvp", head), ("lazy-0.5-0.25", None)):
        losses, _ = continuation_losses(model, parse_arm(arm), prompt, continuations)
        again, _ = continuation_losses(model, parse_arm(arm), prompt, continuations[::-1])
        for loss, same in zip(losses, again[::-1], strict=True):
            np.testing.assert_allclose(loss, same, atol=1e-5)  # none leaves a trace in the cache
        if arm.startswith("lazy"):
            continue
        for loss, rest in zip(losses, continuations, strict=True):
            whole = oracle.base.forward(np.array([(prompt if cache is None else prompt[-1:]) + rest]), cache).logits
            rows = log_softmax(whole)[0, -len(rest) - 1 : -1]
            np.testing.assert_allclose(loss, -rows[np.arange(len(rest)), rest], atol=1e-4)
    rest = continuations[1]
    everything, _ = oracle.prefill(np.array([prompt + rest]))
    rows = log_softmax(oracle.base.forward(np.array([prompt + rest]), only=everything).logits)[0, 19:-1]
    losses, is_greedy = predicted_losses(model, prompt, rest)
    np.testing.assert_allclose(losses, -rows[np.arange(len(rest)), rest], atol=1e-4)
    assert not is_greedy
    assert predicted_losses(model, prompt, [int(rows[0].argmax())])[1]
    repaired = with_share(model, 0.5)
    np.testing.assert_array_equal(predicted_losses(repaired, prompt, rest)[0], losses)
    with pytest.raises(InputError, match="at least one token"):
        predicted_losses(model, [], rest)


def test_the_papers_scoring_predicts_everything() -> None:
    model = with_share(prefixed(llama(), 1)[0], 0.5)
    dial = all_predicted(parse_arms("full,kvp,kvp-0-0"))
    assert dial.share(model.config) == 0
    full, kvp = (with_dial(parse_arm(name), dial) for name in ("full", "kvp"))
    assert (full, kvp.name, kvp.numbers) == (parse_arm("full"), "kvp", parse_arm("kvp-0-0").numbers)
    assert kvp.work(model, 50) == parse_arm("kvp-0-0").work(model, 50) != parse_arm("kvp").work(model, 50)
    for arm in ("kvp-4", "kvp-0-0.5"):
        with pytest.raises(InputError, match=arm):
            all_predicted(parse_arms(f"full,{arm}"))


def test_the_likeliest_choice_wins() -> None:
    model = itself(llama())
    model.tokenizer = chat_tokenizer()
    item = Item("1", "w1 w2 w3", [" w4 w5", " w6", " w7 w8 w9"], {"gold": 1})
    prompt, choices = split_choices(model, item.prompt, item.answers)
    assert [len(choice) for choice in choices] == [2, 1, 3]
    sums = [-continuation_losses(model, parse_arm("full"), prompt, [choice])[0][0].sum() for choice in choices]
    for scoring in Scoring:
        (row,) = mcq.measure_choice(scoring)(model, [(parse_arm("kvp"), item)])
        assert row["likelihoods"] == pytest.approx(sums, abs=1e-3)
        assert row["score"] == float(np.argmax(sums) == 1)


def test_chat_compares_along_the_full_models_reply() -> None:
    model, _ = prefixed(llama(), 1, tokenizer=chat_tokenizer())
    items = [Item(str(i), f"w{i} w{i + 9} w{i + 20}") for i in range(4)]
    arms = [parse_arm("full"), parse_arm("kvp")]
    rows = run_items(model, arms, items, chat_agreement.measure, recipe={})
    result = summarise("chat", model, arms, rows)["arms"]
    assert result["full"]["score"] == result["full"]["metrics"]["first_token"] == 1
    assert result["kvp"]["metrics"]["kl_per_token"] > 0.01
    assert result["kvp"]["score"] < 1
