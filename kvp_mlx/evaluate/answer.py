"""What an arm says: a generated text, or the log-likelihood of given ones."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import make_prompt_cache

from ..arms import Arm, arm_prefill
from ..bundle import KVPModel
from ..errors import InputError
from ..families import Cache, output_head, run_layers
from ..first_token import stream_first_token_early
from ..pipeline import check_context, default_step_size, predict_base_cache
from ..train.objectives import PredictedOnlyCache

Sampler = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Answer:
    """A generated text, cut before the first stop string, and when its first token came."""

    text: str
    tokens: list[int]
    ttft_ms: float


def generate(
    model: KVPModel,
    arm: Arm,
    ids: list[int],
    *,
    stop: Sequence[str] = (),
    max_tokens: int,
    sampler: Sampler | None = None,
) -> Answer:
    """Let an arm answer a prompt (greedy without a ``sampler``).

    Raises:
        InputError: the prompt does not fit the context window.
    """
    check_context(model, len(ids), max_tokens)
    start, ttft_ms, text, tokens = time.perf_counter(), 0.0, "", []
    answering, cache = arm_prefill(model, arm, mx.array([ids]))
    options: dict[str, Any] = {} if sampler is None else {"sampler": sampler}
    is_cpu = mx.default_device().type == mx.DeviceType.cpu
    stream = stream_first_token_early if is_cpu else stream_generate  # as ``pipeline.decode`` does
    pieces = stream(
        answering,
        model.text_tokenizer,
        mx.array(ids[-1:]),
        max_tokens=max_tokens,
        prompt_cache=cache,
        prefill_step_size=default_step_size(),
        **options,
    )
    for piece in pieces:
        ttft_ms = ttft_ms or 1e3 * (time.perf_counter() - start)
        text += piece.text
        tokens.append(piece.token)
        if any(mark in text for mark in stop):
            break
    return Answer(before(text, stop), tokens, ttft_ms)


def before(text: str, stop: Sequence[str]) -> str:
    """Return the part of a text before the first stop string."""
    return text[: min((place for mark in stop if (place := text.find(mark)) >= 0), default=len(text))]


def continuation_losses(
    model: KVPModel, arm: Arm, prompt: list[int], continuations: Sequence[list[int]]
) -> tuple[list[np.ndarray], float]:
    """Return the negative log-likelihoods of each continuation's tokens after a prompt, and the TTFT in ms.

    The arm reads the prompt, the answering model goes on from its last token: what decoding sees.

    Raises:
        InputError: the longest does not fit the context window, or there is no prompt.
    """
    if not prompt or not all(continuations):
        raise InputError("prompt and continuation need at least one token each.")
    check_context(model, len(prompt) + max(map(len, continuations)))
    answering, cache, ttft_ms = timed_prefill(model, arm, prompt)
    longest = max(map(len, continuations))
    inputs = mx.array([[prompt[-1], *c[:-1], *[0] * (longest - len(c))] for c in continuations])  # (B, T), padded
    targets = mx.array([[*c, *[0] * (longest - len(c))] for c in continuations])
    hidden, _ = run_layers(answering, inputs, repeated(answering, cache, len(continuations)))
    logits = output_head(answering, hidden).astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]  # (B, T, vocab) -> (B, T)
    losses = np.array(mx.logsumexp(logits, axis=-1) - chosen)
    return [row[: len(c)] for row, c in zip(losses, continuations, strict=True)], ttft_ms


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


def predicted_losses(model: KVPModel, prompt: list[int], continuation: list[int]) -> np.ndarray:
    """Return a continuation's negative log-likelihoods as the paper scores: all keys and values are predicted.

    Each position sees the predicted pairs up to its own and none that the base computed, the continuation's too.
    """
    ids = mx.array([[*prompt, *continuation]])
    cache = predict_base_cache(model, ids[:, :-1])
    hidden, _ = run_layers(model.base, ids[:, :-1], [PredictedOnlyCache(layer) for layer in cache])
    logits = output_head(model.base, hidden[:, len(prompt) - 1 :]).astype(mx.float32)
    chosen = mx.take_along_axis(logits, mx.array([continuation])[..., None], axis=-1)[..., 0]
    return np.array((mx.logsumexp(logits, axis=-1) - chosen)[0])
