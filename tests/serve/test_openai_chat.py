"""``/v1/chat/completions`` as the ``openai`` package sees it, on a real server with tiny models."""

import asyncio
import itertools
import time
from collections import Counter
from typing import Any

import httpx
import mlx.core as mx
import numpy as np
import openai
import pytest
from mlx_lm.generate import generate_step
from support.chat_models import write_tool_model
from support.openai_chat import HARBOUR, ask
from support.serving import serving

from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.serve.service import Service


def steps(model: KVPModel, messages: list, count: int = 12, **changes: Any) -> list[tuple[int, mx.array]]:
    """Return greedy tokens and log-probabilities of mlx-lm's ``generate_step``, the logits changed by other code."""
    ids = model.text_tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    calls = itertools.count()

    def changed(tokens: mx.array, logits: mx.array) -> mx.array:
        called, row = next(calls), np.array(logits[0])
        generated = tokens.tolist()[-called:] if called else []
        for token, times in Counter(generated).items():
            row[token] -= changes.get("presence_penalty", 0) + times * changes.get("frequency_penalty", 0)
        for token in set((ids + generated)[-20:]):
            penalty = changes.get("repetition_penalty", 1)
            row[token] *= penalty if row[token] < 0 else 1 / penalty
        for token, bias in changes.get("logit_bias", {}).items():
            row[token] += bias
        return mx.array(row)[None]

    return list(generate_step(mx.array(ids), model.base, max_tokens=count, logits_processors=[changed]))


def text_of(model: KVPModel, tokens: list[int]) -> str:
    detokenizer = model.text_tokenizer.detokenizer
    for token in tokens:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return detokenizer.text


def test_an_answer_is_mlx_lms_own(client: openai.OpenAI, twin: KVPModel) -> None:
    expected = text_of(twin, [token for token, _ in steps(twin, HARBOUR)])
    answer = ask(client, extra_body={"kvp": {"path": "full"}})
    (choice,) = answer.choices
    assert choice.message.content == expected
    assert (choice.message.role, choice.finish_reason, choice.message.tool_calls) == ("assistant", "length", None)
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    ids = twin.text_tokenizer.apply_chat_template(HARBOUR, add_generation_prompt=True)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(ids), 12, len(ids) + 12)
    assert 0 <= usage.prompt_tokens_details.cached_tokens < len(ids)
    assert usage.kvp["path"] == "full"
    assert usage.kvp["predicted_tokens"] == usage.kvp["recomputed_tokens"] == 0
    assert usage.kvp["ttft_ms"] > 0
    assert usage.kvp["queue_ms"] >= 0


def test_a_stream_is_the_same_answer(client: openai.OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == 12
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in pieces)
    assert len({(chunk.id, chunk.created, chunk.object) for chunk in chunks}) == 1
    assert [chunk.choices[0].delta.role for chunk in pieces][:2] == ["assistant", None]
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.choices[0].message.content
    plain = list(ask(client, stream=True))
    assert all(chunk.choices for chunk in plain)


def test_the_sdk_accumulates_a_stream(client: openai.OpenAI) -> None:
    text = ask(client).choices[0].message.content
    with client.chat.completions.stream(model="tiny", messages=HARBOUR, stop=text[6:8]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == text[: text.index(text[6:8])]


def test_an_answer_ends_before_a_stop_text(client: openai.OpenAI) -> None:
    text = ask(client, max_tokens=30).choices[0].message.content
    stop = text[9:12]
    for stops in (stop, ["never written", stop]):
        (choice,) = ask(client, max_tokens=30, stop=stops).choices
        assert (choice.message.content, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_max_tokens_by_both_names(client: openai.OpenAI) -> None:
    assert ask(client, max_completion_tokens=3).usage.completion_tokens == 3
    assert ask(client, max_tokens=4).usage.completion_tokens == 4
    answer = ask(client, [{"role": "user", "content": "x " * 1000}], max_tokens=-1)
    assert answer.usage.total_tokens == 2048 or answer.choices[0].finish_reason == "stop"


def test_seeds_belong_to_requests(client: openai.OpenAI) -> None:
    def texts(**options: Any) -> list[str]:
        return [choice.message.content for choice in ask(client, temperature=1.0, **options).choices]

    assert texts(seed=7) == texts(seed=7) != texts(seed=8)
    two = texts(seed=7, n=2)
    assert two[0] != two[1]
    assert two == texts(seed=7, n=2)
    assert texts(seed=-(2**63)) == texts(seed=-(2**63))


def test_several_answers_to_one_prompt(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1.0, "max_tokens": 5, "logit_bias": {"2": -100}}  # no end
    answer = ask(client, **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 15
    assert answer.usage.prompt_tokens == ask(client).usage.prompt_tokens
    chunks = list(ask(client, **options, stream=True))
    for number in range(3):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == number]
        assert (mine[0].delta.role, mine[-1].finish_reason) == ("assistant", "length")


@pytest.mark.parametrize("options", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}, {"top_p": 0}])
def test_what_leaves_one_token_is_greedy(client: openai.OpenAI, options: dict[str, float]) -> None:
    narrowed = ask(client, temperature=1.0, extra_body=options).choices[0].message.content
    assert narrowed == ask(client).choices[0].message.content


@pytest.mark.parametrize(
    "options",
    [{"presence_penalty": 2.0}, {"frequency_penalty": 1.5}, {"repetition_penalty": 1.8}, {"logit_bias": True}],
)
def test_penalties_and_biases(client: openai.OpenAI, twin: KVPModel, options: dict[str, Any]) -> None:
    if "logit_bias" in options:
        options = {"logit_bias": {40: 3.0, 41: 2.5, 42: -100.0}}
    expected = text_of(twin, [token for token, _ in steps(twin, HARBOUR, 30, **options)])
    told = {**options, "logit_bias": {str(key): bias for key, bias in options.get("logit_bias", {}).items()}}
    assert ask(client, max_tokens=30, extra_body=told).choices[0].message.content == expected
    assert expected != ask(client, max_tokens=30).choices[0].message.content


def test_logprobs_whole_and_streamed(client: openai.OpenAI, twin: KVPModel) -> None:
    asked = [HARBOUR[1]]
    expected = steps(twin, asked)
    (choice,) = ask(client, asked, logprobs=True, top_logprobs=3).choices
    content = choice.logprobs.content
    assert len(content) == len(expected) == 12
    for each, (token, logprobs) in zip(content, expected, strict=True):
        best = sorted(logprobs.tolist(), reverse=True)[:3]
        assert each.logprob == pytest.approx(logprobs[token].item(), abs=1e-4)
        assert [top.logprob for top in each.top_logprobs] == pytest.approx(best, abs=1e-4)
        assert each.top_logprobs[0].token == each.token
    assert b"".join(bytes(each.bytes) for each in content).decode("utf-8", "replace") == choice.message.content
    streamed = [
        each
        for chunk in ask(client, asked, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for each in chunk.choices[0].logprobs.content
    ]
    assert [each.token for each in streamed] == [each.token for each in content]
    bare = ask(client, asked, logprobs=True).choices[0].logprobs.content
    assert len(bare) == 12
    assert all(each.top_logprobs == [] for each in bare)
    assert ask(client, asked).choices[0].logprobs is None


def test_progress_as_llama_server_tells_it(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "the keeper climbs the stairs " * 30}]
    chunks = list(ask(client, messages, stream=True, max_tokens=2, extra_body={"return_progress": True}))
    told = [chunk.prompt_progress for chunk in chunks if getattr(chunk, "prompt_progress", None)]
    assert told
    assert {name for each in told for name in each} == {"total", "cache", "processed", "time_ms"}
    assert all(each["cache"] <= each["processed"] <= each["total"] for each in told)
    assert [each["processed"] for each in told] == sorted(each["processed"] for each in told)
    assert not any(
        getattr(chunk, "prompt_progress", None) for chunk in ask(client, messages, stream=True, max_tokens=2)
    )


def test_the_next_turn_stands_on_the_last(client: openai.OpenAI) -> None:
    first = ask(client, [{"role": "user", "content": "the lighthouse stands at the end of the long mole"}])
    said = {"role": "assistant", "content": "The waves run over the stones."}
    more = [{"role": "user", "content": "the lighthouse stands at the end of the long mole"}, said, HARBOUR[1]]
    second = ask(client, more)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 6


def test_parts_of_content_are_one_text(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Who climbs "}, {"type": "text", "text": "the stairs?"}]
    told = [HARBOUR[0] | {"role": "developer"}, {"role": "user", "content": parts}]
    assert ask(client, told).choices[0].message.content == ask(client).choices[0].message.content


def test_models_names_choose_the_dial(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny:full", messages=HARBOUR, max_tokens=2)
    assert answer.usage.kvp["path"] == "full"
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4o", messages=HARBOUR)
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    assert "tiny" in error.value.message


def test_thoughts_are_told_apart(tmp_path) -> None:
    with serving(write_tool_model(tmp_path / "thinks", thinks_aloud=True)) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        thinking, plain = ask(client).choices[0].message, ask(client, reasoning_effort="none").choices[0].message
        assert thinking.content == ""
        assert thinking.reasoning_content
        assert plain.content
        assert not hasattr(plain, "reasoning_content")
        deltas = [chunk.choices[0].delta for chunk in ask(client, stream=True)]
        assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == thinking.reasoning_content
        told = ask(client, extra_body={"chat_template_kwargs": {"enable_thinking": False}}).choices[0].message
        assert told.content == plain.content


def test_many_at_once_and_one_that_goes_away(server: tuple[str, Service], client: openai.OpenAI) -> None:
    expected = ask(client).choices[0].message.content
    service = server[1]

    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0) as many:

            async def one() -> str:
                answer = await many.chat.completions.create(model="tiny", messages=HARBOUR, max_tokens=12)
                return answer.choices[0].message.content or ""

            async def streamed() -> str:
                stream = await many.chat.completions.create(model="tiny", messages=HARBOUR, max_tokens=12, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            async def gone() -> str:
                stream = await many.chat.completions.create(
                    model="tiny", messages=HARBOUR, max_tokens=1900, stream=True
                )
                async for _ in stream:
                    await stream.close()
                    break
                return expected

            return await asyncio.gather(one(), streamed(), gone(), one(), streamed(), gone())

    assert asyncio.run(talk()) == [expected] * 6
    until = time.monotonic() + 10
    while service.scheduler.statistics()["running"] and time.monotonic() < until:
        time.sleep(0.02)
    assert service.scheduler.statistics()["running"] == 0


USER = '{"role": "user", "content": "x"}'
BAD = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "no messages": "{}",
    "empty messages": '{"messages": []}',
    "a number for messages": '{"messages": 1}',
    "an unknown role": '{"messages": [{"role": "king", "content": "x"}]}',
    "no content": '{"messages": [{"role": "user"}]}',
    "a number for content": '{"messages": [{"role": "user", "content": 1}]}',
    "an image": '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]}',
    "audio": '{"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}',
    "a lone surrogate": '{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "bytes that are no UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "deep nesting": f'{{"messages": [{USER}], "tools": {"[" * 5000}{"]" * 5000}}}',
    "a result of no call": '{"messages": [{"role": "tool", "content": "x"}]}',
    "arguments that are no JSON": '{"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function",'
    ' "function": {"name": "f", "arguments": "{"}}]}]}',
    **{
        f"{name} {value}": f'{{"messages": [{USER}], "max_tokens": 1, "{name}": {value}}}'
        for name, value in [
            *(("temperature", value) for value in ("NaN", "-1", "1e400", '"1"', "true", "[]")),
            *(("max_tokens", value) for value in ("0", "-2", "1.5", "1" + "0" * 30, "1" + "0" * 5000, "null1")),
            *(("n", value) for value in ("0", "1000", "1.5")),
            *(
                ("logit_bias", value)
                for value in ('{"99999": 1}', '{"x": 1}', '{"1": 1000}', '{"-1": 1}', "[]", '{"1": NaN}')
            ),
            *(("stop", value) for value in ('""', "1", '[""]', str(["x"] * 40).replace("'", '"'))),
            *(("seed", value) for value in ("1.5", "1" + "0" * 30, '"x"')),
            *(("top_logprobs", value) for value in ("-1", "21")),
            *(
                ("tool_choice", value)
                for value in ('"required"', '"always"', '{"type": "function", "function": {"name": "f"}}')
            ),
            *(
                ("tools", value)
                for value in ("1", "[1]", '[{"type": "web_search"}]', '[{"type": "function", "function": {}}]')
            ),
            ("tools", '[{"type": "function", "function": {"name": "f", "parameters": {"minimum": NaN}}}]'),
            *(("response_format", value) for value in ('{"type": "xml"}', '{"type": "json_schema"}', "1")),
            ("response_format", '{"type": "json_schema", "json_schema": {"name": "x"}}'),
            ("response_format", '{"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}'),
            *(("kvp", value) for value in ('{"path": "x"}', '{"recompute": 2}', '{"speed": 1}', "1")),
            *(
                ("chat_template_kwargs", value)
                for value in ('{"tools": 1}', '{"chat_template": "x"}', '{"x": "<|im_end|>"}')
            ),
            *(("functions", "[]"), ("audio", "{}"), ("model", '"gpt-4o"'), ("model", "1"), ("stream", '"yes"')),
        ]
    },
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
def test_bad_bodies_are_refused_in_openais_shape(server: tuple[str, Service], body: str | bytes) -> None:
    response = httpx.post(f"{server[0]}/v1/chat/completions", content=body, timeout=30)
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 600
    assert "Value error" not in error["message"]
