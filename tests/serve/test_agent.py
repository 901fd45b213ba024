"""An agent's session of 30 turns through the server: mlx-lm's own answers, and nothing is read twice.

``pytest -s`` prints for every turn how many tokens were new and how long they took beside a fresh prefill.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import anthropic
import mlx.core as mx
import openai
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import common_prefix_len
from support import agent
from support.serving import serving

from kvp_mlx.bundle.loading import load_any

pytestmark = pytest.mark.long
ANSWER_TOKENS = 8
FULL = {"kvp": {"path": "full"}, "temperature": 0}


@dataclass(frozen=True)
class Expected:
    """A request's prompt and mlx-lm's answer to it, alone on an empty cache."""

    messages: list[agent.Message]
    ids: list[int]
    tokens: list[int]
    text: str
    ttft_ms: float


@dataclass(frozen=True)
class Found:
    """What the server answered."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_ms: float


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return agent.write_agent_model(tmp_path_factory.mktemp("agent") / "model")


@pytest.fixture(scope="module")
def session(directory: Path) -> list[Expected]:
    model = load_any(str(directory))
    tokenizer, expected = model.text_tokenizer, []
    for messages in agent.requests():
        told = agent.template_messages(messages)
        ids = tokenizer.apply_chat_template(told, tools=agent.TOOLS, add_generation_prompt=True)
        start, times, tokens, detokenizer = time.perf_counter(), [], [], tokenizer.detokenizer
        for token, _ in generate_step(mx.array(ids), model.base, max_tokens=ANSWER_TOKENS):
            times.append(time.perf_counter())
            tokens.append(token)
            if token in tokenizer.eos_token_ids:
                break
            detokenizer.add_token(token)
        detokenizer.finalize()
        expected.append(Expected(messages, ids, tokens, detokenizer.text, 1e3 * (times[0] - start)))
    return expected


def ask_openai(url: str, messages: list[agent.Message]) -> Found:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=120) as client:
        answer = client.chat.completions.create(
            model="tiny",
            messages=agent.openai_messages(messages),
            tools=agent.TOOLS,
            max_tokens=ANSWER_TOKENS,
            extra_body=FULL,
        )
    usage = answer.usage
    cached = usage.prompt_tokens_details.cached_tokens
    ttft_ms = usage.kvp["ttft_ms"]
    return Found(answer.choices[0].message.content or "", usage.prompt_tokens, cached, usage.completion_tokens, ttft_ms)


def ask_anthropic(url: str, messages: list[agent.Message]) -> Found:
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0, timeout=120) as client:
        body = agent.anthropic_body(messages)
        answer = client.messages.create(model="tiny", max_tokens=ANSWER_TOKENS, extra_body=FULL, **body)
    usage, cached = answer.usage, answer.usage.cache_read_input_tokens
    text = "".join(block.text for block in answer.content)
    return Found(text, usage.input_tokens + cached, cached, usage.output_tokens, usage.kvp["ttft_ms"])


Ask = Callable[[str, list[agent.Message]], Found]
ASKS: dict[str, Ask] = {"chat completions": ask_openai, "messages": ask_anthropic}


@pytest.fixture
def url(directory: Path) -> Iterator[str]:
    """An empty server."""
    with serving(directory) as (url, _):
        yield url


def test_the_session_is_what_it_says(session: list[Expected]) -> None:
    assert len(session) == agent.TURNS
    lengths = [len(each.ids) for each in session]
    assert max(lengths) > 3000
    appended = [
        number
        for number, (before, after) in enumerate(itertools.pairwise(session), 2)
        if after.messages[: len(before.messages)] == before.messages
    ]
    assert set(range(2, 31)) - set(appended) == {agent.EDITED, agent.COMPACTED}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_every_turn_reads_what_is_new_and_answers_as_mlx_lm(ask: Ask, session: list[Expected], url: str) -> None:
    held: list[list[int]] = []
    read = 0
    for turn, expected in enumerate(session, 1):
        found = ask(url, expected.messages)
        assert found.text == expected.text, turn
        assert (found.prompt_tokens, found.completion_tokens) == (len(expected.ids), len(expected.tokens))
        known = max((common_prefix_len(each, expected.ids[:-1]) for each in held), default=0)
        assert found.cached_tokens == known, turn
        new, ratio = len(expected.ids) - known, found.ttft_ms / expected.ttft_ms
        read += new
        print(f"turn {turn}: {len(expected.ids)} tokens, {new} new, {found.ttft_ms:.0f} ms, {ratio:.2f} of a fresh one")
        held.append([*expected.ids, *expected.tokens[:-1]])
    assert read < 0.15 * sum(len(each.ids) for each in session)


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_answers_are_the_same_on_an_empty_cache_and_beside_others(ask: Ask, session: list[Expected], url: str) -> None:
    chosen = [session[turn - 1] for turn in (30, 21, 3, 12)]

    async def together() -> list[Found]:
        return await asyncio.gather(*(asyncio.to_thread(ask, url, each.messages) for each in chosen))

    found = asyncio.run(together())
    assert [each.text for each in found] == [each.text for each in chosen]
    assert min(each.cached_tokens for each in found) == 0
