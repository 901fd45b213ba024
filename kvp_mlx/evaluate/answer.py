"""What an arm says: a generated text, or the log-likelihood of given ones."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..arms.arm import Arm, arm_prefill
from ..bundle.loading import KVPModel
from ..engine.prefill import predict_base_cache
from ..engine.prompt import check_context
from ..errors import InputError
from ..models.families import Cache
from ..models.sections import output_head, run_layers
from ..train.objectives import PredictedOnlyCache

Sampler = Callable[[mx.array], mx.array]
BATCH_TOKENS = 16_384
"""Entries per layer that the caches of one batch hold at most."""


@dataclass(frozen=True)
class Question:
    """A prompt to be answered by an arm, once per sampler (None: greedy)."""

    arm: Arm
    ids: list[int]
    samplers: tuple[Sampler | None, ...] = (None,)


@dataclass(frozen=True)
class Answer:
    """A generated text, cut before the first stop string, and when its first token came."""

    text: str
    tokens: list[int]
    ttft_ms: float


def generate(
    model: KVPModel, questions: Sequence[Question], *, stop: Sequence[str] = (), max_tokens: int
) -> list[list[Answer]]:
    """Let arms answer prompts: each reads alone, which is timed; then answers of one model are decoded side by side.

    Args:
        model: the bundle.
        questions: what is asked; all their caches are in memory together.
        stop: strings that end an answer.
        max_tokens: of an answer, at most; fewer where the context window ends before.

    Returns:
        For each question an answer per sampler.

    Raises:
        InputError: a prompt does not fit the context window.
    """
    for question in questions:
        check_context(model, len(question.ids), max_tokens)
    window = model.context_length or sys.maxsize
    rooms = [min(max_tokens, window - len(question.ids)) for question in questions]
    read = [timed_prefill(model, question.arm, question.ids) for question in questions]
    groups: dict[Any, list[int]] = {}
    for number, (question, (answering, cache, _)) in enumerate(zip(questions, read, strict=True)):
        is_uneven = len({layer.offset for layer in cache}) > 1  # LazyLLM's, which no batch takes
        key = number if is_uneven else "base" if answering is model.base else question.arm.name
        groups.setdefault(key, []).append(number)
    answers: list[list[Answer]] = [[] for _ in questions]
    for key, numbers in groups.items():
        decode = decode_alone if isinstance(key, int) else decode_together
        asked = [(number, sampler) for number in numbers for sampler in questions[number].samplers]
        replies = [
            Reply(questions[n].ids[-1], read[n][1], sampler, model.text_tokenizer, stop, rooms[n])
            for n, sampler in asked
        ]
        decode(read[numbers[0]][0], replies)
        for (number, _), reply in zip(asked, replies, strict=True):
            answers[number].append(Answer(before(reply.whole_text(), stop), reply.tokens, read[number][2]))
    return answers


class Reply:
    """An answer as it is decoded.

    Attributes:
        last: the prompt's last token.
        cache: holds the tokens before it; the answers to one question share it.
        max_tokens: how many are generated at most.
        tokens: those generated so far.
    """

    def __init__(
        self,
        last: int,
        cache: Cache,
        sampler: Sampler | None,
        tokenizer: TokenizerWrapper,
        stop: Sequence[str],
        max_tokens: int,
    ):
        self.last, self.cache, self.sampler, self.max_tokens = last, cache, sampler or greedy, max_tokens
        self.tokens: list[int] = []
        self._tokenizer, self._stop = tokenizer, stop
        self._detokenizer = tokenizer.detokenizer

    def whole_text(self) -> str:
        """Return what the tokens say, an end mark aside; the last thing to be called."""
        self._detokenizer.finalize()
        return str(self._detokenizer.text)

    def add(self, token: int) -> bool:
        """Add a token; returns whether the answer goes on."""
        self.tokens.append(token)
        if token in self._tokenizer.eos_token_ids:
            return False
        self._detokenizer.add_token(token)
        return not any(mark in self._detokenizer.text for mark in self._stop)


def greedy(logprobs: mx.array) -> mx.array:
    """Return the likeliest tokens (B,) of log-probabilities (B, vocabulary)."""
    return mx.argmax(logprobs, axis=-1)


def decode_together(answering: nn.Module, replies: Sequence[Reply]) -> None:
    """Decode replies side by side, as many as ``BATCH_TOKENS`` allows; caches are left as they are."""
    longest = max(reply.cache[0].offset + reply.max_tokens for reply in replies)
    size = max(1, min(len(replies), BATCH_TOKENS // longest))
    batch = BatchGenerator(answering, completion_batch_size=size, prefill_batch_size=size)
    numbers = batch.insert(
        [[reply.last] for reply in replies],
        [reply.max_tokens for reply in replies],
        caches=[reply.cache for reply in replies],
        samplers=[reply.sampler for reply in replies],
    )
    by_number = dict(zip(numbers, replies, strict=True))
    try:
        while responses := batch.next_generated():
            ended = [each.uid for each in responses if not by_number[each.uid].add(each.token)]
            batch.remove([number for number in ended if number not in finished(responses)])
    finally:
        batch.close()


def finished(responses: Sequence[Any]) -> set[int]:
    """Return the numbers of the replies that a batch has let go itself."""
    return {each.uid for each in responses if each.finish_reason is not None}


def decode_alone(answering: nn.Module, replies: Sequence[Reply]) -> None:
    """Decode replies one after another; caches are left as they are."""
    for reply in replies:
        cache = repeated(answering, reply.cache, 1)
        steps = generate_step(
            mx.array([reply.last]), answering, max_tokens=reply.max_tokens, prompt_cache=cache, sampler=reply.sampler
        )
        for token, _ in steps:
            if not reply.add(int(token)):
                break


def before(text: str, stop: Sequence[str]) -> str:
    """Return the part of a text before the first stop string."""
    return text[: min((place for mark in stop if (place := text.find(mark)) >= 0), default=len(text))]


def continuation_losses(
    model: KVPModel, arm: Arm, prompt: list[int], continuations: Sequence[list[int]]
) -> tuple[list[np.ndarray], float]:
    """Return the negative log-likelihoods of each continuation's tokens after a prompt, and the TTFT in ms.

    The arm reads the prompt, the answering model goes on from its last token: what decoding sees.

    Raises:
        InputError: see ``check_continuations``.
    """
    longest = check_continuations(model, prompt, continuations)
    answering, cache, ttft_ms = timed_prefill(model, arm, prompt)
    inputs = mx.array([[prompt[-1], *c[:-1], *[0] * (longest - len(c))] for c in continuations])  # (B, T), padded
    targets = mx.array([[*c, *[0] * (longest - len(c))] for c in continuations])
    hidden, _ = run_layers(answering, inputs, repeated(answering, cache, len(continuations)))
    logits = output_head(answering, hidden).astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]  # (B, T, vocab) -> (B, T)
    losses = np.array(mx.logsumexp(logits, axis=-1) - chosen)
    return [row[: len(c)] for row, c in zip(losses, continuations, strict=True)], ttft_ms


def check_continuations(model: KVPModel, prompt: list[int], continuations: Sequence[list[int]]) -> int:
    """Return the length of the longest continuation; its last token is scored but not read.

    Raises:
        InputError: it does not fit the context window after the prompt, or a text has no token.
    """
    if not prompt or not all(continuations):
        raise InputError("prompt and continuation need at least one token each.")
    longest = max(map(len, continuations))
    check_context(model, len(prompt) + longest - 1)
    return longest


def repeated(model: nn.Module, cache: Cache, batch: int) -> Cache:
    """Return a copy of a model's cache of one sequence for ``batch`` equal ones, so that all are read at once."""
    copies = make_prompt_cache(model)
    for copy, layer in zip(copies, cache, strict=True):
        if layer.offset:
            copy.update_and_fetch(*(mx.repeat(part, batch, axis=0) for part in layer.keys_and_values()))
    return copies


def timed_prefill(model: KVPModel, arm: Arm, prompt: list[int]) -> tuple[nn.Module, Cache, float]:
    """Return the answering model, its cache of all prompt tokens but the last, and the time to a first token in ms."""
    start = time.perf_counter()
    answering, cache = arm_prefill(model, arm, mx.array([prompt]))
    lengths = [layer.offset for layer in cache]
    mx.eval(mx.argmax(answering(mx.array([prompt[-1:]]), cache=cache), axis=-1))
    ttft_ms = 1e3 * (time.perf_counter() - start)
    cut_back(cache, lengths)
    return answering, cache, ttft_ms


def reply_log_probabilities(model: KVPModel, arm: Arm, prompt: list[int], reply: list[int]) -> tuple[np.ndarray, float]:
    """Return the log-probabilities (reply tokens, vocabulary) that an arm gives along a reply, and the TTFT in ms."""
    answering, cache, ttft_ms = timed_prefill(model, arm, prompt)
    hidden, _ = run_layers(answering, mx.array([[prompt[-1], *reply[:-1]]]), cache)
    logits = output_head(answering, hidden).astype(mx.float32)
    return np.array((logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0]), ttft_ms


def cut_back(cache: Cache, lengths: list[int]) -> None:
    """Trim each layer to its length in ``lengths`` (they may differ, see ``lazy_prefill``)."""
    for layer, length in zip(cache, lengths, strict=True):
        layer.trim(layer.offset - length)


def predicted_losses(model: KVPModel, prompt: list[int], continuation: list[int]) -> tuple[np.ndarray, bool]:
    """Return a continuation's negative log-likelihoods as the paper scores, and whether it is the greedy one.

    All keys and values are predicted: each position sees the predicted pairs up to its own and none that the base
    computed, the continuation's too.

    Raises:
        InputError: see ``check_continuations``.
    """
    check_continuations(model, prompt, [continuation])
    ids = mx.array([[*prompt, *continuation]])
    cache = predict_base_cache(replace(model, recompute=0.0), ids[:, :-1])
    hidden, _ = run_layers(model.base, ids[:, :-1], [PredictedOnlyCache(layer) for layer in cache])
    logits = output_head(model.base, hidden[:, len(prompt) - 1 :]).astype(mx.float32)
    targets = mx.array([continuation])
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    is_greedy = bool(mx.all(mx.argmax(logits, axis=-1) == targets))
    return np.array((mx.logsumexp(logits, axis=-1) - chosen)[0]), is_greedy
