"""A bundle's base is told from other models, and known again in another precision."""

import json
from pathlib import Path

import pytest
from support.directories import write_llama

import kvp_mlx
from kvp_mlx.bundle.config import read_config
from kvp_mlx.errors import BundleError, InputError

from ..conftest import Kvp


def other_precision(kvp: Kvp, base: Path, out: Path, *options: object) -> Path:
    outcome = kvp("convert", "hf", base, "--out", out, *options)
    assert outcome.code == 0, outcome.err
    return out


@pytest.mark.parametrize("options", [("--q-bits", 8), ("--q-bits", 4), ("--dtype", "bfloat16"), ("--dtype", "float16")])
def test_base_in_another_precision_is_known(
    bundle: Path, base_dir: Path, tmp_path: Path, kvp: Kvp, options: tuple[object, ...]
) -> None:
    other = other_precision(
        kvp, base_dir, tmp_path / "other", *options, *(("--q-group-size", 32) if 4 in options else ())
    )
    model = kvp_mlx.load(str(bundle), base_name=str(other))
    assert model.config.base.mark == read_config(bundle).base.mark


@pytest.mark.parametrize("options", [("--q-bits", 8), ()])
def test_another_model_of_the_same_shape_is_refused(
    bundle: Path, tmp_path: Path, kvp: Kvp, options: tuple[object, ...]
) -> None:
    other = other_precision(kvp, write_llama(tmp_path / "base", seed=9), tmp_path / "other", *options)
    with pytest.raises(BundleError, match="weights differ by"):
        kvp_mlx.load(str(bundle), base_name=str(other))
    assert kvp_mlx.load(str(bundle), base_name=str(other), allow_base_mismatch=True).base is not None


@pytest.mark.parametrize("options", [("--q-bits", 8), ()])
def test_other_arguments_and_vocabulary_are_refused(
    bundle: Path, base_dir: Path, tmp_path: Path, kvp: Kvp, options: tuple[object, ...]
) -> None:
    base = other_precision(kvp, base_dir, tmp_path / "other", *options)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 77.0}))
    if options:
        with pytest.raises(BundleError, match=r"rope_theta is 77\.0, not"):
            kvp_mlx.load(str(bundle), base_name=str(base))
    else:  # the very weights, which somebody runs with another RoPE: raw keys and values are the same
        assert kvp_mlx.load(str(bundle), base_name=str(base)).base_config["rope_theta"] == 77
    (base / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    if options:
        with pytest.raises(BundleError, match="another vocabulary"):
            kvp_mlx.load(str(bundle), base_name=str(base))


def test_base_of_a_model_without_a_bundle_is_refused(base_dir: Path) -> None:
    with pytest.raises(InputError, match="no bundle"):
        kvp_mlx.bundle.loading.load_any(str(base_dir), base_name=str(base_dir))


def test_commands_run_on_another_copy_of_the_base(bundle: Path, base_dir: Path, tmp_path: Path, kvp: Kvp) -> None:
    other = other_precision(kvp, base_dir, tmp_path / "other", "--q-bits", 8)
    found = kvp("generate", "the old harbour", "--model", bundle, "--base", other, "--max-tokens", 3, "--json")
    assert found.code == 0, found.err
    assert found.json()["tokens"]
    refused = kvp("generate", "hello", "--model", bundle, "--base", tmp_path / "nowhere")
    assert refused.code == 2 and "nowhere" in refused.err


def test_info_says_that_any_precision_will_do(bundle: Path, kvp: Kvp) -> None:
    assert "in any precision" in kvp("info", bundle).out
    config = json.loads((bundle / "kvp.json").read_text())
    config["base"]["mark"] = None
    (bundle / "kvp.json").write_text(json.dumps(config))
    assert "in any precision" not in kvp("info", bundle).out
