"""Time to first token, taken in one place: from token ids in hand to the first token's value on the host."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream

from ..models.families import Cache
from .prefill import PrefillTimes

Chooser = Callable[[mx.array], mx.array]
"""From logits ``(B, vocab)`` to logits ``(B, vocab)`` as processed, or from log-probabilities to tokens ``(B,)``."""


@dataclass
class FirstToken:
    """A prompt that was read, up to its first token.

    Attributes:
        tokens: of each sequence, on the host.
        network: the mlx-lm model that decodes.
        cache: its cache, which holds the whole prompt.
        times: what reading the prompt took, part by part.
        ttft_ms: from the token ids to ``tokens``.
        first_step_ms: of that, the last prompt token and sampling.
    """

    tokens: list[int]
    network: nn.Module
    cache: Cache
    times: PrefillTimes
    ttft_ms: float
    first_step_ms: float


@dataclass
class FirstStep(FirstToken):
    """A first token with what it was chosen from: ``logits`` (B, vocab), processed, and their ``logprobs``."""

    logits: mx.array
    logprobs: mx.array


def greedy(logprobs: mx.array) -> mx.array:
    """Return the likeliest tokens (B,) of log-probabilities (B, vocabulary)."""
    return mx.argmax(logprobs, axis=-1)


def time_first_token(
    read: Callable[[PrefillTimes], tuple[nn.Module, Cache]],
    last: list[int],
    *,
    sampler: Chooser = greedy,
    process: Chooser = lambda logits: logits,
) -> FirstStep:
    """Read a prompt and take its first token, on the clock.

    Args:
        read: reads all of a prompt (or of B prompts) but the last token, filling in what each part took; returns the
            model that decodes and its evaluated cache.
        last: the last token of each sequence.
        sampler: from log-probabilities to tokens.
        process: what becomes of the logits before that.
    """
    times, start = PrefillTimes(), time.perf_counter()
    network, cache = read(times)
    step_start = time.perf_counter()
    with mx.stream(generation_stream):
        logits = process(network(mx.array(last)[:, None], cache=cache)[:, -1])  # (B, 1, vocab) -> (B, vocab)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        tokens: Any = sampler(logprobs).tolist()
    end = time.perf_counter()
    ttft_ms, first_step_ms = 1e3 * (end - start), 1e3 * (end - step_start)
    return FirstStep(tokens, network, cache, times, ttft_ms, first_step_ms, logits, logprobs)


def time_engine(run: Callable[[], list[int]], network: nn.Module) -> FirstToken:
    """Let an engine of its own read a prompt and return its first tokens, on the clock; no cache is kept.

    Args:
        run: from token ids in hand to the first tokens on the host.
        network: the mlx-lm model whose prompt that is.
    """
    start = time.perf_counter()
    tokens = run()
    ttft_ms = 1e3 * (time.perf_counter() - start)
    return FirstToken(tokens, network, [], PrefillTimes(), ttft_ms, 0.0)
