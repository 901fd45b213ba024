"""OpenAI's answers, streamed or whole: envelope, choices, usage, log-probabilities."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer, TokenizerWrapper
from starlette.requests import Request
from starlette.responses import Response
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .dials import measured
from .json_body import JSONAnswer
from .openai_fields import GenerationFields
from .requests import Event, Finished, Progress, Usage
from .service import CountedTicket, Service
from .sse import DONE, EventStream, server_event, whole

BYTES = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}
"""The characters that byte-level vocabularies write bytes as."""


class Answer(Protocol):
    """One of a request's answers, as it comes."""

    def choices(self, event: Event) -> list[dict[str, Any]]:
        """Return what an event adds, as ``choices`` of chunks; log-probabilities may wait for their text."""

    def nothing(self) -> dict[str, Any]:
        """Return a choice that adds nothing."""

    def joined(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the whole answer's choice from those of its chunks."""


@dataclass(frozen=True)
class Kind:
    """What a route calls its answers, and the chunks of streamed ones."""

    prefix: str
    whole: str
    chunk: str

    def head(self, service: Service, *, is_chunk: bool) -> dict[str, Any]:
        """Return what an answer and each of its chunks begin with."""
        return {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.chunk if is_chunk else self.whole,
            "created": int(time.time()),
            "model": service.name,
        }


@dataclass(frozen=True)
class Answers:
    """All answers to a request.

    Attributes:
        service: the server.
        body: the request's.
        kind: the route's names.
        tickets: where the events come from.
        each: one for each ticket.
    """

    service: Service
    body: GenerationFields
    kind: Kind
    tickets: Sequence[CountedTicket]
    each: Sequence[Answer]

    async def response(self, request: Request) -> Response:
        """Return them as the body asks."""
        if self.body.stream:
            return EventStream(self.service, self.tickets, self._streamed())
        return JSONAnswer(await whole(self.service, request, self.tickets, self._whole()))

    async def _streamed(self) -> AsyncIterator[bytes]:
        head = self.kind.head(self.service, is_chunk=True)
        if self.body.includes_usage:
            head["usage"] = None
        usages: dict[int, Usage] = {}
        async for number, event in together(self.tickets):
            if isinstance(event, Progress) and self.body.return_progress:
                yield server_event({**head, "choices": [self.each[number].nothing()], "prompt_progress": _read(event)})
            if isinstance(event, Finished):
                usages[number] = event.usage
            for choice in self.each[number].choices(event):
                yield server_event({**head, "choices": [choice]})
        if self.body.includes_usage:
            yield server_event({**head, "choices": [], "usage": self._usage(usages)})
        yield DONE

    async def _whole(self) -> dict[str, Any]:
        choices: list[list[dict[str, Any]]] = [[] for _ in self.each]
        usages: dict[int, Usage] = {}
        async for number, event in together(self.tickets):
            if isinstance(event, Finished):
                usages[number] = event.usage
            choices[number] += self.each[number].choices(event)
        joined = [answer.joined(chunks) for answer, chunks in zip(self.each, choices, strict=True)]
        return {**self.kind.head(self.service, is_chunk=False), "choices": joined, "usage": self._usage(usages)}

    def _usage(self, usages: dict[int, Usage]) -> dict[str, Any]:
        """Return ``usage``: each prompt counts once, however many answers it has."""
        ordered = [usages[number] for number in range(len(self.each))]
        prompts = ordered[:: self.body.choices]
        read, written = (sum(each.prompt_tokens for each in prompts), sum(each.completion_tokens for each in ordered))
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in prompts)},
            "kvp": measured(ordered[0]),
        }


def _read(progress: Progress) -> dict[str, Any]:
    """Return llama-server's ``prompt_progress``."""
    return {
        "total": progress.total,
        "cache": progress.cached,
        "processed": progress.processed,
        "time_ms": round(progress.time_ms, 2),
    }


async def together(tickets: Sequence[CountedTicket]) -> AsyncIterator[tuple[int, Event]]:
    """Yield the events of several tickets as they come, each with its ticket's number."""
    arrived: asyncio.Queue[tuple[int, Event] | Exception | None] = asyncio.Queue()

    async def pass_on(number: int, ticket: CountedTicket) -> None:
        try:
            async for event in ticket:
                arrived.put_nowait((number, event))
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.create_task(pass_on(*numbered)) for numbered in enumerate(tickets)]
    try:
        running = len(tasks)
        while running:
            match await arrived.get():
                case None:
                    running -= 1
                case Exception() as error:
                    raise error
                case event:
                    yield event
    finally:
        for task in tasks:
            task.cancel()


def token_bytes(tokenizer: TokenizerWrapper, token: int) -> bytes:
    """Return what one token stands for; the bytes of a character may be spread over several.

    Embeddings may be padded beyond the tokeniser's words; such a token stands for nothing.
    """
    if token >= len(tokenizer):
        return b""
    detokenizer = tokenizer.detokenizer
    if isinstance(detokenizer, BPEStreamingDetokenizer):
        return b"".join(BYTES.get(character, character.encode()) for character in detokenizer.tokenmap[token])
    if isinstance(detokenizer, SPMStreamingDetokenizer):
        return bytes(detokenizer.tokenmap[token]).replace("▁".encode(), b" ")
    return str(tokenizer.decode([token])).encode()


def token_text(tokenizer: TokenizerWrapper, token: int) -> str:
    """Return the same as text, as OpenAI does: ``bytes:`` and their numbers where it is no whole character."""
    meant = token_bytes(tokenizer, token)
    try:
        return meant.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in meant)
