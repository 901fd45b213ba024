"""How one request's tokens are chosen: mlx-lm's filters and penalties, and random numbers of its own."""

import secrets

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors

from ..engine.clock import Chooser, greedy
from ..engine.decode import LogitsProcessor
from .requests import Sampling

REPETITION_TOKENS = 20
"""What mlx-lm's repetition penalty looks back at."""


def sampler_of(sampling: Sampling) -> Chooser:
    """Return what chooses tokens ``(1,)`` from log-probabilities ``(1, vocab)``."""
    return greedy if sampling.temperature == 0 else Sampler(sampling)


class Sampler:
    """Draws tokens, in mlx-lm's order of filters.

    Its random numbers come from a key of its own: with a seed the same, whatever else runs.

    Attributes:
        state: the key of the next token (see ``engine.speculative.OwnNumbers``).
    """

    def __init__(self, sampling: Sampling):
        self._sampling = sampling
        self.state = mx.random.key((secrets.randbits(64) if sampling.seed is None else sampling.seed) % 2**64)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Choose tokens."""
        sampling = self._sampling
        if sampling.top_p == 0:  # the narrowest nucleus
            logprobs = apply_top_k(logprobs, 1)
        elif sampling.top_p < 1:
            logprobs = apply_top_p(logprobs, sampling.top_p)
        if sampling.min_p > 0:
            logprobs = apply_min_p(logprobs, sampling.min_p)
        if 0 < sampling.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, sampling.top_k)
        self.state, now = mx.random.split(self.state)
        return mx.random.categorical(logprobs * (1 / sampling.temperature), key=now)


def processors_of(sampling: Sampling, prompt_tokens: int) -> list[LogitsProcessor]:
    """Return what changes the logits before tokens are chosen.

    OpenAI's penalties count what was generated, mlx-lm's repetition penalty looks back into the prompt as well.
    """
    repetition = None if sampling.repetition_penalty == 1 else sampling.repetition_penalty
    generated = make_logits_processors(
        presence_penalty=sampling.presence_penalty,
        presence_context_size=0,  # all of it: tokens[-0:]
        frequency_penalty=sampling.frequency_penalty,
        frequency_context_size=0,
    )
    return [
        *make_logits_processors(sampling.logit_bias, repetition, REPETITION_TOKENS),
        *(_on_generated(processor, prompt_tokens) for processor in generated),
    ]


def _on_generated(processor: LogitsProcessor, prompt_tokens: int) -> LogitsProcessor:
    return lambda tokens, logits: processor(tokens[prompt_tokens:], logits)
