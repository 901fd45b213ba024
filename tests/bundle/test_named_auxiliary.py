"""An auxiliary that is a named base with low-rank updates that the bundle keeps: kind ``model`` at a tenth of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import Kvp
from mlx.utils import tree_flatten
from support.directories import write_llama

from kvp_mlx.bundle.adapter import SCALE
from kvp_mlx.bundle.loading import KVPModel, load
from kvp_mlx.engine.speculative import Drafting
from kvp_mlx.errors import BundleError, InputError
from kvp_mlx.models.pruning import write_pruned
from kvp_mlx.models.safetensors import fingerprint
from kvp_mlx.train.fit import FitOptions, fit_bundle
from kvp_mlx.train.loop import TrainOptions
from kvp_mlx.train.run import train_bundle

NAME, RANK = "qwen2.5-coder-0.5b", 32


def quantised(arrays: dict[str, mx.array], bits: int) -> dict[str, mx.array]:
    found = {}
    for name, array in arrays.items():
        parts = mx.quantize(array, group_size=32, bits=bits)
        found |= dict(zip((name, f"{name}.scales", f"{name}.biases"), parts, strict=True))
    return found


def weights_of(model: KVPModel) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(model.auxiliary.parameters())}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model that goes by the name of a named base."""
    place = write_llama(tmp_path / "small", seed=5)
    for module in ("bundle.loading", "bundle.named", "cli.models", "train.fit", "train.run"):
        monkeypatch.setattr(f"kvp_mlx.{module}.find_model", lambda name, **_: place if name == NAME else Path(name))
    return place


@pytest.fixture
def adapted(small: Path, base_dir: Path, text_file: Path, tmp_path: Path) -> Path:
    """A bundle whose auxiliary is that base with random updates in adapter.safetensors."""
    out = tmp_path / "bundle"
    fit_bundle(str(base_dir), [text_file], out, FitOptions(auxiliary=NAME, tokens=600, window=64))
    rng, updates = np.random.default_rng(7), {}
    for name, array in mx.load(str(small / "model.safetensors")).items():
        if name.endswith("proj.weight"):
            rows, width = array.shape
            for part, shape in (("a", (width, RANK)), ("b", (RANK, rows))):
                values = rng.normal(0, 0.1, shape).astype(np.float32)
                updates[f"{name.removesuffix('.weight')}.lora_{part}"] = mx.array(values)
    mx.save_safetensors(str(out / "adapter.safetensors"), updates)
    config = json.loads((out / "kvp.json").read_text())
    config["auxiliary"] |= {"adapter_rank": RANK}
    (out / "kvp.json").write_text(json.dumps(config))
    return out


def test_a_bundle_names_a_named_model_and_keeps_no_copy(
    small: Path, base_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    options, named, copied = (
        FitOptions(auxiliary=str(small), tokens=600, window=64),
        tmp_path / "named",
        tmp_path / "copied",
    )
    fit_bundle(str(base_dir), [text_file], copied, options)
    fit_bundle(str(base_dir), [text_file], named, replace(options, auxiliary=NAME))
    assert (copied / "auxiliary").is_dir() and not (named / "auxiliary").exists()
    configs = [json.loads((bundle / "kvp.json").read_text())["auxiliary"] for bundle in (copied, named)]
    assert configs[1] == configs[0] | {"alias": NAME, "fingerprint": fingerprint(small)}
    assert (named / "predictor.safetensors").read_bytes() == (copied / "predictor.safetensors").read_bytes()
    found, expected = (weights_of(load(str(bundle))) for bundle in (named, copied))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_a_folder_of_a_named_models_name_is_that_folder(
    base_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kvp: Kvp
) -> None:
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / NAME, seed=5)
    options = ("--data", text_file, "--tokens", 600, "--window", 64, "--out", "bundle")
    assert kvp("fit", base_dir, "--auxiliary", f"./{NAME}", *options).code == 0
    assert json.loads(Path("bundle/kvp.json").read_text())["auxiliary"]["alias"] is None
    assert Path("bundle/auxiliary").is_dir()


def test_a_bundle_is_pulled_with_its_named_model(adapted: Path, small: Path, kvp: Kvp) -> None:
    assert kvp("models", "pull", adapted).out.splitlines()[0::2] == [str(adapted), str(small)]


def test_updates_are_taken_up_into_the_named_model(adapted: Path, small: Path) -> None:
    updates = {
        name: np.array(array, np.float64) for name, array in mx.load(str(adapted / "adapter.safetensors")).items()
    }
    found = weights_of(load(str(adapted)))
    for name, array in mx.load(str(small / "model.safetensors")).items():
        expected, stem = np.array(array, np.float64), name.removesuffix(".weight")
        if f"{stem}.lora_a" in updates:
            expected = expected + SCALE * (updates[f"{stem}.lora_a"] @ updates[f"{stem}.lora_b"]).T
        np.testing.assert_allclose(found[name], expected, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (6, 0.06)])
def test_updates_may_be_stored_quantised(adapted: Path, bits: int, error: float) -> None:
    exact, path = weights_of(load(str(adapted))), adapted / "adapter.safetensors"
    mx.save_safetensors(str(path), quantised(dict(mx.load(str(path))), bits))
    found = weights_of(load(str(adapted)))
    assert found.keys() == exact.keys()
    differences = [np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name]) for name in exact]
    assert 0 < max(differences) < error


def test_the_prompt_is_read_by_the_updated_model(adapted: Path, kvp: Kvp) -> None:
    asked = ("generate", "A long walk by the river, and home. " * 9, "--model", adapted, "--max-tokens", 4, "--json")
    assert kvp(*asked, "--prefill", "kvp").json()["prefill"] == "kvp"
    result = kvp("info", adapted, "--json").json()
    assert result["auxiliary"]["alias"] == NAME
    assert result["size_bytes"]["adapter"] == (adapted / "adapter.safetensors").stat().st_size
    assert NAME in kvp("info", adapted).out


def test_training_the_maps_keeps_the_updates(adapted: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "trained"
    train_bundle(str(adapted), [str(texts)], out, TrainOptions(minutes=None, tokens=128, window=64, right=16))
    assert (out / "adapter.safetensors").read_bytes() == (adapted / "adapter.safetensors").read_bytes()
    assert not (out / "auxiliary").exists()
    before, after = weights_of(load(str(adapted))), weights_of(load(str(out)))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_training_the_auxiliary_as_well_puts_it_into_the_bundle(adapted: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "trained"
    options = TrainOptions(minutes=None, tokens=128, window=64, right=16, lora_rank=2)
    train_bundle(str(adapted), [str(texts)], out, options)
    config = json.loads((out / "kvp.json").read_text())["auxiliary"]
    assert (config["alias"], config["adapter_rank"]) == (None, None)
    assert config["fingerprint"] == fingerprint(out / "auxiliary")
    assert not (out / "adapter.safetensors").exists()
    before, after = weights_of(load(str(adapted))), weights_of(load(str(out)))
    assert before.keys() == after.keys()
    assert max(np.abs(before[name] - after[name]).max() for name in before) < 0.05


def test_the_first_layers_of_a_named_model_can_read(
    small: Path, base_dir: Path, text_file: Path, texts: Path, tmp_path: Path
) -> None:
    cut, bundle, trained = tmp_path / "cut", tmp_path / "bundle", tmp_path / "trained"
    cut.mkdir()
    write_pruned(small, [0, 1], cut)
    fit_bundle(str(base_dir), [text_file], bundle, FitOptions(auxiliary=str(cut), tokens=600, window=64))
    expected = weights_of(load(str(bundle)))
    shutil.rmtree(bundle / "auxiliary")
    config = json.loads((bundle / "kvp.json").read_text())
    named = {"alias": NAME, "fingerprint": fingerprint(small)}
    (bundle / "kvp.json").write_text(json.dumps(config | {"auxiliary": config["auxiliary"] | named}))
    found = weights_of(load(str(bundle)))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    train_bundle(str(bundle), [str(texts)], trained, TrainOptions(minutes=None, tokens=128, window=64, lora_rank=2))
    assert weights_of(load(str(trained))).keys() == expected.keys()
    with pytest.raises(InputError, match="first layers, without those that choose"):
        Drafting("auxiliary").settled(load(str(bundle)), is_quantised=False)
    depth = json.loads((small / "config.json").read_text())["num_hidden_layers"]
    config["auxiliary"] |= named | {"layers": depth + 1}
    (bundle / "kvp.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match=f"{depth + 1} auxiliary layers do not fit"):
        load(str(bundle))


def test_what_is_wrong_with_updates_is_named(adapted: Path) -> None:
    path = adapted / "adapter.safetensors"
    updates = dict(mx.load(str(path)))
    mx.eval(updates)
    name = "model.layers.1.mlp.up_proj.lora_a"
    for change, named in (
        ({key: array for key, array in updates.items() if key != name}, f"lacks the tensor {name}"),
        (updates | {name: updates[name][:5]}, f"{name} has shape"),
        (updates | {name: updates[name] * float("nan")}, "not finite"),
        (updates | {"stranger": mx.zeros(3)}, "unknown tensor stranger"),
        (updates | {name: mx.zeros((64, 3), mx.uint32), f"{name}.scales": mx.zeros((64, 5))}, "does not know"),
        (updates | {name: mx.zeros((64, 8), mx.uint32), f"{name}.scales": mx.zeros((64, 64))}, "does not know"),
    ):
        mx.save_safetensors(str(path), change)
        with pytest.raises(BundleError, match=named):
            load(str(adapted))
    path.unlink()
    with pytest.raises(BundleError, match=r"adapter\.safetensors"):
        load(str(adapted))


@pytest.mark.parametrize("auxiliary", [{"kind": "prefix", "alias": NAME}, {"kind": "model", "adapter_rank": 4}])
def test_what_does_not_go_together_is_refused(adapted: Path, auxiliary: dict) -> None:
    config = json.loads((adapted / "kvp.json").read_text())
    config["auxiliary"] = {"layers": 2} | auxiliary
    (adapted / "kvp.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match=r"kvp.json: auxiliary: .* belongs to kind"):
        load(str(adapted))
