"""Answers that follow a JSON schema, and schemas that nobody can follow."""

import json
import threading
from pathlib import Path

import pytest
from support.scheduling import FULL, replies, scheduler_of

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
