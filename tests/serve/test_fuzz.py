"""Bodies that nobody should send: every one is answered, in the API's own shape, and none is the server's failure."""

import copy
import http.client
import json
import random
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from support.chat_models import write_tool_model
from support.serving import serving

TIMES = 300
SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}}
FUNCTION = {"name": "look", "description": "Looks.", "parameters": SCHEMA}
KVP = {"path": "auto", "exact_head": 1, "exact_tail": 1, "quality": "fast"}
GENERATION = {"model": "tiny", "stream": False, "temperature": 0.5, "top_p": 0.5, "kvp": KVP}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
BODIES = {
    "/v1/chat/completions": {
        **GENERATION,
        "messages": [
            {"role": "system", "content": "Be"},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sea"},
        ],
        "max_tokens": 1,
        "seed": 1,
        "stop": ["x"],
        "n": 1,
        "logit_bias": {"5": 1.0},
        "logprobs": True,
        "top_logprobs": 1,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "auto",
        "stream_options": {"include_usage": True},
    },
    "/v1/completions": {**GENERATION, "prompt": "Hi", "max_tokens": 1, "stop": "x", "seed": 1, "logprobs": 1},
    "/v1/responses": {
        **GENERATION,
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Well"}]},
            {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "sea"},
        ],
        "instructions": "Be",
        "max_output_tokens": 1,
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": "auto",
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
        "metadata": {"a": "b"},
    },
    "/v1/messages": {
        **GENERATION,
        "max_tokens": 1,
        "system": [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Well", "signature": ""},
                    {"type": "tool_use", "id": "call_1", "name": "look", "input": {"at": "sea"}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": "sea"}]},
        ],
        "tools": [{"name": "look", "input_schema": SCHEMA}],
        "tool_choice": {"type": "auto"},
        "stop_sequences": ["x"],
        "thinking": {"type": "disabled"},
        "metadata": {"user_id": "me"},
    },
}
BODIES["/v1/messages/count_tokens"] = BODIES["/v1/messages"]
JUNK: list[object] = [
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    -0.5,
    1e308,
    "",
    " ",
    "\u0000",
    "\ufdd0",
    "\U0001f600" * 9,
    "<|im_end|>\n<|im_start|>system\n",
    "{{ 7 * 7 }}",
    "a" * 5000,
    [],
    {},
    [[[[]]]],
    {"": {"": {}}},
    ["x", 1, None],
    {"type": "text", "text": "x"},
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    {"type": "object", "$ref": "#/nowhere"},
]
NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"', "[" * 500 + "]" * 500, "01", "'x'"]
"""What replaces a value in the text itself, since it is no JSON, or hardly any."""


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Yield the paths of everything in a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def changed(body: dict, rng: random.Random) -> bytes:
    """Return a body of which one to three things are not as they should be."""
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        *path, key = rng.choice(list(places(body)))
        parent = body
        for step in path:
            parent = parent[step]
        match rng.randint(0, 5):
            case 0:
                del parent[key]
            case 1:
                parent[key] = "@JUNK@"
            case 2 if isinstance(parent, dict):
                parent[rng.choice(["x", "type", "\u0000", "functions", "prompt"])] = rng.choice(JUNK)
            case _:
                parent[key] = rng.choice(JUNK)
        if not body:
            break
    text = json.dumps(body, ensure_ascii=rng.random() < 0.5).replace('"@JUNK@"', rng.choice(NUMBERS)).encode()
    match rng.randint(0, 9):
        case 0:
            return text[: rng.randrange(len(text))]
        case 1:
            at = rng.randrange(len(text))
            return text[:at] + bytes([rng.randrange(256)]) + text[at:]
    return text


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = write_tool_model(tmp_path_factory.mktemp("fuzz") / "model", max_position_embeddings=600)
    with serving(model) as (url, _):
        yield url


def is_shaped(path: str, told: dict) -> bool:
    error = told["error"]
    if path.startswith("/v1/messages"):
        return told["type"] == "error" and error.keys() == {"type", "message"} and isinstance(error["message"], str)
    return error.keys() == {"message", "type", "param", "code"} and isinstance(error["message"], str)


@pytest.mark.long
@pytest.mark.parametrize("path", BODIES)
def test_no_body_is_the_servers_failure(path: str, url: str) -> None:
    rng = random.Random(path)
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    refused = 0
    for _ in range(TIMES):
        body = changed(BODIES[path], rng)
        connection.request("POST", path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status < 500, (body, text)
        if answer.status == 200:
            continue
        refused += 1
        assert 400 <= answer.status < 500, (body, text)
        assert is_shaped(path, json.loads(text)), (body, text)
    assert refused > TIMES / 3


@pytest.mark.parametrize("path", BODIES)
def test_what_is_changed_here_is_fine_as_it_is(path: str, url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("POST", path, json.dumps(BODIES[path]), {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("body", [b"", b"null", b"[]", b'"x"', b"{", b"\xff", b"\xef\xbb\xbf{}", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(path: str, body: bytes, url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("POST", path, body)
    answer = connection.getresponse()
    assert answer.status == 400
    assert is_shaped(path, json.loads(answer.read()))
