"""``kvp bench calibrate``: from which prompt length prediction pays, and where that is kept."""

from pathlib import Path

import pytest
from conftest import Kvp
from kvp_mlx.bench.calibrate import threshold

import kvp_mlx
from kvp_mlx.engine.calibration import auto_min_tokens, calibration_path


@pytest.fixture
def model(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> kvp_mlx.KVPModel:
    monkeypatch.setenv("KVP_CACHE_DIR", str(tmp_path / "cache"))
    return kvp_mlx.load(str(fitted))


def test_the_command_stores_what_it_found(model: kvp_mlx.KVPModel, fitted: Path, kvp: Kvp) -> None:
    outcome = kvp("bench", "calibrate", "--model", fitted, "--rounds", 1, "--exact-tail", 4, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json()
    assert result["pays_from"] == threshold(result["rows"])
    assert result["stored"] == str(calibration_path())
    expected = result["pays_from"]
    assert auto_min_tokens(model) == expected if expected else auto_min_tokens(model) > 10**9


@pytest.mark.parametrize(
    ("kvp_ms", "pays_from"), [([2, 2, 2], None), ([2, 0.5, 0.5], 16), ([0.5, 2, 0.5], 32), ([0.5] * 3, 8)]
)
def test_threshold_is_where_it_pays_from_then_on(kvp_ms: list[float], pays_from: int | None) -> None:
    rows = [{"predicted_tokens": n, "full_ms": 1, "kvp_ms": ms} for n, ms in zip((8, 16, 32), kvp_ms, strict=True)]
    assert threshold(rows) == pays_from
