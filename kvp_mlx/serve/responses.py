"""OpenAI's ``/v1/responses``: text and function calls. Nothing is stored, so a conversation comes whole every time."""

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..engine.prompt import Message
from .conversations import Tool
from .dials import KVPField, measured
from .errors import APIError
from .json_body import JSONAnswer, read_body
from .openai_fields import Fields, JSONObject, NonEmpty, max_tokens
from .output import Part, Reasoning, Text, ToolCall
from .requests import Finished, Sampling, Usage
from .service import Service
from .sse import EventStream, server_event, whole
from .turn import Answer, Turn

TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
REFUSED = {
    "previous_response_id": "this server stores no responses; send the whole conversation as input",
    "conversation": "this server stores no conversations; send the whole conversation as input",
    "prompt": "this server stores no prompts; send instructions and input",
    "background": "this server answers at once; leave it out",
}
"""What would change the answer, and is not served here."""

Item = dict[str, Any]

NAMES = {Text: "output_text", Reasoning: "reasoning_text"}
ITEMS: dict[str, tuple[str, Item]] = {
    "output_text": ("msg", {"type": "message", "role": "assistant"}),
    "reasoning_text": ("rs", {"type": "reasoning", "summary": []}),
}
"""What parts are called, and of the items that hold them the beginning of the id and what they are."""


class ContentPart(Fields):
    """A part of an item's content."""

    type: str
    text: str | None = None


class InputItem(Fields):
    """A message, a call, what a call gave, or a thought."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ContentPart] | None = None
    summary: list[ContentPart] | None = None
    call_id: NonEmpty | None = None
    name: NonEmpty | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class FunctionTool(Fields):
    """A tool."""

    type: str
    name: NonEmpty | None = None
    description: str | None = None
    parameters: JSONObject | None = None
    strict: bool | None = None


class NamedFunction(Fields):
    """The function that a request insists on."""

    type: Literal["function"]
    name: str


class Format(Fields):
    """What the text looks like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: JSONObject | None = Field(None, alias="schema")


class TextConfig(Fields):
    """``text``."""

    format: Format | None = None


class ReasoningConfig(Fields):
    """``reasoning``."""

    effort: str | None = None


class ResponseBody(Fields):
    """The body of a request; what would change the answer and is not served here is refused by name."""

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    metadata: JSONObject | None = None
    previous_response_id: str | None = None
    conversation: str | JSONObject | None = None
    prompt: JSONObject | None = None
    background: bool | None = None
    kvp: KVPField | None = None


def routes(service: Service) -> list[Route]:
    """Return the route."""
    return [Route("/v1/responses", partial(responses, service), methods=["POST"])]


async def responses(service: Service, request: Request) -> Response:
    """Answer a conversation."""
    body = await read_body(request, ResponseBody)
    for name, reason in REFUSED.items():
        if getattr(body, name):
            raise APIError(400, f"{name}: {reason}.", param=name, code="unsupported_parameter")
    answer = await turn_of(service, body).submit(service)
    events = Events(head_of(service, body))
    stream = events.of(answer)
    if body.stream:
        encoded = (server_event(data, data["type"]) async for data in stream)
        return EventStream(service, [answer.ticket], encoded, keep_alive=events.keep_alive, failed=events.failure)
    return JSONAnswer(await whole(service, request, [answer.ticket], _last(stream)))


async def _last(stream: AsyncIterator[Item]) -> Item:
    last = {}
    async for last in stream:  # noqa: B007 - the last one is the answer
        pass
    return last["response"]


def head_of(service: Service, body: ResponseBody) -> Item:
    """Return what a response says of its request."""
    asked = body.model_dump(
        include={"instructions", "max_output_tokens", "metadata", "reasoning", "temperature", "top_p"}
    )
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {"format": {"type": "text"}}
    choice = body.tool_choice
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": service.name,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "text": text,
        "tool_choice": choice.model_dump() if isinstance(choice, NamedFunction) else choice or "auto",
        "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or []],
        "truncation": "disabled",
        "usage": None,
        **asked,
    }


def turn_of(service: Service, body: ResponseBody) -> Turn:
    """Return the turn that a body asks for.

    Raises:
        APIError: an item, a tool or a choice that is not served here.
    """
    tools, must_call = callable_tools(body)
    given: dict[str, Any] = {"temperature": body.temperature, "top_p": body.top_p}
    effort = body.reasoning.effort if body.reasoning else None
    return Turn(
        messages=messages_of(body),
        tools=tools,
        must_call=must_call,
        parallel=body.parallel_tool_calls is not False,
        schema=schema_of(body),
        thinks=None if effort is None else effort != "none",
        model=body.model,
        kvp=body.kvp,
        max_tokens=max_tokens(service, body.max_output_tokens),
        sampling=Sampling(**{name: value for name, value in given.items() if value is not None}),
    )


def schema_of(body: ResponseBody) -> JSONObject | None:
    """Return the JSON schema that the text follows.

    Raises:
        APIError: it is missing.
    """
    asked = body.text.format if body.text else None
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return {"type": "object"}
    if asked.schema_ is None:
        raise APIError(400, "text.format.schema: it is missing.", param="text.format.schema")
    return asked.schema_


def callable_tools(body: ResponseBody) -> tuple[list[Tool], bool]:
    """Return the tools that may be called, and whether one has to be.

    Raises:
        APIError: a tool that is no function, or a choice that is none of the tools.
    """
    for number, tool in enumerate(body.tools or []):
        if tool.type != "function" or tool.name is None:
            raise APIError(400, f"tools.{number}: only functions with a name are served here.", param="tools")
    choice = body.tool_choice
    wanted = [
        {
            "type": "function",
            "function": tool.model_dump(include={"name", "description", "parameters"}, exclude_none=True),
        }
        for tool in body.tools or []
        if choice != "none" and (not isinstance(choice, NamedFunction) or tool.name == choice.name)
    ]
    must_call = choice == "required" or isinstance(choice, NamedFunction)
    if must_call and not wanted:
        raise APIError(400, "tool_choice: there is no such function among the tools.", param="tool_choice")
    return wanted, must_call


def messages_of(body: ResponseBody) -> list[Message]:
    """Return the conversation as chat templates take it: thoughts, text and calls of one turn in one message.

    Raises:
        APIError: an item that is not served here.
    """
    items = [InputItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    told: list[Message] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    for number, item in enumerate(items):
        message = _template_message(item, f"input.{number}")
        if told and message["role"] == told[-1]["role"] == "assistant":
            told[-1] = _joined(told[-1], message)
        else:
            told.append(message)
    return told


def _joined(one: Message, other: Message) -> Message:
    """Return two messages of one assistant's turn as one."""
    joined: Message = {"role": "assistant", "content": "\n\n".join(filter(None, (one["content"], other["content"])))}
    if thoughts := one.get("reasoning_content", "") + other.get("reasoning_content", ""):
        joined["reasoning_content"] = thoughts
    if calls := [*one.get("tool_calls", []), *other.get("tool_calls", [])]:
        joined["tool_calls"] = calls
    return joined


def _template_message(item: InputItem, place: str) -> Message:
    match item.type:
        case "message" if item.role is not None:
            role = "system" if item.role == "developer" else item.role
            return {"role": role, "content": _text(item.content, f"{place}.content")}
        case "function_call" if item.call_id and item.name:
            function = {"name": item.name, "arguments": _arguments(item, place)}
            call = {"id": item.call_id, "type": "function", "function": function}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        case "function_call_output" if item.call_id:
            return {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output, f"{place}.output")}
        case "reasoning":
            thoughts = _text(item.content or item.summary or "", place)
            return {"role": "assistant", "content": "", "reasoning_content": thoughts}
    raise APIError(400, f"{place}: '{item.type[:40]}' is incomplete or not served here.", param=place)


def _text(content: str | list[ContentPart] | None, place: str) -> str:
    if isinstance(content, str):
        return content
    for part in content or []:
        if part.type not in TEXT_PARTS or part.text is None:
            kind = part.type[:40]
            raise APIError(400, f"{place}: '{kind}' is not served here; this model reads text alone.", param=place)
    if content is None:
        raise APIError(400, f"{place}: it is missing.", param=place)
    return "".join(part.text or "" for part in content)


def _arguments(item: InputItem, place: str) -> JSONObject:
    try:
        arguments = from_json(item.arguments or "{}", allow_inf_nan=False)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise APIError(400, f"{place}.arguments: they are no JSON object.", param=place)
    return arguments


@dataclass
class Events:
    """The events of one response, numbered as they come.

    Attributes:
        response: as it was at first.
    """

    response: Item
    _number: int = -1
    _items: list[Item] = field(default_factory=list)

    async def of(self, answer: Answer) -> AsyncIterator[Item]:
        """Yield an answer's events."""
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)
        async for part in answer.parts():
            for event in self._end(part, answer) if isinstance(part, Finished) else self._add(part):
                yield event

    def keep_alive(self) -> bytes:
        """Return an event that tells nothing new."""
        return self._encoded("response.in_progress", response=self.response)

    def failure(self, error: APIError) -> bytes:
        """Return the last event where something fails."""
        code = error.code if error.status == 429 else "server_error"
        failed = {"status": "failed", "error": {"code": code, "message": error.message}, "output": self._items}
        return self._encoded("response.failed", response=self.response | failed)

    def _encoded(self, kind: str, **fields: Any) -> bytes:
        return server_event(self._event(kind, **fields), kind)

    def _event(self, kind: str, **fields: Any) -> Item:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}

    def _of_item(self, kind: str, **fields: Any) -> Item:
        """Return an event of the last item."""
        index = len(self._items) - 1
        return self._event(kind, output_index=index, item_id=self._items[index]["id"], **fields)

    def _of_part(self, kind: str, **fields: Any) -> Item:
        """Return an event of the last item's text."""
        return self._of_item(kind, content_index=0, **fields)

    def _add(self, part: Part) -> list[Item]:
        if isinstance(part, ToolCall):
            return [*self._close("completed"), *self._call(part)]
        name = NAMES[type(part)]
        is_open = self._items and self._items[-1]["status"] == "in_progress"
        begun = [] if is_open and self._text["type"] == name else [*self._close("completed"), *self._open(name)]
        self._text["text"] += part.text
        return [*begun, self._of_part(f"response.{name}.delta", delta=part.text, logprobs=[])]

    @property
    def _text(self) -> Item:
        """The last item's part."""
        part: Item = self._items[-1]["content"][0]
        return part

    def _open(self, name: str) -> list[Item]:
        """Begin an item of text."""
        prefix, empty = ITEMS[name]
        item = {"id": _new_id(prefix), **empty, "status": "in_progress", "content": []}
        self._items.append(item)
        added = self._of_whole("response.output_item.added")
        part = {"type": name, "text": "", **({"annotations": [], "logprobs": []} if name == "output_text" else {})}
        self._items[-1] = {**item, "content": [part]}
        return [added, self._of_part("response.content_part.added", part=dict(part))]

    def _of_whole(self, kind: str) -> Item:
        return self._event(kind, output_index=len(self._items) - 1, item=self._items[-1])

    def _close(self, status: str) -> list[Item]:
        """End the item of text that is open."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return []
        part, self._items[-1]["status"] = self._text, status
        return [
            self._of_part(f"response.{part['type']}.done", text=part["text"], logprobs=[]),
            self._of_part("response.content_part.done", part=part),
            self._of_whole("response.output_item.done"),
        ]

    def _call(self, call: ToolCall) -> list[Item]:
        item = {"id": _new_id("fc"), "type": "function_call", "call_id": call.id, "name": call.name}
        self._items.append({**item, "arguments": "", "status": "in_progress"})
        added = self._of_whole("response.output_item.added")
        self._items[-1] = {**item, "arguments": call.arguments, "status": "completed"}
        return [
            added,
            self._of_item("response.function_call_arguments.delta", delta=call.arguments),
            self._of_item("response.function_call_arguments.done", name=call.name, arguments=call.arguments),
            self._of_whole("response.output_item.done"),
        ]

    def _end(self, finished: Finished, answer: Answer) -> list[Item]:
        is_cut = finished.reason == "length"
        status = "incomplete" if is_cut else "completed"
        closing = self._close(status)
        ending = {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self._items,
            "usage": _usage(finished.usage, answer.reasoning_tokens),
        }
        return [*closing, self._event(f"response.{status}", response=self.response | ending)]


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _usage(usage: Usage, reasoning_tokens: int) -> Item:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "kvp": measured(usage),
    }
