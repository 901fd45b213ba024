"""``/v1/messages`` as the ``anthropic`` package sees it, on a real server with tiny models."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from support.chat_models import write_tool_model
from support.serving import serving

from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.engine.reply import stream_generate
from kvp_mlx.serve.anthropic import Content, MessagesBody, turn_of
from kvp_mlx.serve.openai_answers import token_bytes
from kvp_mlx.serve.output import Reasoning, Text, ToolCall
from kvp_mlx.serve.service import Service

HARBOUR = [{"role": "user", "content": "Who climbs the stairs?"}]
SCHEMA = {
    "type": "object",
    "properties": {"at": {"enum": ["sea", "town"]}},
    "required": ["at"],
    "additionalProperties": False,
}
LOOK = {"name": "look", "description": "Looks out.", "input_schema": SCHEMA}
TRIM = {"name": "trim", "input_schema": {"type": "object", "additionalProperties": False}}
CALLED = [
    *HARBOUR,
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Look first.", "signature": ""},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "call_1", "name": "look", "input": {"at": "sea"}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "Waves."}]},
            {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}},
        ],
    },
]


@pytest.fixture(scope="module")
def client(server: tuple[str, Service]) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server[0], api_key="any", max_retries=0, timeout=60) as client:
        yield client


def ask(client: anthropic.Anthropic, messages: list = HARBOUR, **options: Any) -> Any:
    return client.messages.create(**{"model": "tiny", "max_tokens": 12, "messages": messages} | options)


def text_after(model: KVPModel, ids: list[int], max_tokens: int = 12) -> str:
    """Return what the engine generates after a prompt."""
    return "".join(piece.text for piece in stream_generate(model, ids, prefill="full", max_tokens=max_tokens))


def on_the_wire(url: str, **body: Any) -> list[tuple[str, dict]]:
    """Return the names and data of a stream's events."""
    body = {"model": "tiny", "max_tokens": 4, "messages": HARBOUR, "stream": True, **body}
    text = httpx.post(f"{url}/v1/messages", json=body, timeout=60).text
    events = [event.split("\n") for event in text.split("\n\n") if event]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in events]


def turn(messages: list = HARBOUR, **fields: Any):
    return turn_of(MessagesBody.model_validate_json(json.dumps({"max_tokens": 1, "messages": messages, **fields})))


def test_an_answer_is_the_engines(client: anthropic.Anthropic, twin: KVPModel) -> None:
    ids = twin.text_tokenizer.apply_chat_template(HARBOUR, add_generation_prompt=True)
    answer = ask(client, model="tiny:full")
    (block,) = answer.content
    assert (block.type, block.text) == ("text", text_after(twin, ids))
    assert (answer.role, answer.type, answer.model) == ("assistant", "message", "tiny")
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == len(ids)
    assert usage.output_tokens == 12
    assert usage.kvp["path"] == "full"
    again = ask(client, model="tiny:full")
    assert again.usage.cache_read_input_tokens > 0
    assert again.content == answer.content
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == len(ids)


def test_a_stream_is_the_same_answer_in_the_apis_order(
    client: anthropic.Anthropic, server: tuple[str, Service]
) -> None:
    answer = ask(client, max_tokens=4)
    events = on_the_wire(server[0])
    assert all(name == data["type"] for name, data in events)
    names = [name for name, _ in events if name != "ping"]
    deltas = names.count("content_block_delta")
    middle = ["content_block_start", *["content_block_delta"] * deltas, "content_block_stop"]
    assert names == ["message_start", *middle, "message_delta", "message_stop"]
    data = dict(events)
    started = data["message_start"]["message"]
    assert (started["content"], started["stop_reason"], started["usage"]["output_tokens"]) == ([], None, 0)
    assert started["usage"]["input_tokens"] == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    text = "".join(each["delta"]["text"] for name, each in events if name == "content_block_delta")
    assert text == answer.content[0].text
    ending = data["message_delta"]
    assert ending["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert ending["usage"]["output_tokens"] == 4
    assert ending["usage"]["kvp"]["path"] == "full"


def test_the_sdk_accumulates_a_stream(client: anthropic.Anthropic) -> None:
    answer = ask(client)
    options = {"model": "tiny", "max_tokens": 12, "messages": HARBOUR}
    with client.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == answer.content[0].text
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 12)
    read = final.usage.input_tokens + final.usage.cache_read_input_tokens
    assert read == answer.usage.input_tokens + answer.usage.cache_read_input_tokens


def test_an_answer_ends_before_a_stop_sequence(client: anthropic.Anthropic) -> None:
    text = ask(client).content[0].text
    stop = text[5:7]
    answer = ask(client, stop_sequences=["never written", stop])
    assert "".join(block.text for block in answer.content) == text[: text.index(stop)]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)


def test_an_answer_that_is_begun_goes_on(client: anthropic.Anthropic, twin: KVPModel) -> None:
    begun = [*HARBOUR, {"role": "assistant", "content": "The keeper"}]
    tokenizer = twin.text_tokenizer
    ids = tokenizer.apply_chat_template(HARBOUR, add_generation_prompt=True)
    ids += tokenizer.encode("The keeper", add_special_tokens=False)
    tokens = [piece.token for piece in stream_generate(twin, ids, prefill="full", max_tokens=12)]
    written = [token_bytes(tokenizer, token) for token in tokens if token not in tokenizer.eos_token_ids]
    expected = b"".join(written)  # a space in front and all
    assert ask(client, begun, model="tiny:full").content[0].text == expected.decode(errors="replace")
    assert client.messages.count_tokens(model="tiny", messages=begun).input_tokens == len(ids)


def test_tokens_are_counted_as_they_are_read(client: anthropic.Anthropic) -> None:
    asked = {"messages": CALLED, "system": "Keep the light.", "tools": [LOOK, TRIM]}
    usage = ask(client, **asked).usage
    counted = client.messages.count_tokens(model="tiny", **asked).input_tokens
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    blocks = [{"type": "text", "text": "Keep the light.", "cache_control": {"type": "ephemeral"}}]
    assert client.messages.count_tokens(model="tiny", **{**asked, "system": blocks}).input_tokens == counted
    assert client.messages.count_tokens(model="tiny", messages=CALLED).input_tokens < counted
    with pytest.raises(anthropic.NotFoundError):
        client.messages.count_tokens(model="other", messages=CALLED)


def test_a_conversation_as_templates_take_it() -> None:
    told = turn(CALLED, system="Be brief.").messages
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": {"at": "sea"}}}
    assert told == [
        {"role": "system", "content": "Be brief."},
        *HARBOUR,
        {"role": "assistant", "content": "I look.", "reasoning_content": "Look first.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Waves."},
        {"role": "user", "content": "And?"},
    ]
    assert turn([*HARBOUR, {"role": "user", "content": "And where?"}]).messages == [
        {"role": "user", "content": "Who climbs the stairs?\n\nAnd where?"}
    ]
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Log."}}
    assert turn([{"role": "user", "content": [document]}]).messages[0]["content"] == "Log."


def test_a_line_that_is_new_with_every_request_is_not_read() -> None:
    def system(line: str) -> list:
        return [{"type": "text", "text": line}, {"type": "text", "text": "Keep the light."}]

    told = [turn(system=system(f"x-anthropic-billing-header: cch={number};")).messages for number in range(2)]
    assert told[0] == told[1] == turn(system="Keep the light.").messages


def test_what_may_be_called() -> None:
    def names(**choice: Any) -> tuple[list[str], bool, bool]:
        asked = turn(tools=[LOOK, TRIM], tool_choice=choice or None)
        return [tool["function"]["name"] for tool in asked.tools], asked.must_call, asked.parallel

    assert names() == (["look", "trim"], False, True)
    assert names(type="auto", disable_parallel_tool_use=True) == (["look", "trim"], False, False)
    assert names(type="any") == (["look", "trim"], True, True)
    assert names(type="tool", name="trim") == (["trim"], True, True)
    assert names(type="none") == ([], False, True)


def test_the_events_of_thoughts_text_and_calls() -> None:
    content = Content()
    parts = [Reasoning("a"), Reasoning("b"), Text("c"), ToolCall("1", "look", '{"at": "sea"}'), Text("d")]
    told = [data for part in parts for _, data in content.add(part)] + [data for _, data in content.close()]
    kinds = {"content_block_start": "start", "content_block_delta": "delta", "content_block_stop": "stop"}
    assert [(kinds[each["type"]], each["index"]) for each in told] == [
        *[("start", 0), ("delta", 0), ("delta", 0), ("stop", 0)],
        *[("start", 1), ("delta", 1), ("stop", 1)],
        *[("start", 2), ("delta", 2), ("stop", 2)],
        *[("start", 3), ("delta", 3), ("stop", 3)],
    ]
    assert [each["content_block"]["type"] for each in told if "content_block" in each] == [
        *("thinking", "text", "tool_use", "text")
    ]
    assert told[7]["content_block"] == {"type": "tool_use", "id": "1", "name": "look", "input": {}}
    assert told[8]["delta"] == {"type": "input_json_delta", "partial_json": '{"at": "sea"}'}
    assert content.blocks == [
        {"type": "thinking", "thinking": "ab", "signature": ""},
        {"type": "text", "text": "c"},
        {"type": "tool_use", "id": "1", "name": "look", "input": {"at": "sea"}},
        {"type": "text", "text": "d"},
    ]


def test_thoughts_come_where_they_are_wanted(tmp_path: Path) -> None:
    with serving(write_tool_model(tmp_path / "model", thinks_aloud=True)) as (url, _):
        client = anthropic.Anthropic(base_url=url, api_key="any", max_retries=0)
        answer = ask(client, thinking={"type": "enabled", "budget_tokens": 1024})
        assert [block.type for block in answer.content] == ["thinking"]
        assert [block.type for block in ask(client).content] == ["text"]
        assert [block.type for block in ask(client, thinking={"type": "disabled"}).content] == ["text"]
        with client.messages.stream(
            model="tiny", max_tokens=12, messages=HARBOUR, thinking={"type": "adaptive"}
        ) as stream:
            assert stream.get_final_message().content[0].thinking == answer.content[0].thinking


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"model": "other"}, anthropic.NotFoundError, "there is no such model"),
        ({"model": "tiny:slow"}, anthropic.NotFoundError, "there is no such model"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens: "),
        ({"extra_body": {"temperature": 1.5}}, anthropic.BadRequestError, "temperature: "),
        ({"messages": []}, anthropic.BadRequestError, "messages: "),
        ({"messages": [{"role": "user", "content": "x " * 3000}]}, anthropic.BadRequestError, "prompt is too long: "),
        ({"messages": [{"role": "user", "content": "x" * 99_999}]}, anthropic.BadRequestError, "prompt is too long: "),
        ({"tool_choice": {"type": "any"}}, anthropic.BadRequestError, "tool_choice: "),
        ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, anthropic.BadRequestError, "tools.0.type: "),
        ({"extra_body": {"kvp": {"path": "half"}}}, anthropic.BadRequestError, "kvp.path: "),
        ({"extra_body": {"kvp": {"speed": 9}}}, anthropic.BadRequestError, "kvp.speed: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]},
            anthropic.BadRequestError,
            "messages.0.content.0: ",
        ),
    ],
)
def test_what_is_refused(
    options: dict, error: type[anthropic.APIStatusError], told: str, client: anthropic.Anthropic
) -> None:
    with pytest.raises(error) as refused:
        ask(client, **options)
    assert refused.value.body["type"] == "error"
    assert refused.value.body["error"]["message"].startswith(told)


def test_other_names_that_its_clients_use(client: anthropic.Anthropic) -> None:
    assert ask(client, model="claude-haiku-4-5").model == "tiny"
    assert ask(client, model="default:exact").usage.kvp["path"] == "full"
    assert [model.id for model in client.models.list()] == [
        *("tiny", "tiny:full", "tiny:fast", "tiny:balanced", "tiny:exact")
    ]
    assert client.models.retrieve("tiny:fast").display_name == "tiny:fast"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "look"}])
def test_a_call_that_has_to_be(choice: dict, client: anthropic.Anthropic) -> None:
    asked = {"tools": [LOOK], "tool_choice": choice, "max_tokens": 60}
    answer = ask(client, **asked)
    (call,) = answer.content
    assert (call.type, call.name, answer.stop_reason) == ("tool_use", "look", "tool_use")
    assert call.input["at"] in ("sea", "town")
    with client.messages.stream(model="tiny", messages=HARBOUR, **asked) as stream:
        final = stream.get_final_message()
    assert [(block.type, block.input) for block in final.content] == [("tool_use", call.input)]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Waves."}
    turns = [*HARBOUR, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    assert ask(client, turns, tools=[LOOK], tool_choice={"type": "none"}).stop_reason == "max_tokens"


def test_a_schema_is_followed(client: anthropic.Anthropic) -> None:
    answer = ask(client, output_config={"format": {"type": "json_schema", "schema": SCHEMA}}, max_tokens=60)
    assert json.loads(answer.content[0].text)["at"] in ("sea", "town")
    assert answer.stop_reason == "end_turn"
