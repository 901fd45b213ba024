"""Decoding after the first token, by mlx-lm's own loops: one answer streamed, or many side by side.

mlx-lm starts on the second token before it hands out the first. A GPU does that in the background; on CPU mlx lets
only a few operations queue up and holds the caller until the rest are done, so that the first token waits for most of
a second decoding step. So the clock takes the first step alone, and mlx-lm is given its outcome in place of the step.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.generate import BatchGenerator, GenerationResponse, generate_step
from mlx_lm.generate import stream_generate as mlx_lm_stream_generate
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..bundle.loading import KVPModel
from ..models.entries import held_positions
from ..models.families import Cache
from .clock import Chooser, FirstStep, Ready, greedy, time_first_token
from .context import Context
from .prefill import PrefillTimes
from .refining_network import RefiningNetwork, can_refine

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""From token ids ``(T,)`` and logits ``(1, vocab)`` to logits, as mlx-lm's are."""
BATCH_TOKENS = 16_384
"""Entries per layer that the caches of one batch hold at most."""


def processed(ids: list[int], processors: Sequence[LogitsProcessor]) -> Chooser:
    """Return what logits processors make of the logits that follow the whole prompt ``ids``."""

    def process(logits: mx.array) -> mx.array:
        for processor in processors:
            logits = processor(mx.array(ids), logits)
        return logits

    return process


def decode(
    first: FirstStep,
    tokenizer: TokenizerWrapper,
    ids: list[int],
    *,
    max_tokens: int,
    sampler: Chooser | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Yield what mlx-lm's ``stream_generate`` would after a prompt, the first token sooner.

    Args:
        first: the prompt as it was read, with ``sampler`` and ``logits_processors``; its cache is extended in place.
        tokenizer: the model's.
        ids: the whole prompt, which processors see.
        max_tokens: tokens to generate at most.
        sampler: from log-probabilities ``(1, vocab)`` to a token ``(1,)``; greedy by default.
        logits_processors: as mlx-lm's.
        options: passed to mlx-lm's ``stream_generate`` (kv_bits, ...).
    """
    (token,) = first.tokens
    is_early = max_tokens > 1 and token not in tokenizer.eos_token_ids  # otherwise it is the last piece as well
    if is_early:
        detokenizer = tokenizer.detokenizer
        detokenizer.add_token(token)
        yield GenerationResponse(
            text=detokenizer.last_segment,
            token=token,
            logprobs=first.logprobs.squeeze(0),
            from_draft=False,
            prompt_tokens=len(ids),
            prompt_tps=1e3 * len(ids) / first.ttft_ms,
            generation_tokens=1,
            generation_tps=0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
        )
    pieces = mlx_lm_stream_generate(
        _Replay(first.network, first.logits[:, None]),
        tokenizer,
        mx.array(ids[-1:]),
        max_tokens=max_tokens,
        prompt_cache=first.cache,
        sampler=_first_then(mx.array(first.tokens), sampler or greedy),
        logits_processors=[_after_first(ids, processor) for processor in logits_processors] or None,
        **options,
    )
    if is_early:
        next(pieces)
    yield from pieces


class _Replay(nn.Module):
    """Stands in for a model: its first call returns logits that are there already, the others ask the model."""

    def __init__(self, network: nn.Module, logits: mx.array):
        super().__init__()
        self.network = network
        self._waiting = [logits]

    def __call__(self, ids: mx.array, cache: Cache) -> mx.array:
        return self._waiting.pop() if self._waiting else self.network(ids, cache=cache)


def _first_then(first: mx.array, sampler: Chooser) -> Chooser:
    """Return a sampler that yields ``first``, then what ``sampler`` chooses."""
    waiting = [first]
    return lambda logprobs: waiting.pop() if waiting else sampler(logprobs)


def _after_first(ids: list[int], processor: LogitsProcessor) -> LogitsProcessor:
    """Return a processor that sees the whole prompt, and leaves alone the first logits, which it has processed."""
    before, waiting = mx.array(ids[:-1], dtype=mx.int32), [True]

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        if waiting and waiting.pop():
            return logits
        return processor(mx.concatenate([before, tokens]), logits)

    return process


class Answer:
    """A text as it is decoded beside others.

    Attributes:
        last: the prompt's last token, or its own newest one.
        cache: holds the tokens before that; the answers to one question share it.
        max_tokens: how many are generated at most.
        tokens: those generated so far.
    """

    def __init__(
        self,
        last: int,
        cache: Cache,
        sampler: Chooser | None,
        tokenizer: TokenizerWrapper,
        stop: Sequence[str],
        max_tokens: int,
    ):
        self.last, self.cache, self.sampler, self.max_tokens = last, cache, sampler or greedy, max_tokens
        self.tokens: list[int] = []
        self._tokenizer, self._stop = tokenizer, stop
        self._detokenizer = tokenizer.detokenizer

    @property
    def tokens_left(self) -> int:
        """How many more may be generated."""
        return self.max_tokens - len(self.tokens)

    def text(self) -> str:
        """Return what the tokens say up to the first stop string, an end mark aside; the last thing to be called."""
        self._detokenizer.finalize()
        return before(str(self._detokenizer.text), self._stop)

    def add(self, token: int) -> bool:
        """Add a token; returns whether the answer goes on."""
        self.tokens.append(token)
        if token in self._tokenizer.eos_token_ids:
            return False
        self._detokenizer.add_token(token)
        return not any(mark in self._detokenizer.text for mark in self._stop)


def before(text: str, stop: Sequence[str]) -> str:
    """Return the part of a text before the first stop string."""
    return text[: min((place for mark in stop if (place := text.find(mark)) >= 0), default=len(text))]


def decode_together(network: nn.Module, answers: Sequence[Answer]) -> None:
    """Decode answers side by side, as many as ``BATCH_TOKENS`` allows; caches are left as they are."""
    longest = max((held_positions(answer.cache) or 0) + answer.tokens_left for answer in answers)
    size = max(1, min(len(answers), BATCH_TOKENS // longest))
    batch = BatchGenerator(network, completion_batch_size=size, prefill_batch_size=size)
    numbers = batch.insert(
        [[answer.last] for answer in answers],
        [answer.tokens_left for answer in answers],
        caches=[answer.cache for answer in answers],
        samplers=[answer.sampler for answer in answers],
    )
    by_number = dict(zip(numbers, answers, strict=True))
    try:
        while responses := batch.next_generated():
            ended = [each.uid for each in responses if not by_number[each.uid].add(each.token)]
            let_go = {each.uid for each in responses if each.finish_reason is not None}
            batch.remove([number for number in ended if number not in let_go])
    finally:
        batch.close()


def decode_alone(network: nn.Module, answers: Sequence[Answer]) -> None:
    """Decode answers one after another; caches are left as they are."""
    for answer in answers:
        cache = repeated(network, answer.cache, 1)
        steps = generate_step(
            mx.array([answer.last]), network, max_tokens=answer.tokens_left, prompt_cache=cache, sampler=answer.sampler
        )
        for token, _ in steps:
            if not answer.add(int(token)):
                break


def decode_refining(model: KVPModel, answer: Answer, ids: list[int], refine_tokens: int) -> bool:
    """Decode the base's answer until a copy of its cache is exact, which becomes its own.

    Args:
        model: the bundle.
        answer: nothing of it is decoded yet.
        ids: the prompt.
        refine_tokens: how many are read beside each token; none, and nothing is done.

    Returns:
        Whether the answer goes on.
    """
    if not refine_tokens or not can_refine(model):
        return True
    cache: Any = repeated(model.base, answer.cache, 1)
    network: nn.Module = model.base  # for the first token, which waits for nothing to be refined
    refining = RefiningNetwork(Context(model), ids, refine_tokens)

    def ready(_: PrefillTimes) -> Ready:
        return Ready(network, cache)

    while answer.tokens_left and not refining.is_exact:
        (answer.last,) = time_first_token(ready, [answer.last], sampler=answer.sampler).tokens
        if not answer.add(answer.last):
            return False
        network = refining
    answer.cache = cache
    return answer.tokens_left > 0


def repeated(network: nn.Module, cache: Cache, batch: int) -> Cache:
    """Return a copy of a model's cache of one sequence for ``batch`` equal ones, so that all are read at once."""
    copies = make_prompt_cache(network)
    for copy, layer in zip(copies, cache, strict=True):
        if isinstance(layer, KVCache) and layer.offset:
            copy.update_and_fetch(*(mx.repeat(part, batch, axis=0) for part in layer.keys_and_values()))
        elif not layer.empty():
            copy.state = tree_map(partial(_repeated, batch), layer.state)
    return copies


def _repeated(batch: int, part: Any) -> Any:
    """Return an array of a cache's state for several sequences; numbers as they are."""
    return mx.repeat(part, batch, axis=0) if isinstance(part, mx.array) else part
