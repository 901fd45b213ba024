"""What ``prefill="auto"`` does with the threshold that was calibrated."""

from dataclasses import replace
from pathlib import Path

import pytest

import kvp_mlx
from kvp_mlx.engine import calibration
from kvp_mlx.engine.calibration import AUTO_MIN_PROMPT_TOKENS, auto_min_tokens, calibration_path, store_auto_min


@pytest.fixture
def model(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> kvp_mlx.KVPModel:
    monkeypatch.setenv("KVP_CACHE_DIR", str(tmp_path / "cache"))
    return kvp_mlx.load(str(fitted))


def path_taken(model: kvp_mlx.KVPModel, tokens: int) -> str:
    dial = {"prefill": "auto", "exact_head": 0, "exact_tail": 0}
    return next(kvp_mlx.stream_generate(model, list(range(3, 3 + tokens)), **dial, max_tokens=1)).path


def test_auto_follows_what_was_calibrated(model: kvp_mlx.KVPModel, base_dir: Path) -> None:
    assert auto_min_tokens(model) == AUTO_MIN_PROMPT_TOKENS
    assert path_taken(model, 21) == "full"
    store_auto_min(model, 20)
    assert [path_taken(model, tokens) for tokens in (20, 21)] == ["full", "kvp"]
    store_auto_min(model, None)
    assert path_taken(model, 200) == "full"


def test_a_damaged_file_is_as_none(model: kvp_mlx.KVPModel) -> None:
    store_auto_min(model, 20)
    calibration_path().write_text("{")
    assert auto_min_tokens(model) == AUTO_MIN_PROMPT_TOKENS


def test_a_threshold_is_of_one_version_and_one_bundle(model: kvp_mlx.KVPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    store_auto_min(model, 20)
    base = model.config.base.model_copy(update={"fingerprint": "sha256:other"})
    other = replace(model, config=model.config.model_copy(update={"base": base}))
    assert auto_min_tokens(other) == AUTO_MIN_PROMPT_TOKENS
    assert auto_min_tokens(model) == 20
    monkeypatch.setattr(calibration, "__version__", "9.9")
    assert auto_min_tokens(model) == AUTO_MIN_PROMPT_TOKENS
