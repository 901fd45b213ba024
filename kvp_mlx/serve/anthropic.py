"""Anthropic's ``/v1/messages`` and ``/v1/messages/count_tokens``."""

import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..engine.prompt import Message
from .conversations import Tool
from .dials import KVPField, measured, quality_of
from .errors import APIError, anthropic_error
from .json_body import JSONAnswer, read_body
from .openai_fields import Fields, JSONObject, NonEmpty
from .output import Part, Reasoning, Text, ToolCall
from .requests import Finished, Sampling, Usage
from .service import Service
from .sse import EventStream, server_event, whole
from .turn import Answer, Turn

BILLING_HEADER = "x-anthropic-billing-header:"
"""Claude Code puts this line, new with every request, before its system prompt. It is not for the model, and would
leave nothing of the prompt to be found again."""
FOREIGN_NAMES = "claude-"
"""How the models begin that Claude Code asks for by itself (titles, summaries); this server's one answers for them."""

Event = tuple[str, dict[str, Any]]


class TextBlock(Fields):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Fields):
    """What an assistant thought; of redacted thoughts nothing is left."""

    type: Literal["thinking", "redacted_thinking"]
    thinking: str = ""


class ToolUseBlock(Fields):
    """A call."""

    type: Literal["tool_use"]
    id: NonEmpty
    name: NonEmpty
    input: JSONObject


class TextSource(Fields):
    """A document's text."""

    type: Literal["text"]
    data: str


class DocumentBlock(Fields):
    """A document."""

    type: Literal["document"]
    source: TextSource

    @property
    def text(self) -> str:
        """Its text."""
        return self.source.data


Readable = Annotated[TextBlock | DocumentBlock, Field(discriminator="type")]


class ToolResultBlock(Fields):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: NonEmpty
    content: str | list[Readable] = ""


Block = Annotated[
    TextBlock | DocumentBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class InputMessage(Fields):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]

    @property
    def blocks(self) -> list[Block]:
        """The content, text alone as one block."""
        if isinstance(self.content, str):
            return [TextBlock(type="text", text=self.content)]
        return self.content


class ToolDefinition(Fields):
    """A tool of the client's own."""

    type: Literal["custom"] | None = None
    name: NonEmpty
    description: str | None = None
    input_schema: JSONObject


class ToolChoice(Fields):
    """Whether a tool is called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Fields):
    """Whether to think first."""

    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(Fields):
    """The JSON schema of the answer."""

    type: Literal["json_schema"]
    schema_: JSONObject = Field(alias="schema")


class OutputConfig(Fields):
    """What the answer looks like."""

    format: OutputFormat | None = None


class ConversationBody(Fields):
    """What is counted: everything that the model reads."""

    model: str | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    kvp: KVPField | None = None


class MessagesBody(ConversationBody):
    """The body of a request; what is not known here changes nothing."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    stream: bool | None = None
    stop_sequences: Annotated[list[NonEmpty], Field(max_length=64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None


def routes(service: Service) -> list[Route]:
    """Return the routes."""
    return [
        Route("/v1/messages", partial(messages, service), methods=["POST"]),
        Route("/v1/messages/count_tokens", partial(count_tokens, service), methods=["POST"]),
    ]


async def messages(service: Service, request: Request) -> Response:
    """Answer a conversation."""
    body = await read_body(request, MessagesBody)
    given: dict[str, Any] = {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}
    turn = turn_of(
        body,
        max_tokens=body.max_tokens,
        stop=tuple(body.stop_sequences or ()),
        sampling=Sampling(**{name: value for name, value in given.items() if value is not None}),
    )
    answer = await turn.submit(service)
    head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": service.name}
    if body.stream:
        events = _streamed(answer, head, body.max_tokens)
        return EventStream(service, [answer.ticket], events, keep_alive=_ping, failed=_failure)
    return JSONAnswer(await whole(service, request, [answer.ticket], _whole(answer, head, body.max_tokens)))


async def count_tokens(service: Service, request: Request) -> Response:
    """Tell how many tokens a conversation has."""
    turn = turn_of(await read_body(request, ConversationBody))
    quality_of(service, turn.model)  # refused, where there is no such model
    prompt = await turn.prompt(service)
    return JSONAnswer({"input_tokens": len(prompt.ids)})


def turn_of(body: ConversationBody, **generation: Any) -> Turn:
    """Return the turn that a body asks for.

    Args:
        body: the request's.
        generation: what else ``Turn`` is told.

    Raises:
        APIError: a tool's choice that is none of the tools.
    """
    told = messages_of(body)
    prefill = told.pop()["content"] if _is_text(told[-1], "assistant") and len(told) > 1 else ""
    tools, must_call = callable_tools(body)
    asked = body.output_format or (body.output_config and body.output_config.format)
    return Turn(
        messages=told,
        tools=tools,
        must_call=must_call,
        parallel=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
        schema=asked.schema_ if asked else None,
        prefill=prefill,
        thinks=body.thinking is not None and body.thinking.type != "disabled",
        model=None if (body.model or "").startswith(FOREIGN_NAMES) else body.model,
        kvp=body.kvp,
        **generation,
    )


def callable_tools(body: ConversationBody) -> tuple[list[Tool], bool]:
    """Return the tools that may be called, and whether one has to be.

    Raises:
        APIError: the choice is none of the tools.
    """
    choice = body.tool_choice or ToolChoice(type="auto")
    wanted = [
        tool
        for tool in body.tools or []
        if choice.type in ("auto", "any") or (choice.type == "tool" and tool.name == choice.name)
    ]
    if choice.type in ("any", "tool") and not wanted:
        raise APIError(400, "tool_choice: there is no such tool among the tools.")
    tools = [
        {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema} for tool in wanted
    ]
    return [{"type": "function", "function": tool} for tool in tools], choice.type in ("any", "tool")


def messages_of(body: ConversationBody) -> list[Message]:
    """Return the conversation as chat templates take it; neighbours of one role become one message."""
    told: list[Message] = []
    if system := _system(body):
        told.append({"role": "system", "content": system})
    for message in body.messages:
        for each in _template_messages(message):
            if told and _is_text(each, each["role"]) and _is_text(told[-1], each["role"]):
                told[-1] = {**told[-1], "content": f"{told[-1]['content']}\n\n{each['content']}"}
            else:
                told.append(each)
    return told


def _is_text(message: Message, role: str) -> bool:
    return message.keys() == {"role", "content"} and message["role"] == role


def _system(body: ConversationBody) -> str:
    if isinstance(body.system, str):
        return body.system
    return "\n\n".join(block.text for block in body.system or [] if not block.text.startswith(BILLING_HEADER))


def _template_messages(message: InputMessage) -> list[Message]:
    """Return one message as those of chat templates: results first, as tools' own messages."""
    blocks = message.blocks
    results: list[Message] = [
        {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content)}
        for block in blocks
        if isinstance(block, ToolResultBlock)
    ]
    texts = [block.text for block in blocks if isinstance(block, TextBlock | DocumentBlock)]
    told: Message = {"role": message.role, "content": "\n\n".join(texts)}
    if thoughts := "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)):
        told["reasoning_content"] = thoughts
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    if calls:
        told["tool_calls"] = calls
    return results if results and not texts else [*results, told]


def _text(content: str | list[Readable]) -> str:
    return content if isinstance(content, str) else "\n\n".join(block.text for block in content)


class Content:
    """The content blocks of an answer, as they come.

    Attributes:
        blocks: so far.
    """

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []

    def add(self, part: Part) -> list[Event]:
        """Take the next part; returns the events that tell of it."""
        match part:
            case Text():
                return self._extend({"type": "text", "text": ""}, "text", part.text)
            case Reasoning():
                return self._extend({"type": "thinking", "thinking": "", "signature": ""}, "thinking", part.text)
            case ToolCall():
                block = {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
                events = [*self.close(), self._open(block)]
                block["input"] = from_json(part.arguments)
                return [*events, self._delta({"type": "input_json_delta", "partial_json": part.arguments})]

    def close(self) -> list[Event]:
        """Return the event that ends the last block."""
        return [_event("content_block_stop", index=len(self.blocks) - 1)] if self.blocks else []

    def _extend(self, empty: dict[str, Any], name: str, text: str) -> list[Event]:
        events: list[Event] = []
        if not self.blocks or self.blocks[-1]["type"] != empty["type"]:
            events = [*self.close(), self._open(empty)]
        self.blocks[-1][name] += text
        return [*events, self._delta({"type": f"{name}_delta", name: text})]

    def _open(self, block: dict[str, Any]) -> Event:
        self.blocks.append(block)
        return _event("content_block_start", index=len(self.blocks) - 1, content_block=dict(block))

    def _delta(self, delta: dict[str, Any]) -> Event:
        return _event("content_block_delta", index=len(self.blocks) - 1, delta=delta)


def _event(kind: str, **fields: Any) -> Event:
    return kind, {"type": kind, **fields}


async def _events(answer: Answer, head: dict[str, Any], max_tokens: int) -> AsyncIterator[Event]:
    begun = {"input_tokens": answer.prompt_tokens, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    message = {
        **head,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**begun, "output_tokens": 0},
    }
    yield _event("message_start", message=message)
    content = Content()
    async for part in answer.parts():
        if isinstance(part, Finished):
            for event in content.close():
                yield event
            yield _event("message_delta", delta=_ending(answer, part, max_tokens), usage=_usage(part.usage))
        else:
            for event in content.add(part):
                yield event
    yield _event("message_stop")


async def _streamed(answer: Answer, head: dict[str, Any], max_tokens: int) -> AsyncIterator[bytes]:
    async for kind, data in _events(answer, head, max_tokens):
        yield server_event(data, kind)


async def _whole(answer: Answer, head: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    content, message = Content(), dict(head)
    async for part in answer.parts():
        if isinstance(part, Finished):
            message |= {"content": content.blocks, **_ending(answer, part, max_tokens), "usage": _usage(part.usage)}
        else:
            content.add(part)
    return message


def _ending(answer: Answer, finished: Finished, max_tokens: int) -> dict[str, Any]:
    """Return why an answer ended."""
    if finished.reason == "length":
        is_full = finished.usage.completion_tokens < max_tokens
        return {"stop_reason": "model_context_window_exceeded" if is_full else "max_tokens", "stop_sequence": None}
    if finished.stop_text is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": finished.stop_text}
    return {"stop_reason": "tool_use" if answer.output.calls else "end_turn", "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "kvp": measured(usage),
    }


def _ping() -> bytes:
    return server_event({"type": "ping"}, "ping")


def _failure(error: APIError) -> bytes:
    return server_event(anthropic_error(error), "error")
