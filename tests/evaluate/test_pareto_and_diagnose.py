"""The fronts of score against cost, and what is said of bundles that are ill in known ways."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import Kvp
from mlx.utils import tree_map
from support.tiny import itself, llama, paired, prefixed, small_llama, token_ids

from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.evaluate.diagnose import coherence, diagnose, fit_of_auxiliary, lost_facts, speed, swap_gains
from kvp_mlx.evaluate.dial_map import dial_points
from kvp_mlx.evaluate.pareto import points

WINDOWS = token_ids(40, batch=3).tolist()


def result(model: str, arms: dict[str, tuple[float, float, float]], task: str = "squad") -> dict[str, Any]:
    return {
        "task": task,
        "n": 10,
        "model": model,
        "recipe": {"data": {"a.jsonl": "1"}, "seed": 0, "base": "sha256:1"},
        "arms": {
            name: {"score": score, "interval": [score, score], "ttft_ms": ttft, "flops_ratio": ratio}
            for name, (score, ttft, ratio) in arms.items()
        },
    }


FIRST = result("k8", {"full": (0.6, 100, 1), "kvp": (0.3, 30, 3), "kvp-64": (0.5, 50, 2), "static-0.5": (0.4, 60, 1.3)})
SECOND = result("k12", {"full": (0.6, 101, 1), "kvp": (0.5, 45, 2.2)})


def test_fronts() -> None:
    rows = points([FIRST, SECOND])
    assert [row["label"] for row in rows] == ["full", "k8: kvp-64", "k12: kvp", "static-0.5", "k8: kvp"]
    assert [row["label"] for row in rows if row["fastest_so_good"]] == ["full", "k12: kvp", "k8: kvp"]
    assert [row["label"] for row in rows if row["cheapest_so_good"]] == ["full", "k12: kvp", "k8: kvp"]


def test_less_perplexity_is_better() -> None:
    rows = points([result("m", {"full": (10, 100, 1), "kvp": (12, 50, 2), "static-0.5": (14, 60, 1.5)}, "perplexity")])
    assert [row["label"] for row in rows] == ["full", "kvp", "static-0.5"]
    assert [row["fastest_so_good"] for row in rows] == [True, True, False]


def test_the_command_draws_and_refuses(tmp_path: Path, kvp: Kvp) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, document in zip(paths, (FIRST, SECOND), strict=True):
        path.write_text(json.dumps(document))
    picture, out = tmp_path / "p.png", tmp_path / "points.json"
    outcome = kvp("eval", "pareto", *paths, "--plot", picture, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json() == json.loads(out.read_text()) == {"task": "squad", "points": points([FIRST, SECOND])}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "k12: kvp" in kvp("eval", "pareto", *paths).out
    paths[1].write_text(json.dumps(SECOND | {"task": "mcq"}))
    assert "one task" in kvp("eval", "pareto", *paths).err
    keys = ("data", "seed", "base", "prompt_tokens", "chip")
    for changed in ({"n": 11}, *({"recipe": SECOND["recipe"] | {key: "other"}} for key in keys)):
        paths[1].write_text(json.dumps(SECOND | changed))
        assert kvp("eval", "pareto", *paths).err.startswith("kvp: pareto compares results of"), changed
    assert "measure kvp" in kvp("eval", "pareto", paths[0], paths[0]).err  # which of them should be shown?
    for content in ("{}", "[]"):
        paths[1].write_text(content)
        assert kvp("eval", "pareto", *paths).code == 2
    assert kvp("eval", "pareto", tmp_path / "none.json").code == 2
    for option, name in (("--plot", "p.odd"), ("--plot", "no/p.png"), ("--out", "no/points.json")):
        outcome = kvp("eval", "pareto", paths[0], option, tmp_path / name)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
        assert not (tmp_path / name).exists()


def dials(model: str, tokens: int, rows: list[tuple[int, float, float, float]]) -> dict[str, Any]:
    made = [{"path": "full", "exact_head": 0, "exact_tail": 0, "recompute": 0.0, "recovery": 1.0, "sooner": 1.0}]
    for head, share, sooner, recovery in rows:
        dial = {"path": "kvp", "exact_head": head, "exact_tail": 16, "recompute": share}
        made.append(dial | {"recovery": recovery, "sooner": sooner})
    length = {"prompt_tokens": tokens, "ttft_ms": 100.0}
    return {"model": model, "documents": 4, "rows": [row | length for row in made]}


MAPPED = [
    dials("k8", 900, [(0, 0.0, 2.5, 0.6), (0, 0.1, 2.0, 0.8), (32, 0.1, 1.8, 0.7)]),
    dials("k12", 900, [(0, 0.0, 1.8, 0.85), (0, 0.1, 1.6, 0.9)]),
    dials("k12", 300, [(0, 0.0, 1.5, 0.9)]),
]


def test_the_map_of_dials() -> None:
    rows = dial_points(MAPPED)
    assert [row["prompt_tokens"] for row in rows] == [300] * 2 + [900] * 6  # full prefill once for both bundles
    front = [row["label"] for row in rows if row["fastest_so_good"] and row["prompt_tokens"] == 900]
    assert front == ["full", "k12: 16-0.1", "k12: 16-0", "k8: 16-0.1", "k8: 16-0"]
    assert rows[-2] | {"label": "k8: 32+16-0.1", "recovery": 0.7, "exact_head": 32, "model": "k8"} == rows[-2]
    assert rows[-1]["ttft_ratio"] == pytest.approx(1 / 2.5)


def test_the_command_draws_the_map_and_refuses(tmp_path: Path, kvp: Kvp) -> None:
    paths = [tmp_path / f"{number}.json" for number in range(len(MAPPED))]
    for path, document in zip(paths, MAPPED, strict=True):
        path.write_text(json.dumps(document))
    picture = tmp_path / "map.png"
    outcome = kvp("eval", "pareto", *paths, "--plot", picture, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json() == {"task": "dial", "points": dial_points(MAPPED)}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "k8: 32+16-0.1" in kvp("eval", "pareto", *paths).out
    for broken in (FIRST, MAPPED[0] | {"rows": []}, MAPPED[0] | {"rows": [MAPPED[0]["rows"][0] | {"sooner": 0}]}):
        paths[1].write_text(json.dumps(broken))  # a task's document beside dials, none measured, no time
        outcome = kvp("eval", "pareto", *paths, "--plot", tmp_path / "none.png")
        assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
        assert not (tmp_path / "none.png").exists()


def test_an_exact_bundle_has_nothing_to_swap() -> None:
    gains = swap_gains(itself(llama()), WINDOWS, 8)
    assert list(gains) == [0, 1, 2, 3]
    assert list(gains.values()) == pytest.approx([0] * 4, abs=1e-5)


def test_the_layer_that_is_wrong_is_the_one_to_swap() -> None:
    model = itself(llama())
    module = model.predictor.maps["values_2"]
    module.weight = -2 * module.weight  # one layer's values come out doubled and turned round
    gains = swap_gains(model, WINDOWS, 8)
    assert abs(gains[2]) > 0.01  # of a random model, either way
    assert [gains[layer] for layer in (0, 1, 3)] == pytest.approx([0] * 3, abs=1e-5)
    found = diagnose(model, WINDOWS, 8)
    assert min(found["layers"], key=lambda row: row["attention_cosine"])["layer"] == 2


def test_findings_name_what_is_wrong() -> None:
    model, _ = paired(llama(), small_llama(), [(0,), (0,), (1,), (2,)])
    context = {
        "arms": {"kvp": {"recovery": 0.2}, "auxiliary": {"nll": 5.0}, "no_context": {"nll": 4.0}},
        "separation": 0.1,
    }
    layers = [{"layer": i, "gain": i / 10, "attention_cosine": 0.99} for i in range(4)]
    assert "layers 3 (gain 0.300" in coherence(context, layers)[0]["evidence"]
    assert "does not fit" in fit_of_auxiliary(context, model)[0]["problem"]
    assert fit_of_auxiliary(context, prefixed(llama(), 1)[0]) == []
    good = context | {"arms": {"kvp": {"recovery": 0.9}, "auxiliary": {"nll": 3.0}, "no_context": {"nll": 4.0}}}
    assert "genre" in coherence(good, layers)[0]["problem"]
    assert coherence(good | {"separation": 0.8}, layers) == []
    assert fit_of_auxiliary(good, model) == []
    layers[1]["attention_cosine"] = 0.4
    assert coherence(good | {"separation": 0.8}, layers)[0]["evidence"].endswith("layers 1")
    times = {"speedup": 1.9, "flops_ratio": 2.2, "realised": 0.86, "prompt_tokens": 100}
    assert speed(times) == []
    assert "not realised" in speed(times | {"speedup": 1.0, "realised": 0.45})[0]["problem"]
    assert "little to gain" in speed(times | {"flops_ratio": 1.1})[0]["problem"]


def test_lost_facts_are_a_finding() -> None:
    found = lost_facts({"of": 6, "full": 6, "kvp": 0, "kvp-64": 2})
    assert "full finds 6 of 6, kvp 0, kvp with exact tail 64 2" in found[0]["evidence"]
    assert "--prefill full" in found[0]["remedy"]
    assert lost_facts({"of": 6, "full": 6, "kvp": 3, "kvp-64": 6}) == []
    assert lost_facts({"of": 6, "full": 0, "kvp": 0, "kvp-64": 0}) == []  # the base itself finds none


def test_a_broken_auxiliary_is_found() -> None:
    base = llama()
    model = itself(base)
    noise = tree_map(lambda x: -3 * x if isinstance(x, mx.array) else x, small_llama(5).parameters())
    other = small_llama(5)
    other.update(noise)
    broken: KVPModel = replace(paired(base, other, [(0,), (0,), (1,), (2,)])[0])
    assert [f["problem"] for f in diagnose(model, WINDOWS, 8)["findings"] if "incoherent" in f["problem"]] == []
    problems = [found["problem"] for found in diagnose(broken, WINDOWS, 8)["findings"]]
    assert "answers will be incoherent" in problems or "the auxiliary does not fit" in problems


def test_the_diagnose_command(fitted: Path, text_file: Path, kvp: Kvp) -> None:
    options = ("--data", text_file, "--prompt-tokens", 40, "--continuation-tokens", 8, "--limit", 2)
    outcome = kvp("eval", "diagnose", fitted, *options, "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json()
    assert found.keys() == {"context", "layers", "ttft", "needles", "findings"}
    assert found["needles"]["of"] == 6
    assert [row["layer"] for row in found["layers"]] == [3]
    assert found["ttft"]["realised"] == pytest.approx(found["ttft"]["speedup"] / found["ttft"]["flops_ratio"])
    shown = kvp("eval", "diagnose", fitted, *options).out
    assert "layer   3" in shown


def test_the_page_shows_every_arm_and_cell(fitted: Path, text_file: Path, tmp_path: Path, kvp: Kvp) -> None:
    folder, page = tmp_path / "results", tmp_path / "page.md"
    folder.mkdir()
    assert kvp("eval", "report", folder, "--out", page).code == 2
    options = ("--data", text_file, "--limit", 2, "--prompt-tokens", 120, "--depths", "0,1", "--arms", "full,kvp-4")
    assert kvp("eval", "needle", fitted, *options, "--out", folder / "needle.json").code == 0
    assert kvp("eval", "report", folder, "--out", page).code == 0
    result = json.loads((folder / "needle.json").read_text())
    text = page.read_text()
    for name, arm in result["arms"].items():
        assert f"| {name} | {arm['score']:.3f} |" in text
        assert f"{arm['ttft_ms']:.0f} ms" in text
    assert "| kvp-4, 120 | " in text
    (folder / "again.json").write_text((folder / "needle.json").read_text())
    picture = tmp_path / "tasks.svg"
    assert kvp("eval", "report", folder, "--out", page, "--plot", picture).code == 0
    drawn = picture.read_text()
    assert drawn.count("<!-- again, n = 2 -->") == drawn.count("<!-- needle, n = 2 -->") == 1
    assert drawn.count("<!-- kvp-4 -->") == 4  # over TTFT and over work, of each
    page.unlink()
    assert kvp("eval", "report", folder, "--out", page, "--plot", tmp_path / "tasks.odd").code == 2
    assert not page.exists()
    (folder / "other.json").write_text("{}")
    assert kvp("eval", "report", folder, "--out", page).code == 2
