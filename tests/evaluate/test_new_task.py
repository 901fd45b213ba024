"""A task is one file and one line: command, suite and page know of a new one without any other change."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import Kvp

import kvp_mlx.cli
from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.evaluate import tasks
from kvp_mlx.evaluate.generation import Generation, measure_generation
from kvp_mlx.evaluate.pareto import points
from kvp_mlx.evaluate.records import TEXT, hashes, read_records, shuffled
from kvp_mlx.evaluate.report import page, read_results, summary
from kvp_mlx.evaluate.suite import plan
from kvp_mlx.evaluate.task import Item, Place, Run, Scores, Task


def score(item: Item, text: str) -> Scores:
    return {"characters": float(len(text))}


ANSWER = Generation(score, stop=(), max_tokens=3)


def run(data: list[str], shots: int = 2, limit: int | None = None, seed: int = 0) -> Run:
    """Brevity, in characters."""

    def items(_: KVPModel) -> list[Item]:
        return [
            Item(str(i), record["ask"]) for i, record in enumerate(shuffled(read_records(data, {"ask": TEXT}), seed))
        ]

    options = {"data": hashes(data), "shots": shots}
    return Run("brevity", items, measure_generation(ANSWER), ANSWER.encode, limit, seed, options)


@pytest.fixture(autouse=True)
def brevity(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Add the file and the line, and let the command line find out."""
    module: Any = ModuleType("kvp_mlx.evaluate.tasks.brevity")
    place = Place("short_answers", {"data": "asked.jsonl"}, {"shots": 0, "limit": 2}, is_matched=False)
    module.TASK = Task(
        "brevity", "length", run, places=(place,), less_is_better=True, difference_unit="characters", average="Brevity"
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(tasks, "MODULES", (*tasks.MODULES, "brevity"))
    monkeypatch.delitem(sys.modules, "kvp_mlx.cli.evaluation", raising=False)
    yield
    sys.modules.pop("kvp_mlx.cli.evaluation", None)
    monkeypatch.undo()
    kvp_mlx.cli.evaluation = importlib.import_module("kvp_mlx.cli.evaluation")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"ask": f"the harbour {i} lies"}) + "\n" for i in range(4)))
    return path


def test_the_command_is_there(data: Path, fitted: Path, kvp: Kvp) -> None:
    assert "Brevity, in characters." in kvp("eval", "--help").out
    assert "--shots" in kvp("eval", "brevity", "--help").out
    outcome = kvp("eval", "brevity", fitted, "--data", data, "--shots", 1, "--limit", 3, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json()
    assert (result["task"], result["n"], result["recipe"]["shots"]) == ("brevity", 3, 1)
    assert result["arms"]["full"]["score"] > 0


def test_the_suite_and_the_page_know_it(data: Path, fitted: Path, tmp_path: Path, kvp: Kvp) -> None:
    (entry,) = plan(data.parent, names=["short_answers"])
    assert (entry.run.limit, entry.run.options["shots"], entry.place.is_matched) == (2, 0, False)
    results = tmp_path / "results"
    outcome = kvp("eval", "suite", data.parent, "--model", fitted, "--results", results, "--tasks", "short_answers")
    assert outcome.code == 0, outcome.err
    documents = read_results(results)
    assert "| short_answers, length (less is better; differences in characters) | 2 |" in summary(documents)
    text = page([[*documents, documents[0] | {"file": "longer.json"}]])
    assert "| arm | length | 95 % interval | of full | less the full model's, characters |" in text
    assert "Brevity, mean difference from full over short_answers, longer: kvp" in text
    low, high = sorted(arm["score"] for arm in documents[0]["arms"].values())[:: len(documents[0]["arms"]) - 1]
    rows = points(documents)
    assert (rows[0]["score"], rows[-1]["score"]) == (low, high)  # less is better
