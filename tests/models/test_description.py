"""What a model's config alone tells: its layers by kind, and what is missing for a prediction."""

import json
from pathlib import Path

import pytest
from conftest import Kvp
from support.architectures import COMMON, CONFIGS, config_of, table

from kvp_mlx.errors import BundleError
from kvp_mlx.models.description import describe_model

ROOT = Path(__file__).parents[2]
JAMBA = COMMON | {
    "model_type": "jamba",
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
}


def written(config: dict, place: Path) -> Path:
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_missing_for_what_has_a_row(name: str, tmp_path: Path) -> None:
    assert describe_model(written(config_of(name), tmp_path))["missing"] == []


def test_layers_are_counted_by_kind(tmp_path: Path) -> None:
    found = describe_model(written(config_of("qwen3_5"), tmp_path))
    assert found["layers"] == {"gated delta net": 6, "full attention": 2}


def test_a_missing_kind_and_row_are_named(tmp_path: Path, kvp: Kvp) -> None:
    found = describe_model(written(JAMBA, tmp_path))
    assert found["layers"] == {"unknown (ArraysCache)": 2, "full attention": 2}
    assert found["missing"] == ["a kind for layers with ArraysCache", "a row for jamba"]
    assert "lacks a kind for layers with ArraysCache and a row for jamba" in kvp("info", tmp_path).out


def test_a_language_model_of_no_row_is_named(tmp_path: Path) -> None:
    text = COMMON | {"model_type": "mistral4"}
    with pytest.raises(BundleError, match="cannot make a model"):
        describe_model(written({"model_type": "mistral3", "text_config": text}, tmp_path))


def test_the_documented_table_is_the_tested_one() -> None:
    assert table() in (ROOT / "docs" / "families.md").read_text()
