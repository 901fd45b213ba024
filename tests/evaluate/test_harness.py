"""lm-evaluation-harness: our adapter and our own scoring against mlx-lm's adapter, on the same items."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Kvp

import kvp_mlx
from kvp_mlx.arms.kinds import parse_arm
from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.errors import InputError
from kvp_mlx.evaluate.likelihood import Scoring
from kvp_mlx.evaluate.task import Run
from kvp_mlx.evaluate.tasks import mcq, triviaqa

pytest.importorskip("lm_eval")

WORDS = ["harbour", "lighthouse", "keeper", "weather", "lamp", "stairs", "old town", "mole"]


@pytest.fixture(scope="module")
def trivia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trivia") / "trivia.jsonl"
    records = [{"question": f"the {word} lies?", "answers": ["below", f"the {word}"]} for word in WORDS]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def measured(run: Run, arm: str, model: KVPModel, items: list[Any]) -> list[dict[str, Any]]:
    return list(run.measure(model, [(parse_arm(arm), item) for item in items]))


def samples(result: dict[str, Any], task: str) -> list[dict[str, Any]]:
    return sorted(result["samples"][task], key=lambda sample: sample["doc_id"])


def mlx_lms_adapter(base: Path) -> Any:
    from mlx_lm.evaluate import MLXLM

    return MLXLM(str(base), batch_size=1, use_chat_template=False)


def in_their_order(path: Path, items: list[Any], records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert len(items) == len(records)
    return path


def test_generation_agrees(trivia: Path, fitted: Path, base_dir: Path, tmp_path: Path) -> None:
    from kvp_mlx.evaluate.harness import KVPLM, run_harness

    model = kvp_mlx.load(str(fitted))
    items = triviaqa.items([str(trivia)], 0, 0)
    records = [{"question": item.prompt[10:-8], "answers": item.answers} for item in items]
    data = [str(in_their_order(tmp_path / "same.jsonl", items, records))]
    ours = measured(triviaqa.run(data), "full", model, items)
    for lm in (KVPLM(model, "full"), mlx_lms_adapter(base_dir)):
        theirs = samples(run_harness(lm, ["kvp_triviaqa"], data=data, shots=0), "kvp_triviaqa")
        assert [sample["arguments"][0][0] for sample in theirs] == [item.prompt for item in items]
        assert [sample["filtered_resps"][0].strip() for sample in theirs] == [row["text"].strip() for row in ours]
        assert [sample["exact_match"] for sample in theirs] == [row["score"] for row in ours]


def test_likelihood_agrees(fitted: Path, base_dir: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate

    from kvp_mlx.evaluate.harness import KVPLM, task_manager

    how = {"task_manager": task_manager(False), "bootstrap_iters": 0, "verbosity": "ERROR"}
    model = kvp_mlx.load(str(fitted))
    records = [
        {"query": f"Question: the {word}?", "choices": ["lies below", "lamp", "the old stones"], "gold": i % 3}
        for i, word in enumerate(WORDS)
    ]
    path = in_their_order(tmp_path / "choices.jsonl", records, records)
    items = mcq.items([str(path)], 0)
    shuffled = [
        {"q": item.prompt, "choices": [text[1:] for text in item.answers], "gold": item.extra["gold"]} for item in items
    ]
    task = {
        "task": "choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(in_their_order(tmp_path / "same.jsonl", items, shuffled))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    ours = measured(mcq.run([str(path)]), "full", model, items)
    for lm in (KVPLM(model, "full"), mlx_lms_adapter(base_dir)):
        theirs = samples(simple_evaluate(lm, tasks=[task], **how), "choices")
        assert [sample["acc"] for sample in theirs] == [row["metrics"]["accuracy"] for row in ours]
        assert [sample["acc_norm"] for sample in theirs] == [row["metrics"]["accuracy_per_letter"] for row in ours]
        for sample, row in zip(theirs, ours, strict=True):
            found = [float(likelihood) for likelihood, _ in sample["filtered_resps"]]
            assert found == pytest.approx(row["likelihoods"], abs=1e-3)
    for scoring in Scoring:
        predicted = KVPLM(model, "kvp", scoring)
        theirs = samples(simple_evaluate(predicted, tasks=[task], **how), "choices")
        mine = measured(mcq.run([str(path)], scoring), "kvp", model, items)
        for sample, row in zip(theirs, mine, strict=True):
            found = [float(likelihood) for likelihood, _ in sample["filtered_resps"]]
            assert found == pytest.approx(row["likelihoods"], abs=1e-3)


def test_likelihoods_without_a_prompt_are_refused(fitted: Path) -> None:
    from lm_eval.api.instance import Instance

    from kvp_mlx.evaluate.harness import KVPLM

    model = kvp_mlx.load(str(fitted))
    asked = [Instance("loglikelihood_rolling", {}, ("the old harbour",), 0)]
    assert KVPLM(model, "full").loglikelihood_rolling(asked)[0] < 0
    for arm in ("kvp", "random-0.5"):
        with pytest.raises(InputError, match="eval perplexity"):
            KVPLM(model, arm).loglikelihood_rolling(asked)


def test_the_command(trivia: Path, fitted: Path, tmp_path: Path, kvp: Kvp) -> None:
    problems = tmp_path / "problems.jsonl"
    problem = {"task_id": "t/0", "prompt": "def f():\n", "canonical_solution": "    pass\n", "entry_point": "f"}
    problems.write_text(json.dumps(problem | {"test": "def check(f): f()\n"}) + "\n")
    options = ("--arms", "full,kvp", "--limit", 2, "--json")
    outcome = kvp("eval", "lm-eval", fitted, "--tasks", "kvp_triviaqa", "--data", trivia, *options)
    assert outcome.code == 0, outcome.err
    arms = outcome.json()["arms"]
    assert list(arms) == ["full", "kvp"]
    assert 0 <= arms["kvp"]["kvp_triviaqa"]["exact_match,remove_whitespace"] <= 1
    command = ("eval", "lm-eval", fitted, "--tasks", "kvp_humaneval", "--data", problems, *options)
    assert kvp(*command).code == 2
    outcome = kvp(*command, "--allow-code-execution")
    assert outcome.code == 0, outcome.err
    assert outcome.json()["arms"]["full"]["kvp_humaneval"]["pass@1,none"] in (0, 1)
    assert "name a file" in kvp(*command, "--out", tmp_path / "no" / "x.json").err
    for command in (
        ("--tasks", "kvp_triviaqa", "--data", problems),
        ("--tasks", "kvp_humaneval", "--data", trivia, "--allow-code-execution"),
        ("--tasks", "kvp_triviaqa", "--data", trivia, "--shots", 50),
    ):
        refused = kvp("eval", "lm-eval", fitted, *command)
        assert refused.code == 2, refused.err
        assert "lm-evaluation-harness cannot run" in refused.err.splitlines()[-1]
    refused = kvp("eval", "lm-eval", fitted, "--tasks", "no_such_task")
    assert refused.code == 2
    assert "no_such_task" in refused.err
