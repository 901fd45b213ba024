"""What OpenELM checkpoints are recognised as, what they become, and that Hugging Face's layout gives the same."""

import hashlib
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from conftest import Kvp
from kvp_mlx.convert.bundles.kvp import check_maps, layout_of, split_names
from kvp_mlx.convert.openelm import model_name, openelm_config_of
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from support import corenet
from support.torch_oracle import OpenELM

from kvp_mlx.bundle.presets import PRESETS, preset_parts
from kvp_mlx.errors import InputError
from kvp_mlx.models.families import kv_shapes

IDS = torch.randint(corenet.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))


def corenet_shapes(preset: str) -> tuple[dict, tuple]:
    """Shapes of a preset's checkpoint under CoreNet's names, as method.md section 4 lists them, and its models."""
    base, auxiliary, config = preset_parts(preset)
    shapes = {
        f"{part}.{name.removeprefix('transformer.')}": array.shape
        for part, model in (("base", base), ("auxiliary", auxiliary))
        for name, array in tree_flatten(model.parameters())
    }
    widths, reads = ([shape.width for shape in kv_shapes(model)] for model in (base, auxiliary))
    for layer, (source,) in enumerate(config.predictor.layer_map):
        for kind in ("key", "value"):
            name = f"predicter.auxkv_to_basekv.{kind}_transforms.{layer}"
            shapes |= {f"{name}.weight": (widths[layer], reads[source]), f"{name}.bias": (widths[layer],)}
    return shapes, (base, auxiliary)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_recognised(preset: str) -> None:
    shapes, models = corenet_shapes(preset)
    depths = [len(model.layers) for model in models]
    assert len(shapes) == 8 * sum(depths) + 4 + 4 * depths[0]  # 468 for the 1.1B with the 270M
    names = split_names(shapes)
    parts = ("base", "auxiliary")
    configs = {part: openelm_config_of({short: shapes[n] for n, short in names[part].items()}, part) for part in parts}
    auxiliary, layer_map = layout_of(preset, None, configs)
    assert (auxiliary.kind == "pruned") == ("-lp-" in preset)
    maps = {short: shapes[name] for name, short in names["predicter.auxkv_to_basekv."].items()}
    check_maps(maps, dict(zip(parts, models, strict=True)), layer_map)
    size, kind = preset.removeprefix("openelm-").split("-kvp-")
    assert model_name(configs["base"]) == f"OpenELM-{size.replace('_', '.').upper()}"
    named = model_name(configs["auxiliary"])
    if auxiliary.kind == "pruned":
        assert named == f"OpenELM-{size.replace('_', '.').upper()}, {depths[1]} of {depths[0]} layers"
    else:
        assert named == f"OpenELM-{kind.removeprefix('c-').replace('_', '.').upper()}"


def test_counts_of_the_reference_example() -> None:
    assert len(corenet_shapes("openelm-1_1b-kvp-c-270m")[0]) == 468


@pytest.mark.parametrize("wrong", [name for name in PRESETS if name != "openelm-1_1b-kvp-c-270m"])
def test_any_other_preset_is_refused_and_the_right_one_named(wrong: str) -> None:
    shapes, _ = corenet_shapes("openelm-1_1b-kvp-c-270m")
    names = split_names(shapes)
    configs = {
        part: openelm_config_of({short: shapes[n] for n, short in names[part].items()}, part)
        for part in ("base", "auxiliary")
    }
    with pytest.raises(InputError, match="pass --preset openelm-1_1b-kvp-c-270m"):
        layout_of(wrong, None, configs)


@pytest.mark.parametrize("vocabulary", [32000, 32128])
def test_both_vocabularies_are_kept(vocabulary: int, tmp_path: Path, kvp: Kvp) -> None:
    shape = corenet.Shape(64, 64, [(2, 1, 64)], vocabulary=vocabulary)
    source = corenet.save(corenet.openelm(shape), tmp_path / "c.pt")
    kvp("convert", "openelm", source, "--out", tmp_path / "out")
    model, config = load_model(tmp_path / "out")
    assert config["vocab_size"] == vocabulary
    assert model(mx.array([[vocabulary - 1]])).shape == (1, 1, vocabulary)


def write_hugging_face(directory: Path, dtype: mx.Dtype = mx.float32) -> Path:
    """Write OpenELM as Hugging Face lays it out, with what its config.json carries beyond mlx-lm's."""
    directory.mkdir()
    weights = {
        f"transformer.{name}": mx.array(tensor.numpy()).astype(dtype)
        for name, tensor in corenet.openelm(corenet.BASE).items()
    }
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "pt"})
    config = {
        "model_type": "openelm",
        "architectures": ["OpenELMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_openelm.OpenELMConfig"},
        "head_dim": 64,
        "model_dim": 96,
        "num_transformer_layers": 5,
        "vocab_size": corenet.VOCABULARY,
        "ffn_dim_divisor": 32,
        "num_query_heads": [heads for heads, _, _ in corenet.BASE.layers],
        "num_kv_heads": [heads for _, heads, _ in corenet.BASE.layers],
        "ffn_multipliers": [width / 96 for *_, width in corenet.BASE.layers],
        "ffn_with_glu": True,
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
        "rope_freq_constant": 10000,
        "max_context_length": 2048,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "configuration_openelm.py").write_text("raise SystemExit('remote code ran')\n")
    (directory / "README.md").write_text("---\nlicense: apple-amlr\n---\n# OpenELM\n")
    return directory


def test_hugging_face_directory(tmp_path: Path, kvp: Kvp) -> None:
    source, out = write_hugging_face(tmp_path / "source"), tmp_path / "out"
    outcome = kvp("convert", "openelm", source, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    model, config = load_model(out)
    expected = OpenELM(corenet.openelm(corenet.BASE)).run(IDS)[0].numpy()
    np.testing.assert_allclose(model(mx.array(IDS.numpy())), expected, atol=1e-4, rtol=0)
    assert "auto_map" not in config
    assert not list(out.glob("*.py"))
    card = (out / "README.md").read_text()
    assert "license: apple-amlr" in card
    assert outcome.json()["source_sha256"]["model.safetensors"] in card


BROKEN = {
    "missing tensor": (lambda a: {k: v for k, v in a.items() if "2.ffn_norm" not in k}, "layers.2.ffn_norm"),
    "extra tensor": (lambda a: a | {"transformer.gate.weight": mx.zeros(3)}, "gate"),
    "transposed": (lambda a: a | {"transformer.layers.1.attn.qkv_proj.weight": mx.zeros((96, 512))}, "512"),
    "NaN": (lambda a: a | {"transformer.norm.weight": mx.full((96,), mx.nan)}, "norm.weight holds NaN"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_hugging_face_directory(name: str, tmp_path: Path, kvp: Kvp) -> None:
    change, named = BROKEN[name]
    source = write_hugging_face(tmp_path / "source")
    arrays = change(dict(mx.load(str(source / "model.safetensors"))))
    mx.eval(arrays)
    mx.save_safetensors(str(source / "model.safetensors"), arrays)
    outcome = kvp("convert", "openelm", source, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert named in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_directory_of_something_else(base_dir: Path, tmp_path: Path, kvp: Kvp) -> None:
    for source, named in ((base_dir, "llama model, not openelm"), (tmp_path, "config.json")):
        outcome = kvp("convert", "openelm", source, "--out", tmp_path / "a" / "out")
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
        if source is base_dir:
            assert named in outcome.err


def test_stored_dtypes(tmp_path: Path, kvp: Kvp) -> None:
    """As stored by default; what is mixed becomes fp32, so that nothing is lost."""
    tensors = corenet.openelm(corenet.BASE)
    half = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    for stored, wanted in ((half, "bfloat16"), (half | {"norm.weight": tensors["norm.weight"]}, "float32")):
        source = corenet.save(stored, tmp_path / "c.pt")
        outcome = kvp("convert", "openelm", source, "--out", tmp_path / "out", "--force", "--json")
        assert outcome.json()["dtype"] == wanted
        written = mx.load(str(tmp_path / "out" / "model.safetensors"))
        name = "layers.0.attn.qkv_proj.weight"
        assert (np.array(written[f"transformer.{name}"].astype(mx.float32)) == half[name].float().numpy()).all()


def test_numbers_too_large_for_float16_are_refused(tmp_path: Path, kvp: Kvp) -> None:
    tensors = corenet.openelm(corenet.BASE)
    tensors["layers.0.ffn.proj_1.weight"][0, 0] = 1e6
    source = corenet.save(tensors, tmp_path / "c.pt")
    outcome = kvp("convert", "openelm", source, "--out", tmp_path / "out", "--dtype", "float16")
    assert outcome.code == 2
    assert "too large for float16" in outcome.err
    assert kvp("convert", "openelm", source, "--out", tmp_path / "out", "--dtype", "bfloat16").code == 0


def test_files_are_cut_by_size(tmp_path: Path, kvp: Kvp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvp_mlx.convert.output.SHARD_BYTES", 100_000)
    weights = corenet.openelm(corenet.BASE)
    source, out = corenet.save(weights, tmp_path / "c.pt"), tmp_path / "out"
    assert kvp("convert", "openelm", source, "--out", out).code == 0
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: file.name for file in files for name in mx.load(str(file))}
    assert len(index) == len(weights)
    model, _ = load_model(out)
    np.testing.assert_allclose(model(mx.array(IDS.numpy())), OpenELM(weights).run(IDS)[0], atol=1e-4, rtol=0)


def test_model_card_tells_the_source(tmp_path: Path, kvp: Kvp) -> None:
    source = corenet.save(corenet.openelm(corenet.BASE), tmp_path / "c.pt")
    kvp("convert", "openelm", source, "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert hashlib.sha256(source.read_bytes()).hexdigest() in card
    assert str(tmp_path) not in card  # the path is nobody's business
    assert "Licence: not stated" in card
