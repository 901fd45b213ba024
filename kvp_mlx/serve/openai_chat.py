"""OpenAI's ``/v1/chat/completions``."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

from mlx_lm.tokenizer_utils import TokenizerWrapper
from pydantic import Field
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from ..engine.prompt import Message
from .conversations import Tool
from .errors import APIError
from .json_body import read_body
from .openai_answers import Answers, Kind, token_bytes, token_text
from .openai_fields import Fields, GenerationFields, JSONObject, MaxTokens, NonEmpty, max_tokens
from .output import Output, Part, Reasoning, Text, ToolCall
from .requests import Event, Finished, Progress
from .service import Service
from .turn import Turn

KIND = Kind("chatcmpl", "chat.completion", "chat.completion.chunk")
TEMPLATE_OWN = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
"""What no template argument may be called."""
TEMPLATE_WORD = Annotated[str, Field(pattern=r"^[\w.-]{0,64}$")]
"""Nothing that could open a turn."""


class ContentPart(Fields):
    """A part of a message's content."""

    type: str
    text: str | None = None


class CalledFunction(Fields):
    """What an assistant called."""

    name: NonEmpty
    arguments: str = ""


class CallMade(Fields):
    """A call in an assistant's message."""

    id: NonEmpty
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Fields):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallMade] | None = None
    tool_call_id: str | None = None


class Function(Fields):
    """A function that may be called."""

    name: NonEmpty
    description: str | None = None
    parameters: JSONObject | None = None


class FunctionTool(Fields):
    """A tool."""

    type: Literal["function"]
    function: Function


class NamedFunction(Fields):
    """The function that a request insists on."""

    name: str


class NamedTool(Fields):
    """The tool that a request insists on."""

    type: Literal["function"]
    function: NamedFunction


class JSONSchema(Fields):
    """``json_schema`` of a response format."""

    schema_: JSONObject | None = Field(None, alias="schema")


class ResponseFormat(Fields):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class ChatBody(GenerationFields):
    """The body of a request; what would change the answer and is not served here is refused by name."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: TEMPLATE_WORD | None = None
    chat_template_kwargs: dict[str, bool | int | TEMPLATE_WORD] | None = None
    functions: None = None
    function_call: None = None
    audio: None = None


def routes(service: Service) -> list[Route]:
    """Return the route."""
    return [Route("/v1/chat/completions", partial(chat_completions, service), methods=["POST"])]


async def chat_completions(service: Service, request: Request) -> Response:
    """Answer a conversation."""
    body = await read_body(request, ChatBody)
    samplings = [body.sampling(service, choice) for choice in range(body.choices)]
    answers = await turn_of(service, body).submit_all(service, samplings)
    tokenizer = service.model.text_tokenizer
    each = [ChatAnswer(number, tokenizer, answer.output) for number, answer in enumerate(answers)]
    return await Answers(service, body, KIND, [answer.ticket for answer in answers], each).response(request)


def turn_of(service: Service, body: ChatBody) -> Turn:
    """Return the turn that a body asks for.

    Raises:
        APIError: content, a choice, a format or a template's argument that is not served.
    """
    tools, must_call = callable_tools(body)
    return Turn(
        messages=[template_message(message, f"messages.{number}") for number, message in enumerate(body.messages)],
        tools=tools,
        must_call=must_call,
        parallel=body.parallel_tool_calls is not False,
        schema=schema_of(body),
        thinks=None if body.reasoning_effort is None else body.reasoning_effort != "none",
        template_arguments=template_arguments(body),
        model=body.model,
        kvp=body.kvp,
        max_tokens=max_tokens(service, body.max_completion_tokens or body.max_tokens),
        stop=body.stops,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        reuse=body.cache_prompt is not False,
    )


def callable_tools(body: ChatBody) -> tuple[list[Tool], bool]:
    """Return the tools that may be called, and whether one has to be.

    Raises:
        APIError: the choice is none of the tools.
    """
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    choice = body.tool_choice
    if choice is None or choice == "auto":
        return tools, False
    if choice == "none":
        return [], False
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
    if not tools:
        raise APIError(400, "tool_choice: no such function is among the tools.", param="tool_choice")
    return tools, True


def schema_of(body: ChatBody) -> dict[str, Any] | None:
    """Return the JSON schema that the text follows; None: it is free.

    Raises:
        APIError: it is missing.
    """
    asked = body.response_format
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return {"type": "object"}
    if asked.json_schema is None or asked.json_schema.schema_ is None:
        raise APIError(400, "response_format.json_schema.schema: it is missing.", param="response_format.json_schema")
    return asked.json_schema.schema_


def template_arguments(body: ChatBody) -> dict[str, Any]:
    """Return what a body gives its chat template beside messages and tools.

    Raises:
        APIError: what would change these.
    """
    arguments: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if own := TEMPLATE_OWN & arguments.keys():
        raise APIError(400, f"chat_template_kwargs: {min(own)} cannot be set.", param="chat_template_kwargs")
    if body.reasoning_effort is not None:
        arguments["reasoning_effort"] = body.reasoning_effort
    return arguments


def template_message(message: ChatMessage, place: str) -> Message:
    """Return a message as chat templates take it.

    Raises:
        APIError: content that is no text, arguments that are no JSON object, a result of no call.
    """
    role = "system" if message.role == "developer" else message.role
    told: Message = {"role": role, "content": text_of(message, f"{place}.content")}
    if role == "assistant" and message.reasoning_content:
        told["reasoning_content"] = message.reasoning_content
    if role == "assistant" and message.tool_calls:
        told["tool_calls"] = [_call_made(call, f"{place}.tool_calls") for call in message.tool_calls]
    if role == "tool":
        if not message.tool_call_id:
            raise APIError(400, f"{place}.tool_call_id: a tool's message says which call it answers.", param=place)
        told["tool_call_id"] = message.tool_call_id
    return told


def text_of(message: ChatMessage, place: str) -> str:
    """Return the text of a message's content, its parts joined.

    Raises:
        APIError: there is none, or a part that is no text.
    """
    if message.content is None and message.role != "assistant":
        raise APIError(400, f"{place}: a {message.role}'s message needs content.", param=place)
    if isinstance(message.content, str):
        return message.content
    for part in message.content or []:
        if part.type != "text" or part.text is None:
            kind = part.type[:40]
            raise APIError(
                400, f"{place}: '{kind}' is not served here, since this model reads text alone.", param=place
            )
    return "".join(part.text or "" for part in message.content or [])


def _call_made(call: CallMade, place: str) -> dict[str, Any]:
    try:
        arguments = from_json(call.function.arguments or "{}", allow_inf_nan=False)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise APIError(400, f"{place}: the arguments of {call.id[:40]} are no JSON object.", param=place)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


@dataclass
class ChatAnswer:
    """One of the answers, as it comes.

    Attributes:
        number: its index.
        tokenizer: the model's.
        output: takes its text apart.
    """

    number: int
    tokenizer: TokenizerWrapper
    output: Output
    _role: dict[str, Any] = field(default_factory=lambda: {"role": "assistant"})
    _calls: int = 0
    _logprobs: list[dict[str, Any]] = field(default_factory=list)

    def choices(self, event: Event) -> list[dict[str, Any]]:
        """See ``Answer``."""
        if isinstance(event, Progress):
            return []
        if isinstance(event, Finished):
            last = [self._choice(part) for part in self.output.finish()]
            is_calling = self._calls and event.reason == "stop"
            return [*last, self._choice(None, "tool_calls" if is_calling else event.reason)]
        if event.logprob is not None and event.token not in self.tokenizer.eos_token_ids:
            others = [_logprob(self.tokenizer, *pair) for pair in event.top]
            self._logprobs.append(_logprob(self.tokenizer, event.token, event.logprob) | {"top_logprobs": others})
        parts = self.output.add(event.text)
        if not parts and self.output.is_calling:  # clients that wait for chunks see that there is life
            return [self._choice(None)]
        return [self._choice(part) for part in parts]

    def nothing(self) -> dict[str, Any]:
        """See ``Answer``."""
        return {"index": self.number, "delta": {}, "logprobs": None, "finish_reason": None}

    def joined(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See ``Answer``."""
        deltas = [choice["delta"] for choice in choices]
        text, thoughts = ("".join(each.get(name, "") for each in deltas) for name in ("content", "reasoning_content"))
        calls = [call for each in deltas for call in each.get("tool_calls", [])]
        logprobs = [each for choice in choices if choice["logprobs"] for each in choice["logprobs"]["content"]]
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if thoughts:
            message["reasoning_content"] = thoughts
        if calls:
            message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
        told = {"content": logprobs, "refusal": None} if logprobs else None
        reason = choices[-1]["finish_reason"]
        return {"index": self.number, "message": message, "logprobs": told, "finish_reason": reason}

    def _choice(self, part: Part | None, reason: str | None = None) -> dict[str, Any]:
        delta, self._role = self._role | self._delta(part), {}
        logprobs, self._logprobs = self._logprobs, []
        told = {"content": logprobs, "refusal": None} if logprobs else None
        return self.nothing() | {"delta": delta, "logprobs": told, "finish_reason": reason}

    def _delta(self, part: Part | None) -> dict[str, Any]:
        match part:
            case Text():
                return {"content": part.text}
            case Reasoning():
                return {"reasoning_content": part.text}
            case ToolCall():
                self._calls += 1
                function = {"name": part.name, "arguments": part.arguments}
                call = {"index": self._calls - 1, "id": part.id, "type": "function", "function": function}
                return {"tool_calls": [call]}
        return {}


def _logprob(tokenizer: TokenizerWrapper, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, token),
        "logprob": logprob,
        "bytes": list(token_bytes(tokenizer, token)),
    }
