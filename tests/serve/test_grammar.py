"""Answers that follow a JSON schema, and schemas that nobody can follow."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest
from support.scheduling import FULL, replies, scheduler_of
from support.serving import serving

from kvp_mlx.bundle.loading import KVPModel, load_any
from kvp_mlx.errors import InputError
from kvp_mlx.serve.grammar import Grammars
from kvp_mlx.serve.requests import GenerationRequest, Sampling

SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "kind": {"enum": ["wave", "lamp"]}},
    "required": ["on", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(base_dir: Path) -> KVPModel:
    return load_any(str(base_dir))


def test_answers_follow_their_schemas_whatever_runs_beside_them(model: KVPModel) -> None:
    other = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 3}
    asked = [
        GenerationRequest([5 + n, 6, 7], FULL, 60, Sampling(1.0, seed=n), grammar=grammar)
        for n, grammar in enumerate([json.dumps(SCHEMA), None, json.dumps(other), json.dumps(SCHEMA)])
    ]
    with scheduler_of(model) as scheduler:
        found = replies(*map(scheduler.submit, asked))
        (again,) = replies(scheduler.submit(asked[0]))
    for each in (found[0], found[3]):
        answer = json.loads(each.text)
        assert set(answer) == {"on", "kind"}
        assert answer["kind"] in ("wave", "lamp")
        assert isinstance(answer["on"], bool)
    assert json.loads(found[2].text) in [[a, b, c] for a in (1, 2) for b in (1, 2) for c in (1, 2)]
    assert {each.finished.reason for each in (found[0], found[2], found[3])} == {"stop"}
    assert again.tokens == found[0].tokens


def test_chances_of_what_is_ruled_out_are_not_reported(model: KVPModel) -> None:
    schema = json.dumps({"const": 7})
    with scheduler_of(model) as scheduler:
        (found,) = replies(scheduler.submit(GenerationRequest([5], FULL, 9, grammar=schema, top_logprobs=5)))
    tops = [event.top for event in found.events if hasattr(event, "top")]
    assert found.text == "7"
    assert {len(top) for top in tops} == {1}
    assert all(chance == pytest.approx(0, abs=1e-5) for top in tops for _, chance in top)


def test_an_answer_too_short_for_its_schema_ends_by_length(model: KVPModel) -> None:
    with scheduler_of(model) as scheduler:
        (found,) = replies(scheduler.submit(GenerationRequest([5], FULL, 3, grammar=json.dumps(SCHEMA))))
    assert found.finished.reason == "length"
    assert '{"on":true'.startswith(found.text) or '{"on":false'.startswith(found.text)


@pytest.mark.parametrize("schema", ["[1", "null", '{"type": "nonsense"}', '{"$ref": "https://example.org/a"}'])
def test_schemas_that_cannot_be_followed_are_refused(model: KVPModel, schema: str) -> None:
    with scheduler_of(model) as scheduler:
        with pytest.raises(InputError, match="schema"):
            scheduler.submit(GenerationRequest([5], FULL, grammar=schema))
        assert scheduler.statistics()["waiting"] == 0


def test_a_schema_is_compiled_once_and_answers_stay_apart(model: KVPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, compiled = Grammars(model.text_tokenizer), []
    prepared = Grammars._prepared

    def counted(own: Grammars) -> Any:
        compiled.append(1)
        return prepared(own)

    monkeypatch.setattr(Grammars, "_prepared", counted)
    first, second = (grammars.compile(json.dumps(SCHEMA)) for _ in range(2))
    logits = mx.zeros((1, model.vocabulary_size))
    before, opened = second(mx.array([5]), logits), int(mx.argmax(first(mx.array([5]), logits)))
    first(mx.array([5, opened]), logits)
    assert mx.array_equal(second(mx.array([5]), logits), before)
    assert len(compiled) == 1


def test_others_are_answered_while_a_schema_compiles(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(*_: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        raise InputError("it was slow")

    monkeypatch.setattr(Grammars, "compile", slow)
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "response_format": {"type": "json_object"},
    }
    with serving(base_dir) as (url, _), ThreadPoolExecutor() as threads:
        asked = threads.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=60)
        assert begun.wait(30)
        assert httpx.get(f"{url}/health", timeout=30).status_code == 200
        go_on.set()
        assert asked.result().json()["error"]["message"] == "it was slow"


def test_a_server_with_nothing_to_do_gets_ready_for_schemas(model: KVPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvp_mlx.serve.scheduler.PREPARE_AFTER_SECONDS", 0.01)
    ready = threading.Event()
    prepare = Grammars.prepare
    monkeypatch.setattr(Grammars, "prepare", lambda grammars: (prepare(grammars), ready.set()))
    with scheduler_of(model) as scheduler:
        assert ready.wait(30)
        assert "_llguidance" in vars(scheduler._grammars)
        (found,) = replies(scheduler.submit(GenerationRequest([5], FULL, 9, grammar=json.dumps({"const": 7}))))
    assert found.text == "7"
