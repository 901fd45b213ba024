"""Results of older formats are read as what they mean today, newer ones refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Kvp
from kvp_mlx.bench.document import FORMAT, read_result

from kvp_mlx.errors import InputError

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def timed(arm: str, tokens: int, median: float, speedup: float | None, flops_ratio: float = 1.0) -> dict[str, Any]:
    times = {"median": median, "q1": median, "q3": median, "samples": [median]}
    return {
        "arm": arm,
        "prompt_tokens": tokens,
        "batch_size": 1,
        "ttft_ms": times,
        "speedup": speedup,
        "flops_ratio": flops_ratio,
        "realised": None if arm == "llama.cpp" or speedup is None else speedup / flops_ratio,
    }


OLD = {
    "model": "m",
    "rows": [
        timed("full", 512, 2000.0, 1.0),
        timed("full-ours", 512, 1200.0, 2000 / 1200),
        timed("kvp", 512, 800.0, 2.5, 2.0),
        timed("llama.cpp", 512, 1500.0, 2000 / 1500),
        timed("full", 1024, 4000.0, 1.0),
        timed("kvp", 1024, 1600.0, 2.5, 2.0),
    ],
}


def written(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_an_old_result_is_read_with_todays_names(tmp_path: Path) -> None:
    result = read_result(written(tmp_path / "old.json", OLD))
    assert result["format"] == FORMAT
    assert result["model"] == "m"
    rows = {(row["arm"], row["prompt_tokens"]): row for row in result["rows"]}
    assert list(rows) == [
        *(("mlx-lm", 512), ("full", 512), ("kvp", 512), ("llama.cpp", 512), ("mlx-lm", 1024), ("kvp", 1024))
    ]
    speedups = {key: row["speedup"] for key, row in rows.items() if key[1] == 512}
    assert speedups == {
        ("mlx-lm", 512): 1200 / 2000,
        ("full", 512): 1.0,
        ("kvp", 512): 1.5,
        ("llama.cpp", 512): 1200 / 1500,
    }
    assert rows["kvp", 512]["realised"] == 0.75
    assert rows["llama.cpp", 512]["realised"] is None
    for arm in ("mlx-lm", "kvp"):  # ours was not timed at that length
        assert rows[arm, 1024]["speedup"] is rows[arm, 1024]["realised"] is None
    for old, new in zip(OLD["rows"], result["rows"], strict=True):
        assert old["ttft_ms"] == new["ttft_ms"]
        assert old["flops_ratio"] == new["flops_ratio"]


def test_what_is_in_todays_format_stays_as_it_is(tmp_path: Path) -> None:
    document = {"format": FORMAT} | OLD
    assert read_result(written(tmp_path / "new.json", document)) == document
    once = read_result(written(tmp_path / "old.json", OLD))
    assert read_result(written(tmp_path / "again.json", once)) == once


def test_of_memory_the_arms_are_renamed_and_of_decoding_not(tmp_path: Path) -> None:
    rows = {"memory": {"total_bytes": 9}, "decode": {"tps": {"median": 1.0}}}
    found = {}
    for command, values in rows.items():
        old = {"rows": [{"arm": "full", "prompt_tokens": 512} | values, {"arm": "kvp", "prompt_tokens": 512} | values]}
        result = read_result(written(tmp_path / f"{command}.json", old), command)
        assert result["format"] == FORMAT
        found[command] = [row["arm"] for row in result["rows"]]
    assert found == {"memory": ["mlx-lm", "kvp"], "decode": ["full", "kvp"]}


def test_old_and_new_are_compared_by_what_ran(tmp_path: Path, kvp: Kvp) -> None:
    new = {"format": FORMAT, "rows": [timed("full", 512, 600.0, 1.0), timed("mlx-lm", 512, 2000.0, 0.3)]}
    old, new = written(tmp_path / "old.json", OLD), written(tmp_path / "new.json", new)
    rows = kvp("bench", "compare", old, new, "--json").json()["rows"]
    assert {row["arm"]: row["ratio"] for row in rows} == {"mlx-lm": 1.0, "full": 0.5}


@pytest.mark.parametrize("command", ["compare", "plot"])
def test_a_newer_format_is_refused_in_one_line(command: str, tmp_path: Path, kvp: Kvp) -> None:
    newer = written(tmp_path / "newer.json", {"format": FORMAT + 1} | OLD)
    rest = (newer,) if command == "compare" else ("--out", tmp_path / "picture.png")
    outcome = kvp("bench", command, newer, *rest)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "newer.json has format 3" in outcome.err
    assert "update" in outcome.err


@pytest.mark.parametrize(
    "document", [[], {}, {"rows": [{}]}, {"rows": None}, {"format": "2", **OLD}, {"rows": [{"arm": 1}]}, "text"]
)
def test_other_documents_are_refused(document: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"other\.json"):
        read_result(written(tmp_path / "other.json", document))


def test_committed_results_of_the_bench_are_in_todays_format() -> None:
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    found = [document["format"] for document in documents if "arm" in document.get("rows", [{}])[0]]
    assert len(found) >= 9
    assert set(found) == {FORMAT}
