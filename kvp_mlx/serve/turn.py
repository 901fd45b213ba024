"""What the conversation routes share: from messages, tools and a schema to a ticket, and from its events to parts."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.concurrency import run_in_threadpool

from ..engine.controls import encode_apart, set_apart
from ..engine.dial import Dial
from ..engine.prompt import Message
from .conversations import Prompt, Tool, prompt_of
from .dials import KVPField, dial_for
from .openai_fields import submitted
from .output import Output, Part, Reasoning, any_of, call_schemas
from .requests import Finished, GenerationRequest, Sampling, Token
from .service import CountedTicket, Service


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation that the model is to take.

    Attributes:
        messages: so far (see ``conversations``).
        tools: that may be called.
        must_call: one of them has to be.
        parallel: more than one may be.
        schema: a JSON schema that the answer follows, if it is no call.
        prefill: how the answer begins.
        thinks: whether the model may think first; None leaves that to its chat template.
        template_arguments: more for the chat template.
        model: what the request calls the model.
        kvp: its dial.
        max_tokens: of the answer.
        sampling: how tokens are chosen.
        stop: texts that end it.
        top_logprobs: see ``GenerationRequest``.
        reuse: see ``GenerationRequest``.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    must_call: bool = False
    parallel: bool = True
    schema: dict[str, Any] | None = None
    prefill: str = ""
    thinks: bool | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    kvp: KVPField | None = None
    max_tokens: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    reuse: bool = True

    @property
    def grammar(self) -> str | None:
        """The JSON schema of the whole answer, calls included; None: it is free."""
        if not self.must_call and self.schema is None:
            return None
        free = [] if self.must_call or self.schema is None else [self.schema]
        return any_of([*free, *call_schemas(self.tools)])

    async def prompt(self, service: Service) -> Prompt:
        """Return the prompt's tokens, off the event loop.

        Raises:
            InputError: see ``prompt_of``.
        """
        return await run_in_threadpool(self._prompt, service)

    def _prompt(self, service: Service) -> Prompt:
        arguments = dict(self.template_arguments)
        if self.thinks is not None:
            arguments.setdefault("enable_thinking", self.thinks)
        may_think = self.grammar is None and not self.prefill
        prompt = prompt_of(service.model, self.messages, self.tools, template_arguments=arguments, thinks=may_think)
        if not self.prefill:
            return prompt
        tokenizer = service.model.text_tokenizer
        (begun,) = set_apart(tokenizer, [{"role": "user", "content": self.prefill}])
        return replace(prompt, ids=prompt.ids + encode_apart(tokenizer, begun["content"]))

    async def submit(self, service: Service) -> "Answer":
        """Queue the turn.

        Raises:
            APIError, InputError, QueueFullError: see ``Service.submit``, ``dial_for`` and ``prompt_of``.
        """
        (answer,) = await self.submit_all(service, [self.sampling])
        return answer

    async def submit_all(self, service: Service, samplings: Sequence[Sampling]) -> list["Answer"]:
        """Queue the turn several times over, all or none; see ``submit``."""
        dial = dial_for(service, self.model, self.kvp, has_tools=bool(self.tools or self.schema))
        grammar, tokenizer = self.grammar, service.model.text_tokenizer
        with service.scheduler.expecting():
            prompt = await self.prompt(service)
            tickets = await submitted(service, [self._request(service, prompt, dial, each) for each in samplings])

        def output() -> Output:
            is_call = grammar is not None and bool(self.tools)
            return Output(tokenizer, prompt.ids, self.tools, is_call=is_call, parallel=self.parallel)

        return [Answer(ticket, output(), len(prompt.ids)) for ticket in tickets]

    def _request(self, service: Service, prompt: Prompt, dial: Dial, sampling: Sampling) -> GenerationRequest:
        vocabulary = service.model.vocabulary_size
        return GenerationRequest(
            ids=prompt.ids,
            dial=dial,
            max_tokens=self.max_tokens,
            sampling=sampling if 0 < sampling.top_k < vocabulary else replace(sampling, top_k=0),
            stop=self.stop,
            top_logprobs=self.top_logprobs,
            grammar=self.grammar,
            stable_tokens=prompt.stable_tokens,
            reuse=self.reuse,
            goes_on=bool(self.prefill),
        )


@dataclass
class Answer:
    """An answer that is under way.

    Attributes:
        ticket: where its events come from.
        output: takes its text apart.
        prompt_tokens: length of its prompt.
        reasoning_tokens: of the answer so far.
    """

    ticket: CountedTicket
    output: Output
    prompt_tokens: int
    reasoning_tokens: int = 0

    async def parts(self) -> AsyncIterator[Part | Finished]:
        """Yield the parts as they come, and at last how it ended."""
        async for event in self.ticket:
            if isinstance(event, Token):
                parts = self.output.add(event.text)
                self.reasoning_tokens += any(isinstance(part, Reasoning) for part in parts)
                for part in parts:
                    yield part
            elif isinstance(event, Finished):
                for part in self.output.finish():
                    yield part
                yield event
