"""Calls of functions and answers by a schema, as the ``openai`` package sees them at ``/v1/chat/completions``."""

import json
from typing import Any

import openai
import pydantic
import pytest
from support.openai_chat import HARBOUR, ask
from support.serving import serving

LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks out.",
        "parameters": {
            "type": "object",
            "properties": {"at": {"enum": ["sea", "town"]}, "far": {"$ref": "#/$defs/Far"}},
            "required": ["at", "far"],
            "additionalProperties": False,
            "$defs": {"Far": {"type": "boolean"}},
        },
    },
}
TRIM = {"type": "function", "function": {"name": "trim", "parameters": {"type": "object", "maxProperties": 0}}}


class Weather(pydantic.BaseModel):
    waves: bool
    wind: bool


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_function_is_called(client: openai.OpenAI, stream: bool) -> None:
    choice = {"type": "function", "function": {"name": "look"}}
    options: dict[str, Any] = {"tools": [TRIM, LOOK], "tool_choice": choice, "max_tokens": 200}
    if stream:
        with client.chat.completions.stream(model="tiny", messages=HARBOUR, **options) as events:
            answer = events.get_final_completion()
    else:
        answer = ask(client, **options)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    (call,) = message.tool_calls
    assert (call.type, call.function.name) == ("function", "look")
    arguments = json.loads(call.function.arguments)
    assert arguments["at"] in ("sea", "town")
    assert isinstance(arguments["far"], bool)
    history = [*HARBOUR, message.model_dump(exclude_none=True)]
    history.append({"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "high waves"}]})
    after = ask(client, history, tools=[TRIM, LOOK])
    assert after.usage.prompt_tokens > ask(client, tools=[TRIM, LOOK]).usage.prompt_tokens + 20


def test_some_function_is_called_where_one_is_required(client: openai.OpenAI) -> None:
    for seed in range(4):
        answer = ask(client, tools=[TRIM, LOOK], tool_choice="required", max_tokens=200, temperature=1.0, seed=seed)
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name in ("look", "trim")
        if call.function.name == "trim":
            assert json.loads(call.function.arguments) == {}


def test_a_stream_shows_life_while_a_call_is_written(client: openai.OpenAI) -> None:
    chunks = list(ask(client, tools=[LOOK], tool_choice="required", max_tokens=200, stream=True))
    assert sum(bool(chunk.choices[0].delta.tool_calls) for chunk in chunks) == 1
    assert len(chunks) > 10


def test_a_call_that_is_cut_off_is_told_as_text(client: openai.OpenAI) -> None:
    (choice,) = ask(client, tools=[LOOK], tool_choice="required", max_tokens=4).choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert choice.message.content


def test_answers_by_a_schema(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="tiny", messages=HARBOUR, response_format=Weather, max_tokens=100, temperature=1.0, seed=1
    )
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    assert parsed.choices[0].finish_reason == "stop"
    both = ask(
        client,
        tools=[LOOK],
        response_format={"type": "json_schema", "json_schema": {"name": "w", "schema": Weather.model_json_schema()}},
        max_tokens=200,
    )
    message = both.choices[0].message
    assert message.tool_calls or Weather.model_validate_json(message.content)


def test_json_objects(client: openai.OpenAI) -> None:
    content = ask(client, response_format={"type": "json_object"}, max_tokens=20).choices[0].message.content
    assert content.lstrip().startswith("{")
    assert (
        "".join(
            chunk.choices[0].delta.content or ""
            for chunk in ask(client, response_format={"type": "json_object"}, max_tokens=20, stream=True)
        )
        == content
    )


def test_the_default_model_answers_and_calls() -> None:
    with serving("smollm2-135m") as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
        assert "Paris" in ask(client, question, max_tokens=20).choices[0].message.content
        messages = [{"role": "user", "content": "Look at the sea, please."}]
        (call,) = (
            ask(client, messages, tools=[LOOK], tool_choice="required", max_tokens=60).choices[0].message.tool_calls
        )
        assert json.loads(call.function.arguments)["at"] == "sea"
