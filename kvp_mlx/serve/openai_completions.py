"""OpenAI's older ``/v1/completions``: text as it stands, without the chat template."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..engine.dial import Dial
from ..engine.prompt import check_size, encode_text
from .dials import dial_for
from .errors import APIError
from .json_body import read_body
from .openai_answers import Answers, Kind, token_bytes, token_text
from .openai_fields import MAX_CHOICES, GenerationFields, TokenId, max_tokens, submitted
from .requests import Event, Finished, GenerationRequest, Progress
from .service import Service

KIND = Kind("cmpl", "text_completion", "text_completion")

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class CompletionBody(GenerationFields):
    """The body of a request; what would change the answer and is not served here is refused by name."""

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: None = None
    best_of: None = None


def routes(service: Service) -> list[Route]:
    """Return the route."""
    return [Route("/v1/completions", partial(completions, service), methods=["POST"])]


async def completions(service: Service, request: Request) -> Response:
    """Go on from one or more texts."""
    body = await read_body(request, CompletionBody)
    if body.echo and body.logprobs is not None:
        raise APIError(400, "logprobs: the prompt's own are not served; leave out echo or logprobs.", param="logprobs")
    dial = dial_for(service, body.model, body.kvp, has_tools=False)
    tokenizer = service.model.text_tokenizer
    with service.scheduler.expecting():
        prompts = await run_in_threadpool(prompts_of, service, body)
        tickets = await submitted(service, [each for ids in prompts for each in _requests(service, body, dial, ids)])
    echoes = [str(tokenizer.decode(ids)) if body.echo else "" for ids in prompts for _ in range(body.choices)]
    answers = [Completion(number, tokenizer, echo) for number, echo in enumerate(echoes)]
    return await Answers(service, body, KIND, tickets, answers).response(request)


def prompts_of(service: Service, body: CompletionBody) -> list[list[int]]:
    """Return the token ids of every prompt.

    Raises:
        APIError: an empty one, or ids that are no tokens.
        InputError: text that no context window holds.
    """
    vocabulary = service.model.vocabulary_size
    given = [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else body.prompt
    prompts = []
    for prompt in given:
        if isinstance(prompt, str):
            check_size(service.model, prompt)
        ids = encode_text(service.model.text_tokenizer, prompt) if isinstance(prompt, str) else prompt
        if not ids or max(ids) >= vocabulary:
            raise APIError(400, f"prompt: it is empty, or holds token ids not below {vocabulary}.", param="prompt")
        prompts.append(ids)
    return prompts


def _requests(service: Service, body: CompletionBody, dial: Dial, ids: list[int]) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            ids=ids,
            dial=dial,
            max_tokens=max_tokens(service, body.max_tokens or DEFAULT_MAX_TOKENS),
            sampling=body.sampling(service, choice),
            stop=body.stops,
            top_logprobs=body.logprobs,
            reuse=body.cache_prompt is not False,
            goes_on=True,
        )
        for choice in range(body.choices)
    ]


@dataclass
class Completion:
    """One of the texts, as it comes.

    Attributes:
        number: its index.
        tokenizer: the model's.
        text: that comes before the next piece.
    """

    number: int
    tokenizer: TokenizerWrapper
    text: str
    _characters: int = 0
    _tokens: list[tuple[str, float, dict[str, float], int]] = field(default_factory=list)

    def choices(self, event: Event) -> list[dict[str, Any]]:
        """See ``Answer``."""
        if isinstance(event, Progress):
            return []
        if isinstance(event, Finished):
            return [self._choice(event.reason)]
        self.text += event.text
        if event.logprob is not None and event.token not in self.tokenizer.eos_token_ids:
            top = {token_text(self.tokenizer, token): logprob for token, logprob in event.top}
            characters = len(token_bytes(self.tokenizer, event.token).decode("utf-8", "ignore"))
            self._tokens.append((token_text(self.tokenizer, event.token), event.logprob, top, characters))
        return [self._choice()] if self.text else []

    def nothing(self) -> dict[str, Any]:
        """See ``Answer``."""
        return {"index": self.number, "text": "", "logprobs": None, "finish_reason": None}

    def joined(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See ``Answer``."""
        tables = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        logprobs = {
            name: [value for table in tables for value in table[name]] for name in (tables[0] if tables else ())
        }
        return {**choices[-1], "text": "".join(choice["text"] for choice in choices), "logprobs": logprobs or None}

    def _choice(self, reason: str | None = None) -> dict[str, Any]:
        text, tokens, self.text, self._tokens = self.text, self._tokens, "", []
        choice = self.nothing() | {"text": text, "finish_reason": reason}
        if not tokens:
            return choice
        names, logprobs, top, characters = map(list, zip(*tokens, strict=True))
        *offsets, self._characters = itertools.accumulate(characters, initial=self._characters)
        table = {"tokens": names, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}
        return choice | {"logprobs": table}
