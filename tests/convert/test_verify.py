"""``kvp convert verify`` passes what was converted rightly and nothing else."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
import torch
from conftest import Kvp
from kvp_mlx.convert.bundles import reference
from support import corenet
from support.torch_oracle import KVPrediction, OpenELM, part_of

from kvp_mlx.models.safetensors import fingerprint

MAP = ",".join(map(str, corenet.LAYER_MAP))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return corenet.save(corenet.kv_prediction(), tmp_path / "c.pt")


@pytest.fixture
def converted(source: Path, tmp_path: Path, kvp: Kvp) -> Path:
    kvp("convert", "kvp", source, "--layer-map", MAP, "--out", tmp_path / "out")
    return tmp_path / "out"


def test_two_independent_references_agree() -> None:
    checkpoint = corenet.kv_prediction()
    ids = torch.randint(corenet.VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(1))
    oracle = KVPrediction(checkpoint, corenet.LAYER_MAP)
    base = part_of(checkpoint, "base.")
    torch.testing.assert_close(reference.logits(base, ids.numpy())[0], OpenELM(base).run(ids)[0], atol=1e-4, rtol=0)
    found = reference.predicted_logits(checkpoint, corenet.LAYER_MAP, ids[:, :-3].numpy(), ids[:, -3:].numpy())
    torch.testing.assert_close(found, oracle.prompt_mode(ids[:, :-3], ids[:, -3:]), atol=1e-4, rtol=0)


def test_bundle(converted: Path, source: Path, kvp: Kvp) -> None:
    outcome = kvp("convert", "verify", converted, source, "--json")
    result = outcome.json()
    assert (outcome.code, result["ok"], result["precision"]) == (0, True, "F32")
    assert result["checks"].keys() == {"base", "auxiliary", "predicted"}
    for check in result["checks"].values():
        assert check["max_difference"] < 1e-4
        assert check["argmax_equal"] == check["positions"] > 0


@pytest.mark.parametrize("options", [["--dtype", "bfloat16"], ["--q-bits", "8"], ["--q-bits", "4"]])
def test_reduced_precision_passes_within_its_own_bound(
    options: list[str], source: Path, tmp_path: Path, kvp: Kvp
) -> None:
    kvp("convert", "kvp", source, "--layer-map", MAP, "--out", tmp_path / "out", *options)
    outcome = kvp("convert", "verify", tmp_path / "out", source)
    assert outcome.code == 0, outcome.out
    assert outcome.out.endswith("OK\n")


def test_model_directory(tmp_path: Path, kvp: Kvp) -> None:
    source = corenet.save(corenet.openelm(corenet.BASE), tmp_path / "c.pt")
    kvp("convert", "openelm", source, "--out", tmp_path / "out")
    assert kvp("convert", "verify", tmp_path / "out", source).code == 0


def change_tensor(path: Path, name: str, change: Callable[[mx.array], mx.array]) -> None:
    arrays = dict(mx.load(str(path)))
    arrays[name] = change(arrays[name])
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays)


@pytest.mark.parametrize(
    ("file", "name"),
    [("base/model.safetensors", "transformer.norm.weight"), ("predictor.safetensors", "maps.keys_1.weight")],
)
def test_a_changed_tensor_is_found(file: str, name: str, converted: Path, source: Path, kvp: Kvp) -> None:
    change_tensor(converted / file, name, lambda x: x * 1.05)
    config = json.loads((converted / "kvp.json").read_text())
    config["base"]["fingerprint"] = fingerprint(converted / "base")
    config["sha256"] = {}  # as a faulty conversion would have written it, not damage
    (converted / "kvp.json").write_text(json.dumps(config))
    outcome = kvp("convert", "verify", converted, source)
    assert outcome.code == 1
    assert "DIFFERENT" in outcome.out


def test_another_checkpoint_is_refused(converted: Path, tmp_path: Path, kvp: Kvp) -> None:
    other = corenet.save(corenet.openelm(corenet.AUXILIARY), tmp_path / "other.pt")
    outcome = kvp("convert", "verify", converted, other)
    assert outcome.code == 2
    assert "is not the checkpoint" in outcome.err
    wide = replace(corenet.BASE, vocabulary=corenet.BASE.vocabulary + 64)
    wider = corenet.save(
        corenet.kv_prediction(wide, replace(corenet.AUXILIARY, vocabulary=wide.vocabulary)), tmp_path / "wider.pt"
    )
    outcome = kvp("convert", "verify", converted, wider)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "its vocabulary is another" in outcome.err
    different = corenet.save(corenet.kv_prediction(seed=9), tmp_path / "different.pt")
    assert kvp("convert", "verify", converted, different).code == 1
