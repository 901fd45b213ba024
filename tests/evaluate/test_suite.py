"""`kvp eval suite`: equal TTFT, order, locks and resumption, and the page that its documents make."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Kvp
from support.directories import TEXT
from support.tiny import llama, prefixed

import kvp_mlx
from kvp_mlx.arms.kinds import KINDS, parse_arms
from kvp_mlx.evaluate.equal_ttft import LEAST, MOST, match, match_by_work, matching_share, pruning_kinds
from kvp_mlx.evaluate.intervals import bootstrap_ratio
from kvp_mlx.evaluate.report import page, read_results, summary
from kvp_mlx.evaluate.suite import ARMS, arms_of, claimed, plan
from kvp_mlx.evaluate.summary import EQUAL_TTFT, compare_at_equal_ttft
from kvp_mlx.evaluate.tables import EVALUATION, ROOT, pages, render

CHOICES = [{"query": f"Question: the {i}?", "choices": ["the lamp", "x"], "gold": i % 2} for i in range(6)]
FILES: dict[str, list[dict[str, Any]]] = {
    "squad_dev_half": [{"context": TEXT, "question": f"what {i}?", "answers": ["the harbour"]} for i in range(6)],
    "arc_easy": CHOICES,
    "piqa": CHOICES,
    "mt_bench_questions": [{"turns": ["the harbour"]}],
    "triviaqa_validation": [{"question": f"the town {i}?", "answers": ["the lamp"]} for i in range(6)],
    "gsm8k_test": [{"question": f"2 and {i}?", "answer": f"2+{i}\n#### {2 + i}"} for i in range(9)],
    "humaneval": [{"task_id": "t/0", "prompt": "def f():\n", "test": "def check(f): f()\n", "entry_point": "f"}],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder laid out as the suite wants it."""
    import gzip

    folder = tmp_path / "data"
    folder.mkdir()
    for name, records in FILES.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "wikitext2_test_raw.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    return folder


@pytest.mark.parametrize("line", [(0.2, 1.5), (0.8, 1.0), (1.2, 1.0), (0.1, 0.5)])
def test_the_share_as_fast_as_the_target(line: tuple[float, float]) -> None:
    start, rise = line
    asked: list[float] = []

    def ratios(shares: Sequence[float]) -> list[float]:
        asked.extend(shares)
        return [start + rise * share + 0.05 * share**2 for share in shares]

    share, ratio = matching_share(ratios)
    assert ratio == pytest.approx(start + rise * share + 0.05 * share**2)
    if start >= 1:
        assert share == LEAST  # nothing is as fast
    elif start + rise < 1:
        assert share == MOST  # everything is
    else:
        assert ratio == pytest.approx(1, abs=0.03)
    assert len(asked) <= 5


def test_the_guess_does_no_more_work_than_the_target() -> None:
    model, _ = prefixed(llama(), 1)
    (target,) = parse_arms("kvp")
    allowed = target.work(model, 200).flops
    found = {row["kind"]: row["arm"] for row in match_by_work(model, target, 200)}
    assert list(found) == pruning_kinds()
    assert set(found) == {"lazy", "spec", "static", "random"}
    assert found["random"] is not None
    for name in filter(None, found.values()):
        assert parse_arms(name)[0].work(model, 200).flops <= allowed
    share = float(found["random"].split("-")[1])
    assert parse_arms(f"random-{share + 0.05:.3f}")[0].work(model, 200).flops > allowed


def test_matching_by_the_clock(fitted: Path) -> None:
    model = kvp_mlx.load(str(fitted))
    prompts = [model.text_tokenizer.encode(TEXT)[:80]] * 2
    rows = match(model, parse_arms("kvp")[0], prompts)
    assert [row["kind"] for row in rows] == pruning_kinds()
    for row in rows:
        assert row["arm"] is None or parse_arms(row["arm"])[0].kind is KINDS[row["kind"]]
        assert (row["arm"] is None) <= (row["ttft_ratio"] > EQUAL_TTFT)


def rows_of(scores: Sequence[float], ttft_ms: float) -> list[dict[str, Any]]:
    return [{"score": score, "ttft_ms": ttft_ms} for score in scores]


def test_only_what_is_as_fast_is_compared() -> None:
    arms = parse_arms("full,kvp,kvp-64,lazy-0.3-0.1,spec-0.2,auxiliary")
    of = {
        "full": rows_of([1, 1, 1, 1], 100),
        "kvp": rows_of([1, 0, 1, 0], 40),
        "kvp-64": rows_of([1, 1, 1, 0], 60),
        "lazy-0.3-0.1": rows_of([1, 0, 0, 0], 43),
        "spec-0.2": rows_of([1, 1, 1, 1], 65),
        "auxiliary": rows_of([0, 0, 0, 0], 30),
    }
    found = {(row["arm"], row["other"]): row for row in compare_at_equal_ttft(arms, of)}
    assert list(found) == [
        *(("kvp", "lazy-0.3-0.1"), ("kvp", "auxiliary")),
        *(("kvp-64", other) for other in ("lazy-0.3-0.1", "spec-0.2", "auxiliary")),
    ]
    row = found["kvp", "lazy-0.3-0.1"]
    assert (row["ttft_ratio"], row["difference"]["mean"]) == (pytest.approx(43 / 40), 0.25)
    low, high = found["kvp-64", "spec-0.2"]["difference"]["interval"]
    assert low < -0.25 < high <= 0


def test_the_interval_of_a_ratio_is_paired() -> None:
    whole = [0.2, 0.9, 0.4, 1.0, 0.1, 0.7]
    assert bootstrap_ratio([x / 2 for x in whole], whole) == pytest.approx([0.5, 0.5])
    low, high = bootstrap_ratio([1, 0, 1, 0, 1, 0, 0, 1], [1, 1, 1, 0, 1, 0, 1, 1])
    assert low < 4 / 6 < high
    assert np.isfinite(bootstrap_ratio([0, 0, 1], [0, 0, 1])).all()  # resamples without any score drop out


def test_the_suite_stops_resumes_and_shares(data: Path, fitted: Path, tmp_path: Path, kvp: Kvp) -> None:
    results = tmp_path / "results"
    command = ("eval", "suite", data, "--model", fitted, "--results", results, "--tasks", "squad,piqa", "--limit", 2)
    outcome = kvp(*command, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json()["done"] == ["squad", "piqa"]
    documents = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    assert documents.keys() == {"squad", "piqa"}
    squad = documents["squad"]
    assert list(squad["arms"])[:4] == ["full", "kvp", "kvp-64", "auxiliary"]
    matched = {row["arm"] for row in squad["matched"] if row["arm"]}
    assert set(squad["arms"]) == {*list(squad["arms"])[:4], *matched, *squad["dials"]}
    assert {row["kind"] for row in squad["matched"]} == set(pruning_kinds())
    assert squad["machine"]["blas_threads"] >= 1
    (log,) = (results / "records").glob("*/squad.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][:9])  # killed while it wrote the fourth row
    with claimed(log.with_suffix(".lock")) as is_free:
        assert is_free
        assert kvp(*command, "--json").json()["done"] == ["piqa"]  # another process is at squad
    assert kvp(*command, "--json").json()["done"] == ["squad", "piqa"]
    again = json.loads((results / "squad.json").read_text())
    assert again["arms"].keys() == squad["arms"].keys()  # matched once
    assert [arm["score"] for arm in again["arms"].values()] == [arm["score"] for arm in squad["arms"].values()]
    assert len(log.read_text().splitlines()) == len(lines)
    elsewhere = documents["piqa"] | {"machine": documents["piqa"]["machine"] | {"chip": "another"}}
    (results / "piqa.json").write_text(json.dumps(elsewhere))
    assert kvp(*command, "--json").code == 0
    assert json.loads((results / "piqa.json").read_text()) == elsewhere  # nothing new, so nothing is written
    (results / "squad.json").write_text(json.dumps(again | {"notes": ["Told by hand."]}))
    text = page([read_results(results)])
    assert "\n\nTold by hand.\n\n" in text
    assert all(f"| {name} | " in text for name in squad["arms"])
    assert squad["dials"]
    assert not any(f"| {name} (of full)" in text for name in squad["dials"])
    assert summary(read_results(results)).count("\n| ") == 2 + ("multiple choice" in text)


def test_the_suite_takes_other_arms_and_matches_to_them(data: Path, fitted: Path, tmp_path: Path, kvp: Kvp) -> None:
    results = tmp_path / "results"
    command = ("eval", "suite", data, "--model", fitted, "--results", results, "--tasks", "squad", "--limit", 2)
    assert kvp(*command, "--arms", "full,kvp-8-0").code == 0
    document = json.loads((results / "squad.json").read_text())
    assert {row["target"] for row in document["matched"]} == {"kvp-8-0"}
    assert list(document["arms"])[:2] == ["full", "kvp-8-0"]
    assert not {"kvp", "kvp-64", "auxiliary"} & set(document["arms"])
    (path,) = (results / "records").glob("*/squad.arms.json")
    first = json.loads(path.read_text())
    assert kvp(*command, "--arms", "full,kvp-8-0,kvp-4-0").code == 0
    document = json.loads((results / "squad.json").read_text())
    assert {row["target"] for row in document["matched"]} == {"kvp-8-0", "kvp-4-0"}
    assert json.loads(path.read_text())[: len(first)] == first  # what was matched is not matched anew
    outcome = kvp(*command, "--arms", "full,mlx-lm")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)


def test_the_page_of_several_bundles(tmp_path: Path, kvp: Kvp) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    document = json.loads((ROOT / "docs" / "results" / "needle.json").read_text())
    for folder, name in ((small, "small-one"), (large, "large-one")):
        folder.mkdir()
        (folder / "needle.json").write_text(json.dumps(document | {"model": name}))
    assert kvp("eval", "report", large, small, "--out", tmp_path / "page.md").code == 0
    text = (tmp_path / "page.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert [line.split(":")[0] for line in headings[1:]] == ["## large-one", "### needle", "## small-one", "### needle"]
    recipe = document["recipe"] | {"predictor": "sha256:0123456789abcdef"}
    (small / "needle.json").write_text(json.dumps(document | {"model": "large-one", "recipe": recipe}))
    assert kvp("eval", "report", large, small, "--out", tmp_path / "page.md").code == 0
    headings = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("## ")]
    own = document["recipe"]["predictor"].removeprefix("sha256:")[:12]
    assert headings == [f"## large-one, maps {own}", "## large-one, maps 0123456789ab"]


def test_a_bundle_that_cannot_recompute_has_no_dials(data: Path) -> None:
    model, _ = prefixed(llama(), 1)
    assert model.config.recompute is None
    entry = plan(data)[0]
    assert entry.place.dials
    assert [arm.name for arm in arms_of(entry, model, parse_arms(ARMS), [])] == ["full", "kvp", "kvp-64", "auxiliary"]


def test_the_plan_names_times_and_refuses(data: Path, fitted: Path, tmp_path: Path, kvp: Kvp) -> None:
    names = [entry.name for entry in plan(data)]
    assert names[0] == "squad"
    assert {"triviaqa", "arc_easy", "piqa", "gsm8k", "humaneval", "needle", "quote"} < set(names)
    assert not {"document", "completion"} & set(names)  # only for who names them
    assert [entry.name for entry in plan(data, names=["document"])] == ["document"]
    command = ("eval", "suite", data, "--model", fitted, "--results", tmp_path / "none", "--tasks")
    outcome = kvp(*command, "arc_easy,humaneval", "--dry-run", "--limit", 1, "--json")
    assert outcome.code == 0, outcome.err
    assert "humaneval is left out" in outcome.err
    (row,) = outcome.json()["plan"]
    assert (row["name"], row["n"]) == ("arc_easy", 1)
    assert row["hours"] == pytest.approx(sum(row["seconds_per_item"].values()) / 3600)
    assert not (tmp_path / "none").exists()
    assert "no task 'psychic'" in kvp(*command, "psychic").err
    (data / "piqa.jsonl.gz").unlink()
    outcome = kvp(*command, "arc_easy,piqa")
    assert outcome.code == 2
    assert "piqa" in outcome.err
    assert [entry.name for entry in plan(data, names=["squad", "arc_easy"])] == ["squad", "arc_easy"]


def test_the_summary_shows_rivals_and_the_average() -> None:
    def document(name: str, task: str, kvp_score: float) -> dict[str, Any]:
        difference = {"mean": kvp_score - 0.6, "interval": [kvp_score - 0.63, kvp_score - 0.57]}
        arm = {"score": kvp_score, "difference": difference, "retention": {"mean": 0.5, "interval": [0.4, 0.6]}}
        arm["flops_ratio"] = 1.6
        apart = {"difference": {"mean": -0.1, "interval": [-0.2, 0.0]}, "ttft_ratio": 0.93}
        rivals = [{"arm": own, "other": "lazy-0.3-0.1"} | apart for own in ("kvp", "kvp-64")]
        arms = {
            "full": {"score": 0.6},
            "kvp": arm,
            "kvp-64": arm | {"flops_ratio": 1.0},
            "lazy-0.3-0.1": {"score": 0.4},
        }
        if name == "squad":
            arms["kvp-8"] = arm  # no other task has it
        return {"file": f"{name}.json", "task": task, "n": 9, "arms": arms, "equal_ttft": rivals}

    text = summary([document("piqa", "mcq", 0.5), document("arc_easy", "mcq", 0.4), document("squad", "squad", 0.3)])
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row.split(",")[0] for row in rows] == ["| squad", "| arc_easy", "| piqa"]
    rival = "lazy-0.3-0.1 0.400 at 0.93 of its time; kvp -0.100 [-0.200, +0.000]"
    assert f"| 0.300 (50%, 40% to 60%) | {rival} | 0.300 (no work saved) |  |" in rows[0]
    assert text.endswith("mean difference from full over arc_easy, piqa: kvp -0.150 [-0.171, -0.129].\n")


def test_the_page_and_its_summary_are_current() -> None:
    results, made = ROOT / "docs" / "results", ROOT / "docs" / "evaluation.md"
    texts = {path: path.read_text(encoding="utf-8") for path in pages()}
    assert all(render(text) == text for text in texts.values()), "run 'make readme'"
    assert len([text for text in texts.values() if EVALUATION.search(text)]) == 1
    folders = [*sorted(path.parent for path in results.glob("*/squad.json")), results]
    current = page([read_results(folder) for folder in folders])
    assert made.read_text(encoding="utf-8") == current, "run 'make report'"
