"""Requests to a scheduler, and what comes back, without any HTTP."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from support.tiny import chat_tokenizer, estimating, llama, prefixed, token_ids

from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.engine.context import Context
from kvp_mlx.engine.dial import Dial
from kvp_mlx.engine.reply import reply
from kvp_mlx.serve.requests import Event, Finished, GenerationRequest, Progress, Token, Usage
from kvp_mlx.serve.scheduler import Scheduler, Ticket

FULL = Dial("full", 0, 0)


@dataclass
class Reply:
    """All events of one request."""

    events: list[Event]

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if isinstance(event, Token)]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Token))

    @property
    def progress(self) -> list[Progress]:
        return [event for event in self.events if isinstance(event, Progress)]

    @property
    def finished(self) -> Finished:
        (finished,) = (event for event in self.events if isinstance(event, Finished))
        return finished

    @property
    def usage(self) -> Usage:
        return self.finished.usage


@contextlib.contextmanager
def scheduler_of(
    model: KVPModel, *, slice_ms: float = 50.0, cache_bytes: int = 10**9, cache_dir: Path | None = None, **options: Any
) -> Iterator[Scheduler]:
    scheduler = Scheduler(model, slice_ms=slice_ms, cache_bytes=cache_bytes, cache_dir=cache_dir, **options)
    try:
        yield scheduler
    finally:
        scheduler.close()


async def read(ticket: Ticket) -> Reply:
    return Reply([event async for event in ticket])


def replies(*tickets: Ticket) -> list[Reply]:
    """Read tickets side by side to their end."""

    async def together() -> list[Reply]:
        return list(await asyncio.wait_for(asyncio.gather(*map(read, tickets)), 120))

    return asyncio.run(together())


def ask(scheduler: Scheduler, ids: Sequence[int], dial: Dial = FULL, max_tokens: int = 8, **fields: object) -> Reply:
    """Answer one request."""
    (reply,) = replies(scheduler.submit(GenerationRequest(list(ids), dial, max_tokens, **fields)))
    return reply


def plain(network: nn.Module, ids: Sequence[int], max_tokens: int = 8) -> list[int]:
    """Return mlx-lm's own answer at temperature 0."""
    return [int(token) for token, _ in generate_step(mx.array(list(ids)), network, max_tokens=max_tokens)]


def endless(model: KVPModel) -> KVPModel:
    model.text_tokenizer._eos_token_ids.clear()
    return model


def recomputing() -> KVPModel:
    """A prefix bundle that recomputes, whose answers never end by themselves."""
    bundle, _ = prefixed(llama(), 1, tokenizer=chat_tokenizer())
    bundle = endless(estimating(bundle))
    mx.eval(bundle.predictor.parameters())
    return bundle


def prompts(*lengths: int) -> list[list[int]]:
    return [token_ids(length, seed=number)[0].tolist() for number, length in enumerate(lengths)]


def alone(model: KVPModel, ids: list[int], dial: Dial, max_tokens: int = 8) -> list[int]:
    return [piece.token for piece in reply(Context(model), ids, dial, max_tokens=max_tokens)]
