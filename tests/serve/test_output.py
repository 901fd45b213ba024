"""Answers are taken apart as mlx-lm's parsers know the formats, however the text is cut into pieces."""

import importlib
import json

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support.tiny import chat_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvp_mlx.serve.output import Output, Part, Text, ToolCall, any_of, call_schemas

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
EXPECTED = [("get_weather", {"city": "Bonn", "days": 2})]
FORMATS = {
    "json_tools": '\n{"name": "get_weather", "arguments": {"city": "Bonn", "days": 2}}\n',
    "qwen3_coder": "\n<function=get_weather>\n<parameter=city>\nBonn\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "</function>\n",
    "glm47": "get_weather<arg_key>city</arg_key><arg_value>Bonn</arg_value><arg_key>days</arg_key>"
    "<arg_value>2</arg_value>",
    "longcat": "get_weather<longcat_arg_key>city</longcat_arg_key><longcat_arg_value>Bonn</longcat_arg_value>"
    "<longcat_arg_key>days</longcat_arg_key><longcat_arg_value>2</longcat_arg_value>",
    "mistral": 'get_weather[ARGS]{"city": "Bonn", "days": 2}',
    "pythonic": '[get_weather(city="Bonn", days=2)]',
    "kimi_k2": '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Bonn", "days": 2}'
    "<|tool_call_end|>",
    "kimi_k3": '<|open|>call tool="get_weather" index="1"<|sep|><|open|>argument key="city" type="string"<|sep|>Bonn'
    '<|close|>argument<|sep|><|open|>argument key="days" type="integer"<|sep|>2<|close|>argument<|sep|>'
    "<|close|>call<|sep|>",
    "gemma4": 'call:get_weather{city:<|"|>Bonn<|"|>,days:2}',
    "function_gemma": "call:get_weather{city:<escape>Bonn<escape>,days:2}",
    "minimax_m2": '<invoke name="get_weather"><parameter name="city">Bonn</parameter>'
    '<parameter name="days">2</parameter></invoke>',
    "minicpm5": '"get_weather"><param name="city">Bonn</param><param name="days">2</param>',
    "muse_spark": '<atem:invoke name="get_weather"><atem:parameter name="city">Bonn</atem:parameter>'
    '<atem:parameter name="days">2</atem:parameter></atem:invoke>',
}
"""What each of mlx-lm's parsers reads between its marks."""


def speaking(parser: str | None = None, *, thinks: bool = False) -> TokenizerWrapper:
    """Return a tokeniser that speaks a format of tool calls."""
    words = ["<unk>", "<end>", "x", *(["<think>", "</think>"] if thinks else [])]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    if parser is None:
        return TokenizerWrapper(fast)
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    marks = {name: getattr(module, name) for name in ("tool_call_start", "tool_call_end")}
    return TokenizerWrapper(fast, tool_parser=module.parse_tool_call, **marks)


def taken_apart(output: Output, text: str, size: int) -> list[Part]:
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    return [part for piece in pieces for part in output.add(piece)] + output.finish()


def joined(parts: list[Part]) -> list[tuple[str, object]]:
    """Return kinds and texts, pieces of one stretch joined."""
    told: list[tuple[str, object]] = []
    for part in parts:
        if isinstance(part, ToolCall):
            told.append((part.name, json.loads(part.arguments)))
        elif told and told[-1][0] == type(part).__name__:
            told[-1] = (told[-1][0], told[-1][1] + part.text)
        else:
            told.append((type(part).__name__, part.text))
    return told


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
@pytest.mark.parametrize("parser", FORMATS)
def test_every_format_of_tool_calls(parser: str, size: int) -> None:
    tokenizer = speaking(parser)
    call = f"{tokenizer.tool_call_start}{FORMATS[parser]}{tokenizer.tool_call_end}"
    output = Output(tokenizer, [2], [WEATHER])
    assert joined(taken_apart(output, f"I look it up. \n{call}", size)) == [("Text", "I look it up. \n"), *EXPECTED]
    assert output.calls == 1


def test_all_parsers_that_mlx_lm_has_are_known_here() -> None:
    import mlx_lm.tool_parsers as parsers

    names = {entry.stem for entry in importlib.resources.files(parsers).iterdir() if entry.suffix == ".py"}
    assert names - {"__init__", "laguna"} == set(FORMATS)  # laguna is glm47


@pytest.mark.parametrize("size", [1, 4, 10_000])
def test_thoughts_text_and_several_calls(size: int) -> None:
    call = f"<tool_call>{FORMATS['json_tools']}</tool_call>"
    text = f"<think>\nHm, 1 < 2.\n</think>\n\nFirst:\n{call}\n{call}\n"
    parts = taken_apart(Output(speaking("json_tools", thinks=True), [2], [WEATHER]), text, size)
    assert joined(parts) == [("Reasoning", "Hm, 1 < 2.\n"), ("Text", "First:\n"), *EXPECTED, *EXPECTED]
    ids = [part.id for part in parts if isinstance(part, ToolCall)]
    assert len(set(ids)) == 2
    assert all(len(number) == 9 and number.isalnum() for number in ids)


def test_a_prompt_may_end_inside_thoughts() -> None:
    tokenizer = speaking(thinks=True)
    opened = tokenizer.encode("x <think>")
    assert joined(taken_apart(Output(tokenizer, opened), "Hm</think>Yes", 2)) == [("Reasoning", "Hm"), ("Text", "Yes")]
    closed = tokenizer.encode("<think> x </think>")
    assert joined(taken_apart(Output(tokenizer, closed), "Hm. Yes", 2)) == [("Text", "Hm. Yes")]


def test_plain_text_stays_as_it_is_and_comes_at_once() -> None:
    output = Output(chat_tokenizer(), [0])
    pieces = ["\n", "  <tool_call>{}", "</tool", "_call> <think>", ""]
    assert [output.add(piece) for piece in pieces] == [[Text(piece)] if piece else [] for piece in pieces]
    assert output.finish() == []


def test_white_space_alone_is_text_where_nothing_else_follows() -> None:
    assert joined(taken_apart(Output(speaking("json_tools"), [2], [WEATHER]), " \n", 1)) == [("Text", " \n")]
    assert taken_apart(Output(speaking("json_tools", thinks=True), [2]), "<think>x</think> \n", 1)[1:] == []


@pytest.mark.parametrize(
    "inside",
    [
        *("", "no JSON", "[]", "[1]", "{}", '{"name": 1}', '{"name": "f", "arguments": "x"}'),
        *('{"name": "f", "arguments": {"t": "\\ud83d"}}', '{"name": "f", "arguments": {"x": NaN}}'),
        *('{"name": "f", "arguments": [1]}', "[" * 100_000, '{"name": "f", "arguments": ' + '{"a":' * 5000),
    ],
)
def test_what_is_no_call_stays_text(inside: str) -> None:
    output = Output(speaking("json_tools"), [2], [WEATHER])
    parts = taken_apart(output, f"a<tool_call>{inside}</tool_call>b", 1000)
    assert joined(parts) == [("Text", f"a<tool_call>{inside}</tool_call>b")]
    assert output.calls == 0


@pytest.mark.parametrize("parser", FORMATS)
def test_no_format_stumbles_over_nonsense(parser: str) -> None:
    tokenizer = speaking(parser)
    for inside in ("", "x", "{", "[", "<", "call:f{a", '"', FORMATS[parser][:-9]):
        output = Output(tokenizer, [2], [WEATHER])
        parts = taken_apart(output, f"{tokenizer.tool_call_start}{inside}", 5)
        assert output.calls or "".join(part.text for part in parts).endswith(inside)


def test_without_tools_nothing_is_a_call() -> None:
    text = f"<tool_call>{FORMATS['json_tools']}</tool_call>"
    assert joined(taken_apart(Output(speaking("json_tools"), [2]), text, 4)) == [("Text", text)]


def test_only_the_first_of_parallel_calls_where_one_is_wanted() -> None:
    call = f"<tool_call>{FORMATS['json_tools']}</tool_call>"
    assert joined(taken_apart(Output(speaking("json_tools"), [2], [WEATHER], parallel=False), call * 3, 9)) == EXPECTED


def test_models_without_a_format_call_in_plain_json() -> None:
    text = f"<tool_call>{FORMATS['json_tools']}</tool_call>"
    assert joined(taken_apart(Output(speaking(), [2], [WEATHER]), text, 4)) == EXPECTED


def test_a_whole_answer_in_json_may_be_a_call() -> None:
    def told(text: str) -> list[tuple[str, object]]:
        return joined(taken_apart(Output(speaking("qwen3_coder"), [2], [WEATHER], is_call=True), text, 3))

    assert told('{"name": "get_weather", "arguments": {"city": "</tool_call>"}}') == [
        ("get_weather", {"city": "</tool_call>"})
    ]
    for text in ('{"name": "Ada", "arguments": {}}', '{"answer": 42}', '{"name": "get_weather", "argu'):
        assert told(text) == [("Text", text)]


def test_a_call_has_no_arguments_but_those_that_its_schema_names() -> None:
    def arguments(parameters: dict | None) -> dict:
        (schema,) = call_schemas([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
        return schema["properties"]["arguments"]

    place = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    told = arguments({"type": "object", "properties": {"place": place, "all": {"type": "array", "items": place}}})
    shut = place | {"additionalProperties": False}
    assert told == {
        "type": "object",
        "properties": {"place": shut, "all": {"type": "array", "items": shut}},
        "additionalProperties": False,
    }
    assert arguments(None) == {"type": "object"}
    for more in ({"additionalProperties": {}}, {"patternProperties": {"x": {}}}, {"allOf": [place]}):
        assert arguments(place | more) == place | more
    for required in (["city", "other"], 1, None):
        assert arguments(place | {"required": required})["additionalProperties"] is True


def test_references_follow_a_schema_to_its_place() -> None:
    parameters = {"properties": {"n": {"$ref": "#/$defs/N"}, "all": {"$ref": "#"}}, "$defs": {"N": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    (alone,) = call_schemas([tool])
    assert alone["properties"]["arguments"]["properties"] == {
        "n": {"$ref": "#/properties/arguments/$defs/N"},
        "all": {"$ref": "#/properties/arguments"},
    }
    assert json.loads(any_of([alone])) == alone
    both = json.loads(any_of([{"type": "null"}, alone]))
    place = both["anyOf"][1]["properties"]["arguments"]["properties"]["n"]["$ref"].removeprefix("#/").split("/")
    for step in place:
        both = both[int(step)] if isinstance(both, list) else both[step]
    assert both == {"type": "integer"}
