"""Answers of arms to prompts: each arm reads alone, on the clock, then answers are decoded side by side."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache

from ..arms.arm import Arm
from ..arms.clock import first_token
from ..bundle.loading import KVPModel
from ..engine.clock import Chooser, FirstToken
from ..engine.decode import BATCH_TOKENS, Answer, decode_alone, decode_refining, decode_together
from ..engine.prompt import check_window


@dataclass(frozen=True)
class Question:
    """A prompt to be answered by an arm, once per sampler (None: greedy)."""

    arm: Arm
    ids: list[int]
    samplers: tuple[Chooser | None, ...] = (None,)


@dataclass(frozen=True)
class Generated:
    """A generated text, cut before the first stop string, and when its first token came."""

    text: str
    tokens: list[int]
    ttft_ms: float


def generate(
    model: KVPModel,
    questions: Sequence[Question],
    *,
    stop: Sequence[str] = (),
    max_tokens: int,
) -> Iterator[list[Generated]]:
    """Let arms answer prompts: each reads alone, which is timed; then answers of one model are decoded side by side.

    Args:
        model: the bundle.
        questions: what is asked; as many are read before they are answered as ``BATCH_TOKENS`` allows.
        stop: strings that end an answer; empty ones are left out.
        max_tokens: of an answer, at most; fewer where the context window ends before.

    Returns:
        For each question an answer per sampler, as soon as they are there.

    Raises:
        InputError: a prompt does not fit the context window.
    """
    for question in questions:
        check_window(model, len(question.ids), max_tokens)
    return (found for group in _groups(questions) for found in _answered(model, group, stop, max_tokens))


def _groups(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """Yield questions together whose prompts have no more than ``BATCH_TOKENS`` tokens, or one that has."""
    group: list[Question] = []
    for question in questions:
        if sum(len(each.ids) for each in [*group, question]) > BATCH_TOKENS and group:
            yield group
            group = []
        group.append(question)
    if group:
        yield group


def _answered(
    model: KVPModel, questions: Sequence[Question], stop: Sequence[str], max_tokens: int
) -> list[list[Generated]]:
    window, stop = model.context_length or sys.maxsize, [text for text in stop if text]
    read = [read_prompt(model, question.arm, question.ids) for question in questions]
    answers = [
        [
            Answer(
                question.ids[-1],
                first.cache,
                sampler,
                model.text_tokenizer,
                stop,
                min(max_tokens, window - len(question.ids)),
            )
            for sampler in question.samplers
        ]
        for question, first in zip(questions, read, strict=True)
    ]
    for numbers in batches(model, questions, read):
        going_on = []
        for number in numbers:
            arm, ids = questions[number].arm, questions[number].ids
            refine_tokens = arm.refine_tokens(model, len(ids))
            going_on += [one for one in answers[number] if decode_refining(model, one, ids, refine_tokens)]
        if going_on:
            decode = decode_alone if is_uneven(read[numbers[0]]) else decode_together
            decode(read[numbers[0]].network, going_on)
    return [
        [Generated(answer.text(), answer.tokens, first.ttft_ms) for answer in of_question]
        for of_question, first in zip(answers, read, strict=True)
    ]


def batches(model: KVPModel, questions: Sequence[Question], read: Sequence[FirstToken]) -> list[list[int]]:
    """Return the numbers of the questions that can be decoded side by side: by one model, on even caches."""
    groups: dict[Any, list[int]] = {}
    for number, (question, first) in enumerate(zip(questions, read, strict=True)):
        key = number if is_uneven(first) else "base" if first.network is model.base else question.arm.name
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def is_uneven(first: FirstToken) -> bool:
    """Return whether layers hold different numbers of tokens (LazyLLM's do), which no batch takes."""
    return len({layer.offset for layer in first.cache if hasattr(layer, "offset")}) > 1


def read_prompt(model: KVPModel, arm: Arm, ids: list[int]) -> FirstToken:
    """Take an arm's first token, on the clock, and leave its cache with all prompt tokens but the last."""
    first = first_token(model, arm, mx.array([ids]))
    if not can_trim_prompt_cache(first.cache):  # a state or a full window: read once more, off the clock
        return replace(first, cache=arm.read(model, mx.array([ids]))[1])
    for layer in first.cache:
        layer.trim(1)
    return first
