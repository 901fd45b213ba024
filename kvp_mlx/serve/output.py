"""From generated text to what clients show apart: text, thoughts and tool calls, by mlx-lm's marks and parsers."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools

from .conversations import Tool, opens_thinking


@dataclass(frozen=True)
class Text:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """The next piece of the model's thoughts."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A whole call; ``arguments`` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


Part = Text | Reasoning | ToolCall
PARTS: dict[str, type[Text] | type[Reasoning]] = {"normal": Text, "reasoning": Reasoning}
"""By state of mlx-lm's machine; what is written in others (but ``tool``) is the format's own and shown to nobody."""
ON_OTHERS = {
    *("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "minProperties"),
    *("allOf", "anyOf", "oneOf", "not", "if", "$ref", "dependentRequired", "dependentSchemas"),
}
"""What in a JSON schema may have a say in properties that are not among its ``properties``."""


class Output:
    """Takes one answer's text apart as it comes.

    White space around thoughts and calls is dropped. What looks like a call and is none stays text.

    Attributes:
        calls: how many calls there were.

    Args:
        tokenizer: the model's.
        ids: the prompt's, which may end inside thoughts.
        tools: that may be called; without any, nothing is a call.
        is_call: the whole answer is one call in JSON (``call_schemas``), or other text if it calls none of the tools.
        parallel: take more than one call; those after the first are dropped otherwise.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        ids: list[int],
        tools: Sequence[Tool] = (),
        *,
        is_call: bool = False,
        parallel: bool = True,
    ):
        self.calls = 0
        self._format = _Format(tokenizer, has_tools=bool(tools), is_call=is_call)
        self._tools, self._parallel = list(tools), parallel
        self._names = {tool["function"]["name"] for tool in tools} if is_call else None
        machine = TextStateMachine() if is_call else make_text_state_machine(self._format)
        start = "reasoning" if opens_thinking(tokenizer, ids) else tokenizer.response_initial_state or "normal"
        self._state = machine.make_state("tool" if is_call else start)
        self._at = self._state[0]
        self._waiting = ""  # a call that has not ended, or white space that nothing has followed yet
        self._is_open = not (tokenizer.has_thinking or tools)  # a stretch of text or thoughts of which some was shown
        self._is_after_mark = self._at == "reasoning"

    @property
    def is_calling(self) -> bool:
        """Whether the text is inside a call, which is told when it is whole."""
        return self._at == "tool"

    def add(self, text: str) -> list[Part]:
        """Return what a piece of text adds."""
        self._state, segments = TextStateMachine.split(self._state, text)
        return [part for state, piece in segments for part in self._segment(state, piece)]

    def finish(self) -> list[Part]:
        """Return what was still waiting; the last thing to be called."""
        self._state, text, _ = TextStateMachine.flush(self._state)
        parts = self._segment(self._at, text)
        if self._at == "tool":
            return parts + self._called(is_cut=True)
        return parts if self._is_after_mark or not self._waiting else [*parts, Text(self._waiting)]

    def _segment(self, state: str, piece: str) -> list[Part]:
        parts: list[Part] = []
        if state != self._at:
            if self._at == "tool":
                parts = self._called()
            self._at, self._waiting, self._is_open, self._is_after_mark = state, "", False, True
        if state == "tool" or not self._is_open:
            piece, self._waiting = self._waiting + piece, ""
            if state == "tool" or not piece.strip():
                self._waiting = piece
                return parts
            piece = piece.lstrip() if self._is_after_mark else piece
            self._is_open = True
        if piece and state in PARTS:
            parts.append(PARTS[state](piece))
        return parts

    def _called(self, *, is_cut: bool = False) -> list[Part]:
        """Return the calls that the waiting text is; text as it was where it is none."""
        text, self._waiting = self._waiting, ""
        try:
            parsed = self._format.tool_parser(text, self._tools)
            calls = [_call(each) for each in (parsed if isinstance(parsed, list) else [parsed])]
            if not calls or (self._names is not None and calls[0].name not in self._names):
                raise ValueError("this is no call")
        except Exception:  # a parser meets whatever a model writes, and raises what it likes
            return [Text(self._format.tool_call_start + text + ("" if is_cut else self._format.tool_call_end))]
        if not self._parallel:
            calls = calls[: max(0, 1 - self.calls)]
        self.calls += len(calls)
        return list(calls)


def _call(parsed: dict[str, Any]) -> ToolCall:
    """Return what a parser found as a call.

    Raises:
        ValueError: it names no function, or its arguments are no object or no JSON.
    """
    name, arguments = parsed["name"], parsed.get("arguments", {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not (isinstance(name, str) and name and isinstance(arguments, dict)):
        raise ValueError("this is no call of a function")
    given = parsed.get("id")
    number = given if isinstance(given, str) and given else call_id()
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    (name + number + text).encode()  # half a character would be no JSON to a client
    return ToolCall(number, name, text)


def call_id() -> str:
    """Return a new id for a call; Mistral's templates take nine letters and digits, the others anything."""
    return uuid.uuid4().hex[:9]


def call_schemas(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return the JSON schema of a call of each tool."""
    return [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": _moved(
                    _closed(tool["function"].get("parameters") or {"type": "object"}), "/properties/arguments"
                ),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]


def _closed(schema: Any) -> Any:
    """Return a schema whose objects have no properties but those it names, where it says nothing of others.

    Small models that may add arguments of their own do so without end.
    """
    if not isinstance(schema, dict) or schema.keys() & ON_OTHERS:
        return schema
    closed, properties, required = dict(schema), schema.get("properties"), schema.get("required", [])
    if "items" in schema:
        closed["items"] = _closed(schema["items"])
    if isinstance(properties, dict):
        closed["properties"] = {name: _closed(child) for name, child in properties.items()}
        names_all = isinstance(required, list) and {*map(str, required)} <= properties.keys()
        closed["additionalProperties"] = not names_all
    return closed


def any_of(schemas: Sequence[dict[str, Any]]) -> str:
    """Return the JSON schema, as text, of what one of several describes."""
    if len(schemas) == 1:
        return json.dumps(schemas[0])
    return json.dumps({"anyOf": [_moved(schema, f"/anyOf/{number}") for number, schema in enumerate(schemas)]})


def _moved(schema: Any, place: str) -> Any:
    """Return a schema whose references into itself hold when it stands at a place of another."""
    if isinstance(schema, list):
        return [_moved(child, place) for child in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(child, place) for key, child in schema.items()}
    target = moved.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = f"#{place}{target[1:]}"
    return moved


class _Format:
    """A tokeniser as mlx-lm's state machine asks it, but with tools just where a request has some."""

    def __init__(self, tokenizer: TokenizerWrapper, *, has_tools: bool, is_call: bool):
        self._tokenizer, self.has_tool_calling = tokenizer, has_tools
        is_own = tokenizer.has_tool_calling and not is_call
        self.tool_call_start = "" if is_call else (tokenizer if is_own else json_tools).tool_call_start
        self.tool_call_end = "" if is_call else (tokenizer if is_own else json_tools).tool_call_end
        self.tool_parser = tokenizer.tool_parser if is_own else json_tools.parse_tool_call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
