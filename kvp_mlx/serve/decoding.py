"""Decoding many answers side by side, by mlx-lm's ``BatchGenerator``; one after the other where caches do not merge."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from ..bundle.loading import KVPModel
from ..engine.decode import LogitsProcessor
from ..engine.pace import Pace
from ..engine.refining_network import RefiningNetwork
from ..engine.speculative import Drafting, Speculation
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

    def insert(self, work: Work) -> None:
        """Let an answer go on behind its ``tokens``, of which the context holds all but the last; it stays as it is."""
        (number,) = self._generator.insert_segments(
            [[work.tokens[-1:]]],
            max_tokens=[work.tokens_left],
            caches=[work.context.cache],
            all_tokens=[work.tokens[:-1]],
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

    def insert(self, work: Work) -> None:
        """See ``Batch.insert``."""
        before = mx.array(work.tokens[:-1], dtype=mx.int32)

        def on_whole(processor: LogitsProcessor) -> LogitsProcessor:
            return lambda tokens, logits: processor(mx.concatenate([before, tokens]), logits)

        self._answers[work] = generate_step(
            mx.array(work.tokens[-1:]),
            self._network,
            max_tokens=work.tokens_left,
            sampler=work.sampler,
            logits_processors=[on_whole(processor) for processor in work.processors],
            prompt_cache=copy.deepcopy(work.context.cache),
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


class Refined:
    """The same, but answers behind predicted prompts are refined one by one until they are exact, and join then.

    Args:
        others: decodes those that are.
    """

    def __init__(self, others: Batch):
        self._others = others
        self._refining: dict[Work, RefiningNetwork] = {}

    def __len__(self) -> int:
        return len(self._refining) + len(self._others)

    def __iter__(self) -> Iterator[Work]:
        return iter([*self._refining, *self._others])

    def insert(self, work: Work) -> None:
        """See ``Batch.insert``."""
        network = work.refining()
        if network is None:
            self._others.insert(work)
        else:
            self._refining[work] = network

    def step(self) -> list[Decoded]:
        """See ``Batch.step``."""
        for work, network in list(self._refining.items()):
            if network.is_exact:
                self.remove(work)
                self._others.insert(work)
        alone = [Decoded(work, *work.refined_step(network)) for work, network in self._refining.items()]
        return alone + (self._others.step() if len(self._others) else [])

    def remove(self, work: Work) -> tuple[Cache, list[int]] | None:
        """See ``Batch.remove``; what was being refined is in its context."""
        network = self._refining.pop(work, None)
        if network is None:
            return self._others.remove(work)
        network.leave(work.context, work.context.tokens)
        return None

    def close(self) -> None:
        """See ``Batch.close``."""
        self._others.close()


class Drafted:
    """The same, but an answer that begins alone has the auxiliary's drafts, until another joins it.

    Args:
        others: decodes those that are not alone.
        drafting: settled.
        slice_ms: how long, about, the auxiliary reads at a time before it can draft.
    """

    def __init__(self, others: Batch | OneByOne, drafting: Drafting, slice_ms: float):
        self._others, self._drafting, self._pace = others, drafting, Pace(slice_ms)
        self._lone: tuple[Work, Speculation] | None = None

    def __len__(self) -> int:
        return len(self._others) + (self._lone is not None)

    def __iter__(self) -> Iterator[Work]:
        return iter([*([] if self._lone is None else [self._lone[0]]), *self._others])

    def insert(self, work: Work) -> None:
        """See ``Batch.insert``."""
        speculation = None if len(self) else work.speculation(self._drafting)
        if speculation is None:
            self._join()
            self._others.insert(work)
        else:
            self._lone = work, speculation
            self._catching_up, self._steps = speculation.catching_up(self._pace), speculation.steps()

    def _join(self) -> None:
        """Let the others go on with the answer that was alone."""
        if self._lone is not None:
            work, speculation = self._let_go()
            speculation.leave_off()
            work.grown_to(speculation.generated, unread=1)
            self._others.insert(work)

    def _let_go(self) -> tuple[Work, Speculation]:
        assert self._lone is not None
        (work, speculation), self._lone = self._lone, None
        self._catching_up.close()
        self._steps.close()
        return work, speculation

    def step(self) -> list[Decoded]:
        """See ``Batch.step``; no token comes as long as the auxiliary catches up."""
        if self._lone is None:
            return self._others.step()
        if self._pace.advance(self._catching_up):
            return []
        token, logprobs, _ = next(self._steps)
        return [Decoded(self._lone[0], token, logprobs)]

    def remove(self, work: Work) -> tuple[Cache, list[int]] | None:
        """See ``Batch.remove``; what was alone is in its context."""
        if self._lone is None or self._lone[0] is not work:
            return self._others.remove(work)
        _, speculation = self._let_go()
        speculation.end()
        work.grown_to(speculation.generated)
        return None

    def close(self) -> None:
        """See ``Batch.close``."""
        self._others.close()


Decoder = Batch | OneByOne | Refined | Drafted


def decoder_for(model: KVPModel, size: int, drafting: Drafting, slice_ms: float) -> Decoder:
    """Return what decodes up to ``size`` answers of a model; those that are drafted are not refined."""
    can_merge = all(hasattr(layer, "merge") for layer in make_prompt_cache(model.base))
    plain = Batch(model.base, size) if can_merge else OneByOne(model.base)
    if drafting.who != "none":
        return Drafted(plain, drafting, slice_ms)
    return Refined(plain) if isinstance(plain, Batch) else plain
