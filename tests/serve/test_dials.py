"""How a request's prompt is read: by its ``kvp`` field, its model's name, what the server was told."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.directories import TEXT
from support.serving import serving

from kvp_mlx.engine.dial import QUALITIES, Dial
from kvp_mlx.serve.dials import KVPField, dial_for
from kvp_mlx.serve.errors import APIError
from kvp_mlx.serve.service import Service

TOOL = {"name": "look", "input_schema": {"type": "object"}}


@pytest.fixture(scope="module")
def server(fitted: Path) -> Iterator[tuple[str, Service]]:
    with serving(fitted, exact_for="tools", quality="fast") as served:
        yield served


def asked(service: Service, model: str | None = None, *, has_tools: bool = False, **field: Any) -> Dial:
    return dial_for(service, model, KVPField(**field) if field else None, has_tools=has_tools)


def test_the_nearer_word_wins(server: tuple[str, Service]) -> None:
    _, service = server
    assert asked(service) == asked(service, "tiny") == asked(service, "default") == QUALITIES["fast"]
    assert asked(service, has_tools=True) == asked(service, "tiny:full") == QUALITIES["exact"]
    assert asked(service, "tiny:balanced", has_tools=True) == QUALITIES["balanced"]
    assert asked(service, "tiny:full", quality="fast") == QUALITIES["fast"]
    assert asked(service, exact_tail=5) == Dial("auto", 0, 5)
    assert asked(service, "tiny:full", path="kvp", recompute=0.5) == Dial("kvp", 32, 32, 0.5)
    assert asked(service, "tiny:exact", path="full") == QUALITIES["exact"]
    for name in ("tiny:", ":full", "tiny:full:full", "", "Tiny"):
        with pytest.raises(APIError, match="no such model") as refused:
            asked(service, name)
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")


def test_what_was_read_and_how_is_told(server: tuple[str, Service]) -> None:
    url, _ = server

    def usage(kvp: dict | None, **fields: Any) -> dict:
        messages = [{"role": "user", "content": TEXT}]
        body = {"model": "tiny", "max_tokens": 1, "messages": messages, "kvp": kvp, **fields}
        return httpx.post(f"{url}/v1/messages", json=body, timeout=60).raise_for_status().json()["usage"]

    predicted = usage({"path": "kvp", "exact_head": 8, "exact_tail": 4})
    tokens = predicted["input_tokens"] + predicted["cache_read_input_tokens"]
    assert predicted["kvp"]["path"] == "kvp"
    assert 0 < predicted["kvp"]["predicted_tokens"] <= tokens - 8 - 4 - 1
    full = usage(None, model="tiny:full")
    assert (full["kvp"]["path"], full["kvp"]["predicted_tokens"]) == ("full", 0)
    assert full["kvp"]["exact_tokens"] == tokens
    assert usage(None, tools=[TOOL])["kvp"]["path"] == "full"


def test_a_dial_that_contradicts_itself_is_refused(server: tuple[str, Service]) -> None:
    for kvp in ({"path": "full", "exact_head": 4}, {"quality": "exact", "recompute": 0.5}, {"exact_tail": "4"}):
        body = {"max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}], "kvp": kvp}
        answer = httpx.post(f"{server[0]}/v1/messages", json=body, timeout=60)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
