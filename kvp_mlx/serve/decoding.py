"""Decoding many answers side by side, by mlx-lm's ``BatchGenerator``; one after the other where caches do not merge."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from ..engine.decode import LogitsProcessor
from ..models.families import Cache
from .work import Work


@dataclass(frozen=True)
class Decoded:
    """One more token of a work; ``cache`` is there where it was the last that the batch had to generate."""

    work: Work
    token: int
    logprobs: mx.array
    cache: Cache | None = None
    tokens: list[int] | None = None


class Batch:
    """Works whose answers are being generated together.

    Args:
        network: the base.
        size: how many at most.
    """

    def __init__(self, network: nn.Module, size: int):
        self._generator = BatchGenerator(network, completion_batch_size=size, prefill_batch_size=size)
        self._works: dict[int, Work] = {}

    def __len__(self) -> int:
        return len(self._works)

    def __iter__(self) -> Iterator[Work]:
        return iter(list(self._works.values()))

    def insert(self, work: Work, token: int, cache: Cache) -> None:
        """Let an answer go on after its first token; ``cache`` holds the prompt and stays as it is."""
        (number,) = self._generator.insert_segments(
            [[[token]]],
            max_tokens=[work.max_tokens - 1],
            caches=[cache],
            all_tokens=[list(work.ids)],
            samplers=[work.sampler],
            logits_processors=[work.processors],
        )
        self._works[number] = work

    def step(self) -> list[Decoded]:
        """Generate one more token of every answer."""
        _, responses = self._generator.next()
        decoded = []
        for each in responses:
            work = self._works[each.uid]
            if each.finish_reason is not None:
                del self._works[each.uid]
            decoded.append(Decoded(work, each.token, each.logprobs, each.prompt_cache, each.all_tokens))
        return decoded

    def remove(self, work: Work) -> tuple[Cache, list[int]] | None:
        """End an answer; returns its cache and what that holds, if it was still being generated."""
        number = next((number for number, other in self._works.items() if other is work), None)
        if number is None:
            return None
        del self._works[number]
        cache, tokens = self._generator.remove([number], return_prompt_caches=True)[number]
        return cache, list(tokens)

    def close(self) -> None:
        """Give back what the generator holds of the system."""
        self._generator.close()


class OneByOne:
    """The same for models whose caches do not merge; what an answer added to its cache is not kept."""

    def __init__(self, network: nn.Module):
        self._network = network
        self._answers: dict[Work, Iterator[tuple[Any, mx.array]]] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[Work]:
        return iter(list(self._answers))

    def insert(self, work: Work, token: int, cache: Cache) -> None:
        """See ``Batch.insert``."""
        prompt = mx.array(work.ids, dtype=mx.int32)

        def on_whole(processor: LogitsProcessor) -> LogitsProcessor:
            return lambda tokens, logits: processor(mx.concatenate([prompt, tokens]), logits)

        self._answers[work] = generate_step(
            mx.array([token]),
            self._network,
            max_tokens=work.max_tokens - 1,
            sampler=work.sampler,
            logits_processors=[on_whole(processor) for processor in work.processors],
            prompt_cache=copy.deepcopy(cache),
        )

    def step(self) -> list[Decoded]:
        """See ``Batch.step``."""
        return [Decoded(work, *next(tokens)) for work, tokens in self._answers.items()]

    def remove(self, work: Work) -> tuple[Cache, list[int]] | None:
        """See ``Batch.remove``."""
        self._answers.pop(work, None)
        return None

    def close(self) -> None:
        """See ``Batch.close``."""


def decoder_for(network: nn.Module, size: int) -> Batch | OneByOne:
    """Return what decodes up to ``size`` answers of a model."""
    can_merge = all(hasattr(layer, "merge") for layer in make_prompt_cache(network))
    return Batch(network, size) if can_merge else OneByOne(network)
