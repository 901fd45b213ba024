"""What is asked without a prompt, a stop or room: answered as lm-evaluation-harness does, or refused."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Kvp
from mlx_lm.models.cache import make_prompt_cache

import kvp_mlx
from kvp_mlx.arms.kinds import parse_arm
from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.errors import InputError
from kvp_mlx.evaluate.answer import Question, generate
from kvp_mlx.evaluate.likelihood import continuation_losses, predicted_losses, prefix_token, split_choices
from kvp_mlx.models.sections import output_head, run_layers

SENTENCES = ["The keeper climbs the stairs.", "the harbour below"]


@pytest.fixture(scope="module")
def model(fitted: Path) -> KVPModel:
    return kvp_mlx.load(str(fitted))


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_a_text_without_a_prompt_follows_the_end_of_another(model: KVPModel) -> None:
    """Its likelihood is the base's own after BOS, or else an end of text, as lm-evaluation-harness has it."""
    prompt, choices = split_choices(model, "", SENTENCES)
    assert prompt == [prefix_token(model)] == [model.text_tokenizer.bos_token_id]
    assert choices == [model.text_tokenizer.encode(text) for text in SENTENCES]
    losses, _ = continuation_losses(model, parse_arm("full"), prompt, choices)
    for row, choice in zip(losses, choices, strict=True):
        hidden, _ = run_layers(model.base, mx.array([[*prompt, *choice[:-1]]]), make_prompt_cache(model.base))
        logits = np.array(output_head(model.base, hidden)[0], dtype=np.float64)
        own = np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(choice)), choice]
        np.testing.assert_allclose(row, own, atol=1e-4)
    for choice in choices:
        assert np.isfinite(predicted_losses(model, prompt, choice)[0]).all()


@pytest.mark.parametrize("arm", ["full", "kvp", "auxiliary"])
@pytest.mark.parametrize("scoring", ["continuation", "predicted"])
def test_the_harness_scores_them_alike(arm: str, scoring: str, model: KVPModel) -> None:
    pytest.importorskip("lm_eval")
    from kvp_mlx.evaluate.harness import KVPLM

    lm = KVPLM(model, arm, scoring)
    asked = [request("", SENTENCES[0]), request("The harbour", " lies below"), request("", SENTENCES[1])]
    found = lm.loglikelihood(asked)
    assert all(math.isfinite(score) and score < 0 for score, _ in found)
    assert lm.loglikelihood(asked[1:2]) == found[1:2]
    assert found[0][0] != found[2][0]
    if scoring == "continuation":
        prompt, choices = split_choices(model, "", SENTENCES)
        losses, _ = continuation_losses(model, parse_arm(arm), prompt, choices)
        assert [found[0][0], found[2][0]] == pytest.approx([-row.sum() for row in losses], abs=1e-3)


def test_what_cannot_be_scored_is_refused(model: KVPModel) -> None:
    pytest.importorskip("lm_eval")
    from kvp_mlx.evaluate.harness import KVPLM

    lm = KVPLM(model, "full")
    with pytest.raises(InputError, match="at least one token"):
        lm.loglikelihood([request("The harbour", "")])
    with pytest.raises(InputError, match="context window"):
        lm.loglikelihood([request("The harbour", " lies below" * 400)])


@pytest.mark.parametrize("until", [[], None, "", [""], ["", "\0\0"], ["\0\0"]])
def test_an_empty_stop_is_none(until: Any, model: KVPModel) -> None:
    pytest.importorskip("lm_eval")
    from kvp_mlx.evaluate.harness import KVPLM

    lm = KVPLM(model, "full")
    (answer,) = lm.generate_until([request("The harbour lies", {"until": until, "max_gen_toks": 6})])
    assert answer
    assert answer == lm.generate_until([request("The harbour lies", {"max_gen_toks": 6})])[0]
    assert lm.generate_until([request("", {"until": until, "max_gen_toks": 6})]) != [""]


def test_empty_stops_are_left_out_of_ours_too(model: KVPModel) -> None:
    question = Question(parse_arm("full"), model.text_tokenizer.encode("The harbour lies"))
    texts = {next(generate(model, [question], stop=stop, max_tokens=6))[0].text for stop in ((), ("",), ("", "\0\0"))}
    assert len(texts) == 1
    assert texts != {""}


@pytest.mark.parametrize(
    "command",
    [
        ("needle", "--prompt-tokens", "100000"),
        ("quote", "--prompt-tokens", "64,512"),
        ("perplexity", "--prompt-tokens", "100000"),
        ("perplexity", "--prompt-tokens", "400", "--continuation-tokens", "200"),
        ("diagnose", "--prompt-tokens", "100000"),
    ],
)
def test_lengths_are_checked_before_any_work(command: tuple[str, ...], fitted: Path, kvp: Kvp) -> None:
    start = time.perf_counter()
    outcome = kvp("eval", command[0], fitted, *command[1:])
    assert outcome.code == 2, outcome.err
    assert "context window" in outcome.err
    assert outcome.err.count("\n") == 1
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "options",
    [
        ("--seed", "-1"),
        ("--seed", str(2**70)),
        ("--limit", "0"),
        ("--limit", "-5"),
        ("--prompt-tokens", "0"),
        ("--prompt-tokens", "-64"),
        ("--prompt-tokens", "64,,128"),
        ("--depths", "nan"),
        ("--depths", "inf"),
        ("--depths", ""),
    ],
)
def test_numbers_that_are_none_are_named(options: tuple[str, str], fitted: Path, kvp: Kvp) -> None:
    outcome = kvp("eval", "needle", fitted, *options)
    assert outcome.code == 2, outcome.err
    assert options[0] in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"query": "a", "choices": ["b", "c"], "gold": True}, "gold"),
        ({"query": "a", "choices": ["b", "c"], "gold": -1}, "gold"),
        ({"query": "a", "choices": [], "gold": 0}, "gold"),
        ({"query": "a", "choices": ["b", 1], "gold": 0}, "choices"),
        ({"query": None, "choices": ["b"], "gold": 0}, "query"),
    ],
)
def test_records_of_other_types_are_named(record: dict, named: str, fitted: Path, tmp_path: Path, kvp: Kvp) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    outcome = kvp("eval", "mcq", fitted, "--data", tmp_path / "a.jsonl")
    assert outcome.code == 2, outcome.err
    assert named in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_sum_without_a_number_is_no_sum(fitted: Path, tmp_path: Path, kvp: Kvp) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "who?", "answer": "#### Arthur"}) + "\n")
    outcome = kvp("eval", "gsm8k", fitted, "--data", tmp_path / "a.jsonl", "--shots", 0)
    assert (outcome.code, outcome.out) == (2, "")
    assert "'answer' is not a text with a number at its end" in outcome.err


def test_records_of_one_name_are_refused_and_those_without_are_numbered(fitted: Path, tmp_path: Path, kvp: Kvp) -> None:
    data, log, record = tmp_path / "a.jsonl", tmp_path / "log.jsonl", {"context": "a b", "question": "c?"}
    command = ("eval", "squad", fitted, "--data", data, "--arms", "full", "--log", log, "--json")

    def write(**fields: Any) -> None:
        data.write_text("".join(json.dumps(record | {"answers": [word]} | fields) + "\n" for word in ("b", "x")))

    write(id="same")
    outcome = kvp(*command)
    assert (outcome.code, outcome.out, log.exists()) == (2, "", False)
    assert "2 records are called 'same'" in outcome.err
    write(id=None)
    assert kvp(*command).json()["n"] == 2
    assert sorted(json.loads(line)["item"] for line in log.read_text().splitlines()[1:]) == ["0", "1"]


def test_a_file_is_written_once(fitted: Path, tmp_path: Path, kvp: Kvp) -> None:
    one = tmp_path / "one.json"
    for command in (
        ("eval", "needle", fitted, "--log", one, "--out", one),
        ("eval", "pareto", tmp_path / "x.json", "--out", tmp_path / "a.png", "--plot", tmp_path / "." / "a.png"),
        ("bench", "ttft", "--model", fitted, "--out", one, "--plot", one),
    ):
        outcome = kvp(*command)
        assert (outcome.code, outcome.out) == (2, "")
        assert "is to be written twice" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_is_refused_before_anything_is_measured(
    fitted: Path, tmp_path: Path, kvp: Kvp
) -> None:
    result = tmp_path / "a.json"
    outcome = kvp("bench", "ttft", "--model", fitted, "--out", result, "--plot", tmp_path / "a.xyz")
    assert (outcome.code, outcome.out, result.exists()) == (2, "", False)
    assert "end it in .png, .svg or .pdf" in outcome.err
