"""``kvp convert hf``: mlx-lm's own reading of a Hugging Face directory, written again in the wanted precision."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import Kvp
from mlx.utils import tree_flatten
from mlx_lm.utils import load, load_model, quantize_model
from support.architectures import CONFIGS as ARCHITECTURES
from support.architectures import config_of
from support.directories import TEXT, write_llama, write_random
from support.families import CONFIGS, tiny_model

IDS = mx.array([[5, 9, 10, 7, 25, 3]])


def write_family(directory: Path, name: str) -> Path:
    """Write a tiny model of a family as a directory, as Hugging Face keeps it."""
    model = tiny_model(name)
    directory.mkdir()
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "pt"})
    config = {key: value for key, value in vars(model.args).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config | {"model_type": name}))
    return directory


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name: str, tmp_path: Path, kvp: Kvp) -> None:
    source, out = write_family(tmp_path / "source", name), tmp_path / "out"
    outcome = kvp("convert", "hf", source, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json()["model"] == name
    assert outcome.json()["bits_per_weight"] == 32
    assert (load_model(out)[0](IDS) == tiny_model(name)(IDS)).all()


WRAPPED = [name for name, config in ARCHITECTURES.items() if "text_config" in config]


@pytest.mark.parametrize("options", [(), ("--q-bits", 8, "--q-group-size", 32)])
@pytest.mark.parametrize("name", WRAPPED)
def test_models_with_other_parts_beside_the_language_model(name: str, options: tuple, tmp_path: Path, kvp: Kvp) -> None:
    source, out = write_random(tmp_path / "source", config_of(name)), tmp_path / "out"
    outcome = kvp("convert", "hf", source, "--out", out, *options)
    if options and name == "qwen3_5_moe":  # whose router is quantised in groups of 64, and this one is 32 wide
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert "cannot be quantised" in outcome.err
        return
    assert outcome.code == 0, outcome.err
    difference = mx.abs(load_model(out)[0](IDS) - load_model(source)[0](IDS))
    assert float(difference.mean()) < (0.2 if options else 1e-5)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64)])
def test_quantised_as_mlx_lm_does(bits: int, group: int, tmp_path: Path, kvp: Kvp) -> None:
    source, out = write_llama(tmp_path / "source"), tmp_path / "out"
    outcome = kvp("convert", "hf", source, "--out", out, "--q-bits", bits, "--q-group-size", group)
    assert outcome.code == 0, outcome.err
    expected, _ = quantize_model(*load_model(source), group, bits)
    arrays = mx.load(str(out / "model.safetensors"))
    assert arrays.keys() == dict(tree_flatten(expected.parameters())).keys()
    assert all((arrays[name] == array).all() for name, array in tree_flatten(expected.parameters()))
    assert (load_model(out)[0](IDS) == expected(IDS)).all()


def test_dtype_and_tokenizer(tmp_path: Path, kvp: Kvp) -> None:
    source, out = write_llama(tmp_path / "source"), tmp_path / "out"
    assert kvp("convert", "hf", source, "--out", out, "--dtype", "bfloat16").code == 0
    model, tokenizer = load(str(out))
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.bfloat16}
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    second = tmp_path / "second"
    assert kvp("convert", "hf", out, "--out", second, "--dtype", "float32").code == 0
    np.testing.assert_allclose(load(str(second))[0](IDS), load(str(source))[0](IDS), atol=0.1)


def test_what_cannot_be_converted_is_one_line(tmp_path: Path, kvp: Kvp) -> None:
    quantised = tmp_path / "quantised"
    assert kvp("convert", "hf", write_llama(tmp_path / "source"), "--out", quantised, "--q-bits", 4).code == 0
    other = write_llama(tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    pickled = write_llama(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for source, options, named in (
        (quantised, ["--q-bits", 4], "already quantised"),
        (other, [], "mamba"),
        (pickled, [], "no model*.safetensors"),
        (tmp_path / "nowhere", [], "nowhere"),
    ):
        outcome = kvp("convert", "hf", source, "--out", tmp_path / "out", *options)
        assert outcome.code == 2
        assert named in outcome.err
        assert outcome.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
