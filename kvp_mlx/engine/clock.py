"""Time to first token, taken in one place: from token ids in hand to the first token's value on the host."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream

from ..models.families import Cache
from ..models.sections import output_head
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
        first_step_ms: of that, the last prompt token, unless it was read with others, and sampling.
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


class Ready(NamedTuple):
    """A prompt that was read, up to its last token or with it.

    Attributes:
        network: the model that decodes.
        cache: its evaluated cache.
        output: what its layers make of the last token ``(B, 1, hidden)``, normed, where the cache holds that as well.
    """

    network: nn.Module
    cache: Cache
    output: mx.array | None = None


def time_first_token(
    read: Callable[[PrefillTimes], Ready],
    last: list[int],
    *,
    sampler: Chooser = greedy,
    process: Chooser = lambda logits: logits,
) -> FirstStep:
    """Read a prompt and take its first token, on the clock.

    Args:
        read: reads a prompt (or B prompts), filling in what each part took.
        last: the last token of each sequence.
        sampler: from log-probabilities to tokens.
        process: what becomes of the logits before that.
    """
    times, start = PrefillTimes(), time.perf_counter()
    network, cache, output = read(times)
    step_start = time.perf_counter()
    with mx.stream(generation_stream):
        raw = network(mx.array(last)[:, None], cache=cache) if output is None else output_head(network, output)
        logits = process(raw[:, -1])  # (B, 1, vocab) -> (B, vocab)
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
