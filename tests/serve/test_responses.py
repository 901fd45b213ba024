"""``/v1/responses`` as the ``openai`` package sees it, on a real server with tiny models."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from support.chat_models import write_tool_model
from support.serving import serving

from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.engine.reply import stream_generate
from kvp_mlx.serve.errors import APIError
from kvp_mlx.serve.output import Reasoning, Text, ToolCall
from kvp_mlx.serve.responses import Events, ResponseBody, callable_tools, messages_of, schema_of
from kvp_mlx.serve.service import Service

QUESTION = "Who climbs the stairs?"
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
TRIM = {"type": "function", "name": "trim", "description": "Trims.", "parameters": None}
CALLED = [
    {"role": "developer", "content": "Keep the light."},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
    {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Look first."}]},
    {"role": "assistant", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
    {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "look", "arguments": '{"at": "sea"}'},
    {"type": "function_call", "id": "fc_2", "call_id": "call_2", "name": "trim", "arguments": ""},
    {"type": "function_call_output", "call_id": "call_1", "output": "Waves."},
    {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "Done."}]},
    {"role": "user", "content": "And?"},
]


@pytest.fixture(scope="module")
def client(server: tuple[str, Service]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.responses.create(**{"model": "tiny", "input": QUESTION, "max_output_tokens": 12} | options)


def body(**fields: Any) -> ResponseBody:
    return ResponseBody.model_validate_json(json.dumps({"input": QUESTION, **fields}))


def test_an_answer_is_the_engines(client: openai.OpenAI, twin: KVPModel) -> None:
    messages = [{"role": "system", "content": "Keep the light."}, {"role": "user", "content": QUESTION}]
    ids = twin.text_tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    expected = "".join(piece.text for piece in stream_generate(twin, ids, prefill="full", max_tokens=12))
    answer = ask(client, model="tiny:full", instructions="Keep the light.", metadata={"a": "b"})
    (item,) = answer.output
    assert answer.output_text == expected
    assert (item.type, item.role, item.status) == ("message", "assistant", "incomplete")
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.model, answer.instructions, answer.metadata) == ("tiny", "Keep the light.", {"a": "b"})
    assert (answer.error, answer.tools, answer.tool_choice, answer.parallel_tool_calls) == (None, [], "auto", True)
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (len(ids), 12, len(ids) + 12)
    assert usage.input_tokens_details.cached_tokens < len(ids)
    assert usage.kvp["path"] == "full"


def test_a_stream_is_the_same_answer_in_the_apis_order(client: openai.OpenAI, server: tuple[str, Service]) -> None:
    answer = ask(client)
    asked = {"model": "tiny", "input": QUESTION, "max_output_tokens": 12, "stream": True}
    text = httpx.post(f"{server[0]}/v1/responses", json=asked, timeout=60).text
    events = [event.split("\n") for event in text.split("\n\n") if event]
    data = [json.loads(line.removeprefix("data: ")) for _, line in events]
    assert [name.removeprefix("event: ") for name, _ in events] == [each["type"] for each in data]
    assert [each["sequence_number"] for each in data] == list(range(len(data)))
    names = [each["type"].removeprefix("response.") for each in data]
    deltas = names.count("output_text.delta")
    assert names == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert deltas > 3
    assert "".join(each["delta"] for each in data if "delta" in each) == answer.output_text == data[-4]["text"]
    assert data[0]["response"]["status"] == "in_progress"
    assert data[-1]["response"]["output"] == [data[-2]["item"]]
    assert data[-1]["response"]["usage"]["output_tokens"] == 12


def test_the_sdk_accumulates_a_stream(client: openai.OpenAI) -> None:
    answer = ask(client)
    with client.responses.stream(model="tiny", input=QUESTION, max_output_tokens=12) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created"
    assert "response.output_text.delta" in kinds
    with client.responses.stream(model="tiny", input=QUESTION, max_output_tokens=12) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == answer.output_text


def test_a_conversation_as_templates_take_it() -> None:
    def call(number: int, name: str, arguments: dict) -> dict:
        return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}

    assert messages_of(body(input=CALLED, instructions="Be brief.")) == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Keep the light."},
        {"role": "user", "content": QUESTION},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Look first.",
            "tool_calls": [call(1, "look", {"at": "sea"}), call(2, "trim", {})],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Waves."},
        {"role": "tool", "tool_call_id": "call_2", "content": "Done."},
        {"role": "user", "content": "And?"},
    ]


def test_a_conversation_with_calls_is_answered(client: openai.OpenAI) -> None:
    answer = ask(client, input=CALLED, tools=[LOOK, TRIM])
    assert answer.usage.output_tokens == 12
    assert [tool.name for tool in answer.tools] == ["look", "trim"]
    assert answer.usage.input_tokens > ask(client, input=CALLED).usage.input_tokens


def test_what_may_be_called() -> None:
    def names(choice: Any) -> tuple[list[str], bool]:
        tools, must_call = callable_tools(body(tools=[LOOK, TRIM], tool_choice=choice))
        return [tool["function"]["name"] for tool in tools], must_call

    assert names("auto") == names(None) == (["look", "trim"], False)
    assert names("required") == (["look", "trim"], True)
    assert names("none") == ([], False)
    assert names({"type": "function", "name": "trim"}) == (["trim"], True)
    with pytest.raises(APIError, match="no such function"):
        names({"type": "function", "name": "other"})


def test_what_the_text_follows() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    assert schema_of(body(text={"format": asked})) == schema
    assert schema_of(body(text={"format": {"type": "json_object"}})) == {"type": "object"}
    assert schema_of(body(text={"format": {"type": "text"}, "verbosity": "low"})) is None
    with pytest.raises(APIError, match=r"text\.format\.schema"):
        schema_of(body(text={"format": {"type": "json_schema", "name": "a"}}))


def test_the_events_of_thoughts_text_and_calls() -> None:
    events = Events({"id": "resp_1", "output": []})
    parts = [Reasoning("a"), Reasoning("b"), Text("c"), ToolCall("1", "look", '{"at": "sea"}'), Text("d")]
    told = [event for part in parts for event in events._add(part)] + events._close("completed")
    assert [(each["type"].removeprefix("response."), each["output_index"]) for each in told] == [
        *(("output_item.added", 0), ("content_part.added", 0)),
        *[("reasoning_text.delta", 0)] * 2,
        *(("reasoning_text.done", 0), ("content_part.done", 0), ("output_item.done", 0)),
        *(("output_item.added", 1), ("content_part.added", 1), ("output_text.delta", 1)),
        *(("output_text.done", 1), ("content_part.done", 1), ("output_item.done", 1)),
        *(("output_item.added", 2), ("function_call_arguments.delta", 2)),
        *(("function_call_arguments.done", 2), ("output_item.done", 2)),
        *(("output_item.added", 3), ("content_part.added", 3), ("output_text.delta", 3)),
        *(("output_text.done", 3), ("content_part.done", 3), ("output_item.done", 3)),
    ]
    items = [each["item"] for each in told if each["type"] == "response.output_item.done"]
    assert [each["item"]["id"] for each in told if each["type"] == "response.output_item.added"] == [
        item["id"] for item in items
    ]
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call", "message"]
    assert items[0]["content"] == [{"type": "reasoning_text", "text": "ab"}]
    assert (items[2]["call_id"], items[2]["name"], items[2]["arguments"]) == ("1", "look", '{"at": "sea"}')
    assert {item["status"] for item in items} == {"completed"}
    assert [each["sequence_number"] for each in told] == list(range(len(told)))


def test_thoughts_are_an_item_of_their_own(tmp_path: Path) -> None:
    with serving(write_tool_model(tmp_path / "model", thinks_aloud=True)) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        answer = ask(client, reasoning={"effort": "low"})
        assert [item.type for item in answer.output] == ["reasoning"]
        assert answer.output[0].content[0].text
        assert answer.usage.output_tokens_details.reasoning_tokens > 5
        assert [item.type for item in ask(client, reasoning={"effort": "none"}).output] == ["message"]


@pytest.mark.parametrize(
    ("options", "error", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"max_output_tokens": 0}, openai.BadRequestError, "max_output_tokens"),
        ({"input": []}, openai.BadRequestError, "input"),
        ({"input": 5}, openai.BadRequestError, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, openai.BadRequestError, "input.0"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, openai.BadRequestError, "input.0"),
        (
            {"input": [{"type": "function_call", "call_id": "x", "name": "f", "arguments": "[]"}]},
            openai.BadRequestError,
            "input.0",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            openai.BadRequestError,
            "input.0.content",
        ),
        ({"previous_response_id": "resp_1"}, openai.BadRequestError, "previous_response_id"),
        ({"background": True}, openai.BadRequestError, "background"),
        ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "tools"),
        ({"extra_body": {"kvp": {"recompute": 2}}}, openai.BadRequestError, "kvp.recompute"),
        ({"input": "x " * 3000}, openai.BadRequestError, None),
    ],
)
def test_what_is_refused(options: dict, error: type[openai.APIStatusError], param: str | None, client: Any) -> None:
    with pytest.raises(error) as refused:
        ask(client, **options)
    assert refused.value.param == param
    assert refused.value.type in ("invalid_request_error", "not_found_error")


def test_a_call_that_has_to_be(client: openai.OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"at": {"enum": ["sea", "town"]}},
        "required": ["at"],
        "additionalProperties": False,
    }
    asked = {"tools": [{**LOOK, "parameters": parameters, "strict": True}], "tool_choice": "required"}
    answer = ask(client, **asked, max_output_tokens=60)
    (call,) = answer.output
    assert (call.type, call.name, answer.status) == ("function_call", "look", "completed")
    assert json.loads(call.arguments)["at"] in ("sea", "town")
    with client.responses.stream(model="tiny", input=QUESTION, max_output_tokens=60, **asked) as stream:
        (streamed,) = stream.get_final_response().output
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Waves."}
    turns = [{"role": "user", "content": QUESTION}, call.model_dump(exclude_none=True), result]
    assert ask(client, input=turns, tools=asked["tools"]).usage.output_tokens == 12


def test_a_schema_is_followed(client: openai.OpenAI) -> None:
    class Weather(pydantic.BaseModel):
        waves: bool

    answer = client.responses.parse(model="tiny", input=QUESTION, text_format=Weather, max_output_tokens=60)
    assert answer.output_parsed.waves in (True, False)
    assert answer.status == "completed"
