"""The fields of a body that OpenAI's two completion routes share, and what they mean to the scheduler."""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue
from starlette.concurrency import run_in_threadpool

from .dials import KVPField
from .errors import APIError
from .requests import GenerationRequest, Sampling
from .service import CountedTicket, Service

MAX_CHOICES = 16
NO_WINDOW_TOKENS = 2**20
"""What an answer may have where neither request nor model says."""


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    json.dumps(value, allow_nan=False)  # its ValueError is pydantic's
    return value


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("it has to be at least 1 (or -1: as many as fit)")
    return value


JSONObject = Annotated[dict[str, JsonValue], AfterValidator(_finite)]
MaxTokens = Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(_not_zero)]
NonEmpty = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Fields(BaseModel):
    """Part of a body; fields that are not known here change nothing."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class StreamOptions(Fields):
    """``stream_options``."""

    include_usage: bool | None = None


class GenerationFields(Fields):
    """What says how to generate, in OpenAI's names and, beyond these, in vLLM's and llama-server's."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = None
    cache_prompt: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: MaxTokens | None = None
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    kvp: KVPField | None = None

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, service: Service, choice: int) -> Sampling:
        """Return how the tokens of one of several answers are chosen.

        Raises:
            APIError: a bias for what is no token.
        """
        vocabulary = service.model.vocabulary_size
        given = {each.name: getattr(self, each.name) for each in fields(Sampling)}
        if any(token >= vocabulary for token in self.logit_bias or {}):
            raise APIError(400, f"logit_bias: token ids lie below {vocabulary} here.", param="logit_bias")
        if not 0 < (self.top_k or 0) < vocabulary:
            given["top_k"] = None
        if self.seed is not None:
            given["seed"] = (self.seed + choice) % 2**63
        return Sampling(**{name: value for name, value in given.items() if value is not None})


def max_tokens(service: Service, asked: int | None) -> int:
    """Return how many tokens an answer may have; all that fit the context window where a request does not say."""
    return asked if asked and asked > 0 else service.model.context_length or NO_WINDOW_TOKENS


async def submitted(service: Service, requests: Sequence[GenerationRequest]) -> list[CountedTicket]:
    """Queue all requests, or none; off the event loop, since a schema may take seconds to compile.

    Raises:
        InputError, QueueFullError, APIError: see ``Service.submit``; or more answers than there can ever be at a time.
    """
    if len(requests) > (most := service.scheduler.capacity):
        raise APIError(400, f"this asks for {len(requests)} answers, and {most} may be there at a time; ask for fewer.")
    tickets: list[CountedTicket] = []

    def submit() -> None:
        for request in requests:
            tickets.append(service.submit(request))

    try:
        await run_in_threadpool(submit)
    except BaseException:  # also where the client has gone meanwhile
        for ticket in tickets:
            ticket.cancel()
        raise
    return tickets
