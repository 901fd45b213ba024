"""The bench: honest rows, and arithmetic that agrees with counting by hand."""

import json
from pathlib import Path

import pytest
from conftest import Kvp
from kvp_mlx.bench.cost import full_work, kvp_work, predictor_work, prefill_work, step_work
from kvp_mlx.bench.ttft import fresh_prompt

import kvp_mlx

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
        *(("full", 20), ("kvp", 20), ("full", 50), ("kvp", 50))
    ]
    for row in result["rows"]:
        assert row.keys() >= ROW_KEYS
        times = row["ttft_ms"]
        assert len(times["samples"]) == 3
        assert min(times["samples"]) <= times["q1"] <= times["median"] <= times["q3"] <= max(times["samples"])
        assert row["realised"] == pytest.approx(row["speedup"] / row["flops_ratio"])
        assert row["peak_memory_bytes"] > 0
    full, predicted = result["rows"][2:]
    assert full["speedup"] == full["flops_ratio"] == 1
    assert predicted["flops_ratio"] > 1
    for part in ("auxiliary_prefill_ms", "predict_ms", "first_step_ms"):
        assert 0 < predicted[part] < predicted["ttft_ms"]["median"]


def test_table_for_people(fitted: Path, kvp: Kvp) -> None:
    outcome = kvp("bench", "ttft", "--model", fitted, "--prompt-tokens", "20", "--rounds", 1)
    assert outcome.code == 0
    assert "speed-up" in outcome.out


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
    assert predictor.flops == batch * 2 * read * HIDDEN * KV / HIDDEN  # one predicted layer, keys and values
    assert predictor.weight_bytes == 4 * (HIDDEN + 1) * KV / HIDDEN
    step = step_work(model.base, read + 1, batch)
    assert step.flops == batch * LAYERS * (2 * LAYER + 4 * HEADS * HEAD_DIM * (read + 1))
    parameters = LAYERS * (LAYER + 2 * HIDDEN) + VOCABULARY * HIDDEN + HIDDEN
    assert step.weight_bytes == 4 * parameters
    assert full_work(model, read + 1, batch) == base + step
    assert kvp_work(model, read + 1, batch) == auxiliary + predictor + step


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


def test_prefix_cannot_answer_alone(fitted: Path, kvp: Kvp) -> None:
    outcome = kvp("bench", "ttft", "--model", fitted, "--arms", "full,auxiliary", "--prompt-tokens", "20")
    assert outcome.code == 2
    assert "cannot answer alone" in outcome.err


def test_unknown_preset_is_bad_input(kvp: Kvp) -> None:
    outcome = kvp("bench", "ttft", "--preset", "openelm-7b")
    assert outcome.code == 2
    assert "openelm-3b-kvp-c-270m" in outcome.err
