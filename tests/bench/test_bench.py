"""The bench: honest rows, and arithmetic that agrees with counting by hand."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import Kvp
from kvp_mlx.bench import ttft
from kvp_mlx.bench.plot import draw_realised
from kvp_mlx.bench.ttft import fresh_prompt

import kvp_mlx
from kvp_mlx.arms.clock import first_token
from kvp_mlx.arms.kinds import parse_arms
from kvp_mlx.arms.work import Work, full_work, kvp_work, predictor_work, prefill_work, recompute_work, step_work

ROW_KEYS = {
    *("arm", "prompt_tokens", "batch_size", "ttft_ms", "auxiliary_prefill_ms", "predict_ms", "first_step_ms"),
    *("floor_ms", "peak_memory_bytes", "speedup", "flops_ratio", "realised"),
}
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 64, 96, 4, 2, 16, 4, 300
LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * HEAD_DIM + 3 * HIDDEN * FFN
KV = 2 * HIDDEN * KV_HEADS * HEAD_DIM


@pytest.mark.parametrize("batch", [1, 3])
def test_json_has_the_contracts_keys(batch: int, fitted: Path, tmp_path: Path, kvp: Kvp) -> None:
    out = tmp_path / "result.json"
    common = ("--prompt-tokens", "20,50", "--rounds", 3, "--batch-size", batch)
    outcome = kvp("bench", "ttft", "--model", fitted, *common, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json()
    assert json.loads(out.read_text()) == result
    assert {"chip", "cores", "memory_bytes", "mlx", "mlx_lm", "matmul_gflops", "copy_gb_per_s"} <= result[
        "machine"
    ].keys()
    assert [(row["arm"], row["prompt_tokens"]) for row in result["rows"]] == [
        *(("mlx-lm", 20), ("full", 20), ("kvp", 20), ("mlx-lm", 50), ("full", 50), ("kvp", 50))
    ]
    for row in result["rows"]:
        assert row.keys() >= ROW_KEYS
        times = row["ttft_ms"]
        assert len(times["samples"]) == 3
        assert min(times["samples"]) <= times["q1"] <= times["median"] <= times["q3"] <= max(times["samples"])
        assert row["realised"] == pytest.approx(row["speedup"] / row["flops_ratio"])
        assert row["peak_memory_bytes"] > 0
    assert result["format"] == 2
    mlx_lm, full, predicted = result["rows"][3:]
    assert mlx_lm["speedup"] == full["ttft_ms"]["median"] / mlx_lm["ttft_ms"]["median"]
    assert mlx_lm["flops_ratio"] == 1
    assert full["speedup"] == full["flops_ratio"] == 1
    assert predicted["flops_ratio"] > 1
    for part in ("auxiliary_prefill_ms", "predict_ms", "first_step_ms"):
        assert 0 < predicted[part] < predicted["ttft_ms"]["median"]


def test_all_arms_that_predict_show_their_parts(fitted: Path, kvp: Kvp) -> None:
    arms = ("--arms", "full,kvp-4,balanced", "--prompt-tokens", 200, "--rounds", 1)
    full, *predicted = kvp("bench", "ttft", "--model", fitted, *arms, "--json").json()["rows"]
    assert full["first_step_ms"] is None
    for row in predicted:
        assert 0 < row["predict_ms"] + row["first_step_ms"] < row["ttft_ms"]["median"]
        assert 0 < row["predict_share"] < 1


def test_table_for_people(fitted: Path, kvp: Kvp) -> None:
    outcome = kvp("bench", "ttft", "--model", fitted, "--prompt-tokens", "20", "--rounds", 1)
    assert outcome.code == 0
    assert "realised" in outcome.out


@pytest.mark.parametrize(
    ("options", "named"),
    [(("--arms", "full,psychic"), "psychic"), (("--prompt-tokens", "600"), "600"), (("--prompt-tokens", "1"), "2 to")],
)
def test_what_cannot_be_run_is_refused(options: tuple, named: str, fitted: Path, kvp: Kvp) -> None:
    outcome = kvp("bench", "ttft", "--model", fitted, *options)
    assert outcome.code == 2
    assert named in outcome.err


def test_work_counted_by_hand(fitted: Path) -> None:
    model = kvp_mlx.load(str(fitted))
    read, batch = 10, 2
    attention = 4 * HEADS * HEAD_DIM * read * (read + 1) / 2
    base = prefill_work(model.base, read, batch)
    assert base.flops == batch * ((LAYERS - 1) * (2 * read * LAYER + attention) + 2 * read * KV)
    auxiliary = prefill_work(model.auxiliary, read, batch)
    assert auxiliary.flops == batch * (2 * (2 * read * LAYER + attention) + 2 * read * KV)
    predictor = predictor_work(model, read, batch)
    width = 2 * HIDDEN  # of a token's state and of the one before; one predicted layer, keys and values
    assert predictor.flops == batch * 2 * read * width * KV / HIDDEN
    assert predictor.weight_bytes == 4 * (width + 1) * KV / HIDDEN
    step = step_work(model.base, read + 1, batch)
    assert step.flops == batch * LAYERS * (2 * LAYER + 4 * HEADS * HEAD_DIM * (read + 1))
    parameters = LAYERS * (LAYER + 2 * HIDDEN) + VOCABULARY * HIDDEN + HIDDEN
    assert step.weight_bytes == 4 * parameters
    assert full_work(model, read + 1, batch) == base + step
    assert kvp_work(model, read + 1, batch) == auxiliary + predictor + step
    assert recompute_work(model, read, batch, 0.0, 0) == Work()


def test_work_of_recomputation_counted_by_hand(fitted: Path) -> None:
    model, batch = kvp_mlx.load(str(fitted)), 2

    def lower(tokens: int, pairs: float) -> float:  # one whole layer from where the prefix ends
        return batch * (2 * tokens * LAYER + 4 * HEADS * HEAD_DIM * pairs)

    def upper(tokens: int) -> float:  # the last layer's K and V
        return batch * 2 * tokens * KV

    assert recompute_work(model, 40, batch, 0.0, 3).flops == lower(3, 38 + 39 + 40) + upper(3)
    # twelve tokens in the lower layer, too few to ask anything: the last ones
    assert recompute_work(model, 40, batch, 0.2, 0).flops == lower(12, sum(range(29, 41))) + upper(12)
    # twenty: the last 16, which the upper layer reads too, and four others, too few to ask for
    asking = sum(range(25, 41))
    assert recompute_work(model, 40, batch, 0.4, 0).flops == lower(20, asking + 4 * 12.5) + upper(16)
    # the last 16 are read to ask, and again with 16 others; eleven of these in the upper layer too
    expected = lower(16, asking) + lower(32, asking + 16 * 12.5) + upper(27)
    assert recompute_work(model, 40, batch, 0.76, 0).flops == expected
    tail = recompute_work(model, 40, batch, 0.76, 20)  # and 16 and 14 of the other twenty
    assert tail.flops == lower(16, asking) + lower(36, sum(range(21, 41)) + 16 * 10.5) + upper(34)
    alone, step = (model.auxiliary, 40, batch), step_work(model.base, 41, batch)
    joined = replace(step, weight_bytes=step.weight_bytes - 4 * (LAYERS - 1) * (LAYER + 2 * HIDDEN))  # read already
    assert kvp_work(model, 41, batch, 0.76, 20) == (
        prefill_work(*alone) + predictor_work(model, 40, batch) + tail + joined
    )


def test_prompts_are_fresh_and_exact() -> None:
    text = list(range(1000, 1500))
    prompts = [fresh_prompt(text, 700, number) for number in range(20)]
    assert {len(prompt) for prompt in prompts} == {700}
    assert len({prompt[0] for prompt in prompts}) == 20
    assert all((b - a) in (1, 1 - len(text)) for a, b in zip(prompts[7], prompts[7][1:], strict=False))


def test_auxiliary_arm_is_the_auxiliary_alone(base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp) -> None:
    out = tmp_path / "pruned"
    assert kvp("fit", base_dir, "--prune", 0.5, "--data", text_file, "--tokens", 64, "--out", out).code == 0
    common = ("--prompt-tokens", "30", "--rounds", 1, "--arms", "full,kvp,auxiliary", "--json")
    rows = {row["arm"]: row for row in kvp("bench", "ttft", "--model", out, *common).json()["rows"]}
    assert rows["full"]["flops_ratio"] < rows["kvp"]["flops_ratio"] < rows["auxiliary"]["flops_ratio"]


ALL_ARMS = "mlx-lm,full,kvp,kvp-8,auxiliary,layers-0.5,random-0.5,static-0.25,lazy-0.75-0.25,spec-0.5"


@pytest.mark.parametrize("batch", [1, 2])
def test_every_arm_is_measured(batch: int, fitted: Path, kvp: Kvp) -> None:
    common = ("--prompt-tokens", "40", "--rounds", 1, "--batch-size", batch, "--arms", ALL_ARMS, "--json")
    rows = kvp("bench", "ttft", "--model", fitted, *common).json()["rows"]
    assert [row["arm"] for row in rows] == ALL_ARMS.split(",")
    ratios = {row["arm"]: row["flops_ratio"] for row in rows}
    assert ratios["mlx-lm"] == ratios["full"] == 1
    assert 1 < ratios["kvp-8"] < ratios["kvp"] < ratios["auxiliary"]
    assert ratios["random-0.5"] > ratios["static-0.25"] / 2 > 0.5
    assert all(row["floor_ms"] > 0 and row["above_weights_bytes"] > 0 for row in rows)


def test_every_arm_ends_in_the_token_of_its_cache(fitted: Path) -> None:
    model = kvp_mlx.load(str(fitted))
    ids = mx.array([fresh_prompt(list(range(3, 90)), 60, 5)])
    found = {arm.name: first_token(model, arm, ids, step_size=16) for arm in parse_arms("full,kvp,random-1,static-1")}
    expected = model.base(ids)[:, -1]
    for name in ("full", "random-1", "static-1"):
        assert mx.allclose(found[name].logits, expected, atol=1e-3), name
    assert not mx.allclose(found["kvp"].logits, expected, atol=1e-3)
    assert all(first.tokens == mx.argmax(first.logits, axis=-1).tolist() for first in found.values())


@pytest.mark.parametrize("batch", [1, 3])
def test_mlx_lms_own_first_tokens_are_those_of_full_prefill(batch: int, fitted: Path) -> None:
    model = kvp_mlx.load(str(fitted))
    ids = mx.array([fresh_prompt(list(range(3, 90)), 60, number) for number in range(batch)])
    mlx_lm, full = (first_token(model, arm, ids, step_size=16) for arm in parse_arms("mlx-lm,full"))
    assert mlx_lm.tokens == full.tokens == mx.argmax(model.base(ids)[:, -1], axis=-1).tolist()


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_keeps_finished_lengths(
    end: type[BaseException], fitted: Path, tmp_path: Path, kvp: Kvp, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = ttft.measure_length

    def until_forty(model: object, text: object, length: int, *rest: object) -> object:
        if length == 40:
            raise end
        return measure(model, text, length, *rest)

    monkeypatch.setattr(ttft, "measure_length", until_forty)
    out = tmp_path / "result.json"
    lengths = ("--prompt-tokens", "20,30,40,50", "--rounds", 1, "--arms", "full,kvp")
    outcome = kvp("bench", "ttft", "--model", fitted, *lengths, "--out", out)
    assert outcome.code == 130
    result = json.loads(out.read_text())
    assert result["interrupted"]
    assert [row["prompt_tokens"] for row in result["rows"]] == [20, 20, 30, 30]


def test_impossible_sizes_are_refused_before_anything_is_built(kvp: Kvp) -> None:
    size = ("--prompt-tokens", "8192", "--batch-size", 64)
    outcome = kvp("bench", "ttft", "--preset", "openelm-3b-kvp-c-1_1b", *size)
    assert outcome.code == 2
    assert "GiB are free" in outcome.err


@pytest.mark.parametrize(
    ("options", "precision"),
    [(("--dtype", "float16"), "float16"), (("--dtype", "bfloat16", "--q-bits", "4"), "4-bit bfloat16")],
)
def test_precisions(options: tuple, precision: str, fitted: Path, kvp: Kvp) -> None:
    common = ("--prompt-tokens", "20", "--rounds", 1, "--json")
    result = kvp("bench", "ttft", "--model", fitted, *common, *options).json()
    assert result["precision"] == precision
    assert all(row["ttft_ms"]["median"] > 0 for row in result["rows"])


def test_reports_by_name_of_the_file(fitted: Path, tmp_path: Path, kvp: Kvp) -> None:
    common = ("bench", "ttft", "--model", fitted, "--prompt-tokens", "20", "--rounds", 2, "--arms", "full,kvp")
    picture = tmp_path / "bench.png"
    for name in ("r.csv", "r.md", "r.json"):
        assert kvp(*common, "--out", tmp_path / name).code == 0
    assert kvp("bench", "plot", tmp_path / "r.json", "--out", picture).code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert [row["arm"] for row in rows] == ["full", "kvp"]
    assert len(rows[0]["ttft_ms.samples"].split()) == 2
    table = (tmp_path / "r.md").read_text().splitlines()
    assert len(table) == 4
    assert {line.count("|") for line in table} == {table[0].count("|")}
    assert kvp("bench", "plot", tmp_path / "r.csv", "--out", picture).code == 2


def test_decode_and_memory(fitted: Path, kvp: Kvp) -> None:
    common = ("--model", fitted, "--prompt-tokens", "30", "--json")
    rows = kvp("bench", "decode", *common, "--new-tokens", 8, "--rounds", 2).json()["rows"]
    assert [row["arm"] for row in rows] == ["full", "kvp"]
    assert all(len(row["tps"]["samples"]) == 2 and row["tps"]["median"] > 0 for row in rows)
    assert rows[1]["ratio"] == pytest.approx(rows[1]["tps"]["median"] / rows[0]["tps"]["median"])
    result = kvp("bench", "memory", *common).json()
    full, predicted = result["rows"]
    assert predicted["weight_bytes"] - full["weight_bytes"] == result["predictor_and_auxiliary_bytes"] > 0
    for row in (full, predicted):
        assert row["total_bytes"] == row["weight_bytes"] + row["above_weights_bytes"]
        kv_bytes = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4  # of one position
        assert 30 * kv_bytes < row["above_weights_bytes"] < 3 * 256 * kv_bytes


def test_flops_agree_with_the_paper_to_the_printed_digit(kvp: Kvp) -> None:
    rows = kvp("bench", "flops", "--json").json()["rows"]
    assert len(rows) == 11
    for row in rows:
        assert f"{row['parameter_ratio']:.2f}" == f"{row['paper_ratio']:.2f}", row["preset"]
        assert row["flops_ratio"] > row["parameter_ratio"]  # skipped layers weigh more than maps and attention
        assert row["kvp_gflops"] == pytest.approx(
            row["auxiliary_prefill_gflops"] + row["predict_gflops"] + row["first_step_gflops"]
        )


def write_result(path: Path, samples: list[float]) -> Path:
    row = {"arm": "kvp", "prompt_tokens": 512, "batch_size": 1, "ttft_ms": {"samples": samples}}
    path.write_text(json.dumps({"format": 2, "rows": [row]}))
    return path


@pytest.mark.parametrize(
    ("samples", "code"),
    [([100, 101, 99, 100, 102], 0), ([110, 112, 111, 109, 110], 1), ([60, 140, 108, 95, 150], 0)],
)
def test_compare_fails_on_what_is_slower_beyond_chance(samples: list, code: int, tmp_path: Path, kvp: Kvp) -> None:
    before = write_result(tmp_path / "a.json", [100, 100, 101, 99, 100])
    after = write_result(tmp_path / "b.json", samples)
    outcome = kvp("bench", "compare", before, after, "--fail-above", "1.05", "--json")
    assert outcome.code == code
    row = outcome.json()["rows"][0]
    assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
    assert row["ratio"] == sorted(samples)[2] / 100
    assert kvp("bench", "compare", before, after).code == 0


def test_compare_refuses_other_files(tmp_path: Path, kvp: Kvp) -> None:
    good = write_result(tmp_path / "a.json", [1.0])
    (tmp_path / "b.json").write_text("{}")
    outcome = kvp("bench", "compare", good, tmp_path / "b.json")
    assert outcome.code == 2
    assert "b.json" in outcome.err


def test_what_is_slower_is_on_the_picture_as_well(fitted: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    row = {"arm": "kvp", "prompt_tokens": 64, "speedup": 0.5, "flops_ratio": 0.8}
    draw_realised(axes, [{"model": "tiny", "rows": [row]}])
    assert axes.get_ylim()[0] < 0.5
    assert axes.get_xlim()[0] < 0.8


def test_a_preset_is_no_model(fitted: Path, kvp: Kvp) -> None:
    outcome = kvp("bench", "ttft", "--preset", "openelm-1_1b-kvp-c-450m", "--model", fitted)
    assert (outcome.code, "leave out --model" in outcome.err) == (2, True)


def test_unknown_preset_is_bad_input(kvp: Kvp) -> None:
    outcome = kvp("bench", "ttft", "--preset", "openelm-7b")
    assert outcome.code == 2
    assert "openelm-3b-kvp-c-270m" in outcome.err
