"""Documents, logs and states of our own that somebody changed: one line, whatever was changed."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
from conftest import Kvp
from support.training import train_args, training

REPOSITORY = Path(__file__).parents[2]
SCORES = REPOSITORY / "docs" / "results" / "squad.json"
TIMES = REPOSITORY / "bench" / "results" / "2026-11-24-amd-epyc-2core-default.json"
CHANGES = [
    (("arms", "full"), []),
    (("arms", "full", "score"), "0.5"),
    (("arms", "full", "score"), math.nan),
    (("arms", "full", "interval"), [0.5]),
    (("arms", "full", "interval"), [1.0, 0.0]),
    (("arms", "kvp", "ttft_ms"), None),
    (("arms", "kvp", "flops_ratio"), 0),
    (("n",), True),
    (("model",), ["x"]),
    ((), [[[]]]),
]


def changed(document: dict, place: tuple[str | int, ...], value: object) -> object:
    if not place:
        return value
    document = copy.deepcopy(document)
    part = document
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    return document


@pytest.mark.parametrize(("place", "value"), CHANGES)
def test_changed_scores_are_refused(place: tuple, value: object, tmp_path: Path, kvp: Kvp) -> None:
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(changed(json.loads(SCORES.read_text()), place, value)))
    for command in (["pareto", path], ["report", tmp_path, "--out", tmp_path / "page.md"]):
        outcome = kvp("eval", *command)
        assert (outcome.code, outcome.err.count("\n"), outcome.out) == (2, 1, "")
        assert "squad.json" in outcome.err
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("rows", 0, "ttft_ms"), True),
        (("rows", 0, "ttft_ms", "median"), "9"),
        (("rows", 0, "prompt_tokens"), math.nan),
        (("rows", 0, "floor_ms"), math.inf),
        (("model",), 0),
        (("rows",), []),
    ],
)
def test_changed_times_are_not_drawn(place: tuple, value: object, tmp_path: Path, kvp: Kvp) -> None:
    path = tmp_path / "times.json"
    path.write_text(json.dumps(changed(json.loads(TIMES.read_text()), place, value)))
    outcome = kvp("bench", "plot", path, "--out", tmp_path / "times.png")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert list(tmp_path.iterdir()) == [path]


def test_samples_that_are_no_times_are_not_compared(tmp_path: Path, kvp: Kvp) -> None:
    path = tmp_path / "times.json"
    for value in ([math.nan], [math.inf, 1.0], [0.0], "x"):
        document = changed(json.loads(TIMES.read_text()), ("rows", 0, "ttft_ms", "samples"), value)
        path.write_text(json.dumps(document))
        assert kvp("bench", "compare", path, TIMES).code == 2


@pytest.mark.parametrize("line", ["x", "[]", "{}", "[" * 5000, '{"item": "a", "arm": "full", "score": NaN}'])
def test_a_changed_row_of_a_log_is_named(line: str, bundle: Path, tmp_path: Path, kvp: Kvp) -> None:
    log = tmp_path / "log.jsonl"
    common = ("eval", "needle", bundle, "--prompt-tokens", 64, "--limit", 1, "--arms", "full", "--log", log)
    assert kvp(*common).code == 0
    begun = log.read_text()
    log.write_text(begun + line + "\n")
    outcome = kvp(*common)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "line 3" in outcome.err
    rows = [json.loads(row) for row in begun.splitlines()]
    log.write_text("\n".join(map(json.dumps, [*rows, rows[1] | {"item": "z", "metrics": {}}])) + "\n")
    assert "line 3" in kvp(*common).err


def test_a_log_is_of_one_way_to_choose_tokens(bundle: Path, tmp_path: Path, kvp: Kvp) -> None:
    common = ("eval", "needle", bundle, "--prompt-tokens", 64, "--limit", 1, "--log", tmp_path / "log.jsonl")
    assert kvp(*common).code == 0
    config = json.loads((bundle / "kvp.json").read_text())
    config["recompute"]["lower_layers"] = 1.0
    (bundle / "kvp.json").write_text(json.dumps(config))
    outcome = kvp(*common)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "other data, options, model" in outcome.err


@pytest.mark.parametrize("line", ["x", "[]", '{"step": "1"}', "[" * 5000])
def test_a_changed_line_of_a_runs_log_is_named(
    line: str, run: Path, finished: tuple[Path, Path], starts: dict[str, Path], base_dir: Path, kvp: Kvp
) -> None:
    log = training(run) / "log.jsonl"
    log.write_text(f"{line}\n{log.read_text()}")
    shutil.rmtree(run)  # so that the run has something to write
    common = train_args(starts["prefix"], base_dir, finished[1], "--tokens", 64 * 4)
    outcome = kvp(*common, "--out", run, "--resume")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "log.jsonl, line 1" in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "pull", ""],
        ["fit", "{base}", "--layers", "2", "--data", "", "--out", "{folder}/o"],
        ["fit", "{base}", "--layers", "2", "--window", "8", "--out", "{folder}/o"],
        ["cache", "build", "{text}", "--name", ""],
        ["generate", "Hi", "--model", "x" * 5000],
        ["generate", "Hi", "--stop", "\udcff"],
    ],
)
def test_names_that_are_none(arguments: list[str], base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp) -> None:
    places = {"base": base_dir, "text": text_file, "folder": tmp_path}
    outcome = kvp(*(argument.format(**places) for argument in arguments))
    assert (outcome.code, outcome.err.count("\n"), outcome.out) == (2, 1, "")
    assert len(outcome.err) < 300
    assert list(tmp_path.iterdir()) == []
