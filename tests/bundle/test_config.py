"""kvp.json: format 2, and format 1 as it was written until 0.4."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from kvp_mlx.bundle.config import BundleConfig, RecomputeConfig, read_config
from kvp_mlx.errors import BundleError

FORMAT_1 = {
    "format_version": 1,
    "base": {"fingerprint": "sha256:0", "path": "base", "hub_id": None, "revision": None, "alias": None},
    "auxiliary": {
        "kind": "prefix",
        "layers": 1,
        "retained_layers": None,
        "fingerprint": None,
        "adapter_rank": None,
        "alias": None,
    },
    "predictor": {"input": "hidden_state", "layer_map": [None, None, [1]], "recompute": 0.25},
    "training": {"method": "ridge"},
    "measured": {"recovery": 0.9},
}


def read(directory: Path, data: object) -> BundleConfig:
    (directory / "kvp.json").write_text(json.dumps(data))
    return read_config(directory)


def test_format_1_keeps_its_share_and_gets_the_values_that_were_the_codes(tmp_path: Path) -> None:
    config = read(tmp_path, FORMAT_1)
    assert config.format_version == 2
    assert config.recompute is not None
    assert config.recompute.model_dump() == {
        "share": 0.25,
        "asking_tokens": 16,
        "asks": "base",
        "attention_weight": 0.5,
        "attention_reach": 12,
        "attention_reach_before": 0,
        "lower_layers": 2 / 3,
        "upper_from": 0.25,
    }
    assert config.predictor.layer_map == (None, None, (1,))
    assert (config.training, config.measured) == ({"method": "ridge"}, {"recovery": 0.9})


@pytest.mark.parametrize("predictor", [{"recompute": None}, {}])
def test_format_1_without_an_estimator_has_no_section(predictor: dict, tmp_path: Path) -> None:
    bare = {key: value for key, value in FORMAT_1["predictor"].items() if key != "recompute"}
    assert read(tmp_path, FORMAT_1 | {"predictor": bare | predictor}).recompute is None


def test_what_is_saved_is_format_2_and_reads_the_same(tmp_path: Path) -> None:
    config = read(tmp_path, FORMAT_1)
    config.save(tmp_path)
    data = json.loads((tmp_path / "kvp.json").read_text())
    assert data["format_version"] == 2
    assert data["recompute"]["share"] == 0.25
    assert "recompute" not in data["predictor"]
    assert read_config(tmp_path) == config


def test_another_base_can_have_values_of_its_own(tmp_path: Path) -> None:
    own = {"share": 0.1, "asking_tokens": 8, "attention_weight": 1.0, "attention_reach": 0, "lower_layers": 1.0}
    data = json.loads(read(tmp_path, FORMAT_1).model_dump_json()) | {"recompute": own}
    assert read(tmp_path, data).recompute == RecomputeConfig(**own)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"surprise": 1}, "surprise"),
        ({"recompute": {"share": 0.5}}, "recompute: no field of format 1"),
        ({"predictor": FORMAT_1["predictor"] | {"surprise": 1}}, "predictor.surprise"),
        ({"predictor": FORMAT_1["predictor"] | {"recompute": 1.5}}, "recompute.share"),
        ({"predictor": FORMAT_1["predictor"] | {"recompute": "much"}}, "recompute.share"),
        ({"predictor": None}, "predictor"),
        ({"format_version": 2}, "predictor.recompute"),
        ({"auxiliary": {"kind": "prefix", "layers": 2, "adapter_rank": 2**40}}, "auxiliary.adapter_rank"),
        ({"predictor": FORMAT_1["predictor"] | {"preceding": 10**7}}, "predictor.preceding"),
        ({"format_version": 3}, "format version 3, newer than 2"),
        ({"format_version": True}, "format_version"),
        ({"format_version": 0}, "format_version"),
        ({"format_version": "1"}, "format_version"),
    ],
)
def test_what_neither_format_has_is_refused_by_name(changes: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError) as refused:
        read(tmp_path, FORMAT_1 | changes)
    assert named in str(refused.value)
    assert "kvp.json" in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        {"share": -0.1},
        {"share": 1.1},
        {"asking_tokens": 0},
        {"attention_weight": -1.0},
        {"attention_weight": float("inf")},
        {"attention_reach": -1},
        {"attention_reach_before": -1},
        {"attention_reach": 2**31},
        {"attention_reach_before": 2**31},
        {"lower_layers": 1e-300},
        {"lower_layers": 0.0},
        {"lower_layers": 1.1},
        {"upper_from": 1.0},
        {"surprise": 1},
    ],
)
def test_useless_settings_are_refused(values: dict) -> None:
    with pytest.raises(ValidationError):
        RecomputeConfig(**values)


FORMAT_2 = {**FORMAT_1, "format_version": 2, "predictor": {"input": "hidden_state", "layer_map": [None, None, [1]]}}
FULL = {"quality": "balanced", "from_tokens": 0, "path": "full"}
SOONER = {"quality": "balanced", "from_tokens": 256, "exact_head": 0, "exact_tail": 32, "recompute": 0.1}


def test_measured_dials_are_kept(tmp_path: Path) -> None:
    config = read(tmp_path, FORMAT_2 | {"recompute": {}, "dials": [FULL, SOONER]})
    assert [dial.model_dump(exclude_none=True) for dial in config.dials] == [FULL, SOONER | {"path": "auto"}]
    config.save(tmp_path)
    assert read_config(tmp_path) == config
    assert read(tmp_path, FORMAT_2).dials == ()


@pytest.mark.parametrize(
    ("dials", "named"),
    [
        ([FULL, SOONER | {"quality": "exact"}], "dials.1.quality"),
        ([SOONER | {"from_tokens": -1}], "dials.0.from_tokens"),
        ([SOONER | {"exact_tail": 1.5}], "dials.0.exact_tail"),
        ([SOONER | {"recompute": 2}], "dials.0.recompute"),
        ([SOONER | {"path": "kvp"}], "dials.0.path"),
        ([SOONER | {"surprise": 1}], "dials.0.surprise"),
        ([FULL | {"exact_tail": 3}], "path 'full' reads everything"),
        ([SOONER, SOONER], "dials: balanced from 256 tokens on stands there twice"),
        ([{"quality": "fast"}], "dials.0.from_tokens"),
        ({"balanced": []}, "dials"),
    ],
)
def test_measured_dials_that_say_nothing_are_refused_by_name(dials: object, named: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=re.escape(named)):
        read(tmp_path, FORMAT_2 | {"recompute": {}, "dials": dials})


def test_no_dial_recomputes_what_the_bundle_cannot(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="dials: without a section recompute"):
        read(tmp_path, FORMAT_2 | {"dials": [SOONER]})
    assert read(tmp_path, FORMAT_2 | {"dials": [SOONER | {"recompute": 0}]}).dials
