"""mlx-lm's ``stream_generate``, with the first token handed out as soon as it is known.

mlx-lm starts on the second token before it hands out the first. A GPU does that in the background; on CPU mlx lets
only a few operations queue up and holds the caller until the rest are done, so that the first token waits for most of
a second decoding step. Here the first step runs alone, and mlx-lm is then given its outcome in place of the step.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, generation_stream, stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .families import Cache

Sampler = Callable[[mx.array], mx.array]


def first_logits(model: nn.Module, ids: mx.array, cache: Cache, step_size: int) -> mx.array:
    """Return the logits (B, 1, vocab) that follow ``ids`` (B, T), of which all but the last go in chunks; lazy."""
    read = ids.shape[1] - 1
    with mx.stream(generation_stream):
        for start in range(0, read, step_size):
            model(ids[:, start : min(start + step_size, read)], cache=cache)
            mx.eval([layer.state for layer in cache])
        return model(ids[:, -1:], cache=cache)


def stream_first_token_early(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: mx.array,
    *,
    max_tokens: int,
    prompt_cache: Cache,
    prefill_step_size: int,
    sampler: Sampler | None = None,
) -> Iterator[GenerationResponse]:
    """Yield what mlx-lm's ``stream_generate`` would, the same tokens and text, the first one sooner.

    Args:
        model: the base.
        tokenizer: its tokeniser.
        prompt: token ids ``(T,)`` that follow the cache.
        max_tokens: tokens to generate at most.
        prompt_cache: the base's cache, extended in place.
        prefill_step_size: tokens per chunk, should T be long.
        sampler: from log-probabilities ``(1, vocab)`` to a token ``(1,)``; greedy by default.
    """
    start = time.perf_counter()
    choose = sampler or (lambda logprobs: mx.argmax(logprobs, axis=-1))
    logits = first_logits(model, prompt[None], prompt_cache, prefill_step_size)
    with mx.stream(generation_stream):
        logprobs = logits[:, -1] - mx.logsumexp(logits[:, -1], keepdims=True)
        chosen = choose(logprobs)
    token: Any = chosen.item()
    is_early = max_tokens > 1 and token not in tokenizer.eos_token_ids  # otherwise it is the last piece as well
    if is_early:
        detokenizer = tokenizer.detokenizer
        detokenizer.add_token(token)
        yield GenerationResponse(
            text=detokenizer.last_segment,
            token=token,
            logprobs=logprobs.squeeze(0),
            from_draft=False,
            prompt_tokens=prompt.size,
            prompt_tps=prompt.size / (time.perf_counter() - start),
            generation_tokens=1,
            generation_tps=0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
        )
    pieces = stream_generate(
        _Replay(model, logits),
        tokenizer,
        prompt[-1:],
        max_tokens=max_tokens,
        prompt_cache=prompt_cache,
        sampler=_replayed(chosen, choose),
    )
    if is_early:
        next(pieces)
    yield from pieces


class _Replay(nn.Module):
    """Stands in for a model: its first call returns logits that are there already, the others ask the model."""

    def __init__(self, model: nn.Module, logits: mx.array):
        super().__init__()
        self.model = model
        self._waiting = [logits]

    def __call__(self, ids: mx.array, cache: Cache) -> mx.array:
        return self._waiting.pop() if self._waiting else self.model(ids, cache=cache)


def _replayed(first: mx.array, sampler: Sampler) -> Sampler:
    """Return a sampler that yields ``first``, then what ``sampler`` chooses."""
    waiting = [first]
    return lambda logprobs: waiting.pop() if waiting else sampler(logprobs)
