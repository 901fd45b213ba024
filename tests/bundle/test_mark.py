"""A bundle's base is told from other models, and known again in another precision."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model as mlx_lm_load_model
from mlx_lm.utils import quantize_model, save_config, save_model
from support.directories import write_llama

import kvp_mlx
from kvp_mlx.bundle.config import read_config
from kvp_mlx.bundle.mark import check_mark, mark_of
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


def test_base_whose_head_is_stored_otherwise_is_known(bundle: Path, base_dir: Path, tmp_path: Path) -> None:
    """Some files hold a tied embedding a second time, as the head."""
    other = Path(shutil.copytree(base_dir, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    weights = mx.load(str(other / "model.safetensors"))
    if is_tied := config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 1.01
    else:
        del weights["lm_head.weight"]
    mx.save_safetensors(str(other / "model.safetensors"), weights)
    (other / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": not is_tied}))
    assert hasattr(kvp_mlx.load(str(bundle), base_name=str(other)).base, "lm_head") is is_tied


@pytest.mark.parametrize("options", [("--q-bits", 8), ()])
def test_another_model_of_the_same_shape_is_refused(
    bundle: Path, tmp_path: Path, kvp: Kvp, options: tuple[object, ...]
) -> None:
    other = other_precision(kvp, write_llama(tmp_path / "base", seed=9), tmp_path / "other", *options)
    with pytest.raises(BundleError, match="weights differ by"):
        kvp_mlx.load(str(bundle), base_name=str(other))
    assert kvp_mlx.load(str(bundle), base_name=str(other), allow_base_mismatch=True).base is not None


@pytest.mark.parametrize(
    ("kind", "factor", "is_known"),
    [
        ("norm", 1.015, True),
        ("norm", 1.025, False),
        ("matrix", 1.3, True),
        ("matrix", 0.82, True),
        ("matrix", 1.37, False),
    ],
)
def test_weights_differ_by_what_rounding_makes_and_no_more(
    base_dir: Path, kind: str, factor: float, is_known: bool
) -> None:
    model = mlx_lm_load_model(base_dir)[0]
    mark = mark_of(model, None)
    rows = {
        name: tuple(value * factor for value in row) if (name.count(",") > 0) == (kind == "matrix") else row
        for name, row in mark.rows.items()
    }
    changed = mark.model_copy(update={"rows": rows})
    with nullcontext() if is_known else pytest.raises(BundleError, match="weights differ by"):
        check_mark(changed, model, None)


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


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no rows": (lambda mark: mark.pop("rows"), "base.mark.rows"),
    "rows as a list": (lambda mark: mark.update(rows=[1.0]), "base.mark.rows"),
    "a row as text": (lambda mark: mark["rows"].update({first(mark): "0.1"}), "base.mark.rows"),
    "a row of texts": (lambda mark: mark["rows"].update({first(mark): ["x"]}), "base.mark.rows"),
    "a row of rows": (lambda mark: mark["rows"].update({first(mark): [[0.1]]}), "base.mark.rows"),
    "NaN": (lambda mark: mark["rows"][first(mark)].__setitem__(0, float("nan")), "base.mark.rows"),
    "infinity": (lambda mark: mark["rows"][first(mark)].__setitem__(0, float("-inf")), "base.mark.rows"),
    "arguments as a list": (lambda mark: mark.update(arguments=[]), "base.mark.arguments"),
    "a number for the vocabulary": (lambda mark: mark.update(vocabulary=5), "base.mark.vocabulary"),
    "a field of its own": (lambda mark: mark.update(surprise=1), "base.mark.surprise"),
    "another vocabulary": (lambda mark: mark.update(vocabulary="0" * 64), "another vocabulary"),
    "a short row": (lambda mark: mark["rows"][first(mark)].pop(), "other names or shapes"),
    "a long row": (lambda mark: mark["rows"][first(mark)].append(0.5), "other names or shapes"),
    "an empty row": (lambda mark: mark["rows"][first(mark)].clear(), "other names or shapes"),
    "a row less": (lambda mark: mark["rows"].pop(first(mark)), "other names or shapes"),
    "a row more": (lambda mark: mark["rows"].update({"model.extra|2,2": [0.5]}), "other names or shapes"),
    "another name": (lambda mark: mark["rows"].update({"\ud800": mark["rows"].pop(first(mark))}), ""),
    "no row": (lambda mark: mark["rows"].clear(), "other names or shapes"),
    "huge numbers": (lambda mark: mark["rows"].update({first(mark): [1e308] * 32}), "weights differ by"),
}


def first(mark: dict[str, Any]) -> str:
    return next(iter(mark["rows"]))


@pytest.fixture(scope="module")
def eight_bits(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base in a precision in which only the mark knows it."""
    out = tmp_path_factory.mktemp("precision") / "model"
    model, config = quantize_model(*mlx_lm_load_model(base_dir), group_size=32, bits=8)
    save_model(out, model)
    save_config(config, out / "config.json")
    for path in base_dir.glob("token*"):
        (out / path.name).write_bytes(path.read_bytes())
    return out


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_marks_are_refused_by_name(name: str, bundle: Path, eight_bits: Path, kvp: Kvp) -> None:
    change, named = MALFORMED[name]
    data = json.loads((bundle / "kvp.json").read_text())
    change(data["base"]["mark"])
    (bundle / "kvp.json").write_text(json.dumps(data))
    found = kvp("generate", "hello", "--model", bundle, "--base", eight_bits, "--max-tokens", 1)
    assert (found.code, found.out) == (2, ""), found.err
    assert found.err.startswith("kvp: ")
    assert found.err.count("\n") == 1
    assert named in found.err
    assert "report it" not in found.err


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
