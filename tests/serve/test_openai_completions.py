"""``/v1/completions`` as the ``openai`` package sees it, on a real server with a tiny model."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from support.directories import write_llama
from support.serving import serving
from support.tiny import chat_tokenizer

from kvp_mlx.engine.prompt import encode_text
from kvp_mlx.serve.openai_answers import token_bytes, token_text
from kvp_mlx.serve.service import Service

TEXT = "The keeper climbs"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Service]]:
    with serving(write_llama(tmp_path_factory.mktemp("serve") / "model", max_position_embeddings=128)) as served:
        yield served


def complete(client: openai.OpenAI, prompt: Any = TEXT, **options: Any) -> Any:
    return client.completions.create(model="tiny", prompt=prompt, **options)


def test_text_goes_on_without_a_template(client: openai.OpenAI, server: tuple[str, Service]) -> None:
    answer = complete(client)
    ids = encode_text(server[1].model.text_tokenizer, TEXT)
    usage = answer.usage
    assert (answer.object, len(answer.choices)) == ("text_completion", 1)
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), 16)
    assert usage.kvp["path"] == "full"
    assert complete(client, ids).choices[0].text == answer.choices[0].text
    whole = complete(client, ids, max_tokens=-1).usage
    assert whole.total_tokens <= 128


def test_the_space_in_front_of_the_next_word_stays(client: openai.OpenAI, server: tuple[str, Service]) -> None:
    tokenizer = server[1].model.text_tokenizer
    word = next(token for token in encode_text(tokenizer, TEXT) if token_text(tokenizer, token).startswith(" "))
    told: dict[str, Any] = {"max_tokens": 2, "logit_bias": {str(word): 100}}
    assert complete(client, **told).choices[0].text == 2 * token_text(tokenizer, word)
    assert complete(client, **told, echo=True).choices[0].text == TEXT + 2 * token_text(tokenizer, word)


def test_a_stream_is_the_same_text(client: openai.OpenAI) -> None:
    *pieces, last = complete(client, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in pieces) == complete(client).choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert (last.choices, last.usage.completion_tokens) == ([], 16)


def test_several_prompts_and_answers(client: openai.OpenAI, server: tuple[str, Service]) -> None:
    prompts = [TEXT, "In winter"]
    answer = complete(client, prompts, n=2, seed=5, temperature=1.0, echo=True, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:2] for choice in answer.choices] == ["Th", "Th", "In", "In"]
    tokenizer = server[1].model.text_tokenizer
    assert answer.usage.prompt_tokens == sum(len(encode_text(tokenizer, text)) for text in prompts)
    assert answer.usage.completion_tokens == 16


def test_logprobs_in_columns(client: openai.OpenAI) -> None:
    (choice,) = complete(client, logprobs=2).choices
    table = choice.logprobs
    assert len(table.tokens) == len(table.token_logprobs) == len(table.top_logprobs) == len(table.text_offset) == 16
    for token, logprob, top in zip(table.tokens, table.token_logprobs, table.top_logprobs, strict=True):
        assert logprob <= 0
        assert token in top
        assert max(top.values()) == pytest.approx(logprob, abs=1e-4)
    assert all(len(top) == 2 for top in table.top_logprobs)
    assert table.text_offset[0] == 0
    for token, start, end in zip(table.tokens, table.text_offset, table.text_offset[1:], strict=False):
        assert end - start == (0 if token.startswith("bytes:") else len(token))
    chunks = [chunk.choices[0].logprobs for chunk in complete(client, logprobs=2, stream=True)]
    assert [token for each in chunks if each for token in each.tokens] == table.tokens
    assert [offset for each in chunks if each for offset in each.text_offset] == table.text_offset


@pytest.mark.parametrize(
    "options",
    [
        *({"prompt": prompt} for prompt in ("", [], [""], [99999], [[]], [1.5], "x" * 100_000, [TEXT] * 40, [TEXT, 1])),
        *({"suffix": "x"}, {"best_of": 3}, {"logprobs": 9}, {"echo": True, "logprobs": 1}, {"max_tokens": 0}),
        *({"model": "gpt-4o"}, {"prompt": "the keeper " * 200}),
    ],
    ids=lambda options: repr(options)[:50],
)
def test_bad_requests_are_refused(client: openai.OpenAI, options: dict[str, Any]) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as error:
        client.completions.create(**{"model": "tiny", "prompt": TEXT, **options})
    assert error.value.type in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize("prompt", ["the keeper " * 200, "x" * 100_000])
def test_too_long_a_prompt_is_told_in_the_words_that_clients_know(client: openai.OpenAI, prompt: str) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt is too long: ") as error:
        client.completions.create(model="tiny", prompt=prompt)
    assert error.value.code == "context_length_exceeded"


def test_more_answers_than_there_is_room_for_are_refused_at_once(
    client: openai.OpenAI, server: tuple[str, Service]
) -> None:
    before = server[1].scheduler.statistics()["requests"]
    with pytest.raises(openai.BadRequestError, match="asks for 256 answers"):
        client.completions.create(model="tiny", prompt=[TEXT] * 16, n=16)
    assert server[1].scheduler.statistics()["requests"] == before


def test_tokens_as_bytes_and_text(server: tuple[str, Service]) -> None:
    tokenizer = server[1].model.text_tokenizer
    for text in (TEXT, "é🙂\n", "<|im_end|>"):
        ids = encode_text(tokenizer, text)
        assert b"".join(token_bytes(tokenizer, token) for token in ids) == text.encode()
    (first, *_) = encode_text(tokenizer, "é")
    assert token_text(tokenizer, first) == "bytes:\\xc3"
    assert token_bytes(tokenizer, len(tokenizer) + 3) == b""
    words = chat_tokenizer()
    assert [token_text(words, token) for token in (0, 7, 500)] == ["<unk>", "w2", ""]
