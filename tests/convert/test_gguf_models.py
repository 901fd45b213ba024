"""GGUF files of every architecture and tensor type that converts."""

import json
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import Kvp
from gguf.quants import dequantize
from kvp_mlx.convert.gguf_config import ARCHITECTURES
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from support.directories import write_llama, write_random
from support.gguf_files import Types, write_file
from support.gguf_models import CONFIGS, IDS, config_of, converted, logits, refused


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_every_architecture(name: str, tmp_path: Path, kvp: Kvp) -> None:
    model = write_random(tmp_path / "model", config_of(name))
    write_file(tmp_path / "m.gguf", model, Types.F32)
    np.testing.assert_allclose(logits(converted(kvp, tmp_path / "m.gguf")), logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_are_those_of_llama_cpp(name: str) -> None:
    """Its package knows from which of Hugging Face's tensors it makes each of its own."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], 2)
    for inner, (target, _) in ARCHITECTURES[name].layer.items():
        suffix = "." + inner.rpartition(".")[2]
        theirs = target.replace("switch_mlp", "experts")  # mlx-lm's name of all experts together
        assert names.get_name(f"model.layers.1.{theirs}", [suffix]) == f"blk.1.{inner}"


def finite_blocks(kind: Types, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Return random bytes that are a matrix of ordinary numbers in some type."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng, found, wanted = np.random.default_rng(seed), [], shape[0] * shape[1] // block
    while sum(map(len, found)) < wanted:
        blocks = rng.integers(0, 256, (4096, block_bytes), np.uint8)
        with np.errstate(all="ignore"):
            numbers = dequantize(blocks, kind)
        found.append(blocks[(np.abs(numbers) < 1000).all(axis=1) & (np.abs(numbers) > 0).any(axis=1)])
    return np.concatenate(found)[:wanted].reshape(shape[0], -1)


def dequantised_types() -> list[Types]:
    found = []
    for kind, (_, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            dequantize(np.zeros((1, block_bytes), np.uint8), kind)
            found.append(kind)
        except NotImplementedError:
            pass
    return [kind for kind in found if kind not in (Types.F32, Types.F16)]


@pytest.mark.parametrize("kind", dequantised_types(), ids=lambda kind: kind.name)
def test_every_type_that_the_package_dequantises(kind: Types, tmp_path: Path, kvp: Kvp) -> None:
    """The numbers are its own in fp16; alone in a file of others, types that mlx computes with are no exception."""
    model = write_random(tmp_path / "model", config_of("qwen2", hidden_size=256, intermediate_size=256))
    other = Types.Q5_0 if kind != Types.Q5_0 else Types.Q5_1
    plain = tmp_path / "plain.gguf"
    write_file(plain, model, other)
    name, data = "blk.1.ffn_up.weight", finite_blocks(kind, (256, 256))
    replace_tensor(plain, tmp_path / "m.gguf", name, data, kind)
    weights = mx.load(str(converted(kvp, tmp_path / "m.gguf") / "model.safetensors"))
    assert {array.dtype for array in weights.values()} == {mx.float16}
    stored = np.array(weights["model.layers.1.mlp.up_proj.weight"])
    assert (stored == dequantize(data, kind).astype(np.float16)).all()


def replace_tensor(source: Path, target: Path, name: str, data: np.ndarray, kind: Types) -> None:
    """Copy a GGUF file with other bytes for one tensor."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    for tensor in reader.tensors:
        chosen = (data, kind) if tensor.name == name else (tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, chosen[0], raw_dtype=chosen[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_few_other_types_among_kept_ones(tmp_path: Path, kvp: Kvp) -> None:
    """Where most of a file is blocks that mlx computes with, these stay, and the rest becomes fp16."""
    model = write_llama(tmp_path / "model", tokenizer=False)
    mixed = write_file(tmp_path / "m.gguf", model, lambda name: Types.Q5_1 if "ffn_up" in name else Types.Q4_0)
    out = converted(kvp, tmp_path / "m.gguf")
    weights = mx.load(str(out / "model.safetensors"))
    assert weights["model.layers.0.mlp.down_proj.weight"].dtype == mx.uint32
    assert weights["model.layers.0.mlp.up_proj.weight"].dtype == mx.float16
    np.testing.assert_allclose(logits(out), logits(model, mixed), atol=1e-2, rtol=0)


def test_experts_stay_in_blocks(tmp_path: Path, kvp: Kvp) -> None:
    """They are nearly all of a mixture."""
    model = write_random(tmp_path / "model", config_of("qwen3moe"))
    kept = write_file(tmp_path / "m.gguf", model, Types.Q8_0)
    out = converted(kvp, tmp_path / "m.gguf")
    weights = mx.load(str(out / "model.safetensors"))
    assert weights["model.layers.1.mlp.switch_mlp.down_proj.weight"].dtype == mx.uint32
    assert weights["model.layers.1.mlp.gate.weight"].dtype == mx.float16
    np.testing.assert_allclose(logits(out), logits(model, kept), atol=1e-2, rtol=0)


def test_norms_beside_fp16_are_fp16(tmp_path: Path, kvp: Kvp) -> None:
    """From fp32 ones, which every F16 file has, all activations would be fp32 on a GPU."""
    write_file(tmp_path / "m.gguf", write_random(tmp_path / "model", config_of("qwen3")), Types.F16)
    weights = mx.load(str(converted(kvp, tmp_path / "m.gguf") / "model.safetensors"))
    assert {array.dtype for array in weights.values()} == {mx.float16}


@pytest.mark.parametrize(
    ("layers", "changes", "expected"),
    [
        (7, {}, {"query_pre_attn_scalar": 32, "sliding_window_pattern": 6, "rope_local_base_freq": 1e4}),
        (62, {}, {"query_pre_attn_scalar": 16}),
        (7, {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}, {}),
        (7, {"gemma3.attention.sliding_window_pattern": 2, "gemma3.rope.freq_base_swa": 5e3}, {}),
    ],
)
def test_gemma_3s_own_fields(layers: int, changes: dict, expected: dict, tmp_path: Path, kvp: Kvp) -> None:
    scaling = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}} if "gemma3.rope.scaling.type" in changes else {}
    if "gemma3.rope.freq_base_swa" in changes:
        scaling = {"sliding_window_pattern": 2, "rope_local_base_freq": 5e3}
    own = {"num_hidden_layers": layers, "query_pre_attn_scalar": 16 if layers == 62 else 32}
    model = write_random(tmp_path / "model", config_of("gemma3", **own, **scaling))
    write_file(tmp_path / "m.gguf", model, Types.F32, **changes)
    out = converted(kvp, tmp_path / "m.gguf")
    config = json.loads((out / "config.json").read_text())
    assert config | expected | scaling == config
    np.testing.assert_allclose(logits(out), logits(model), atol=1e-3, rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantised_and_quantised_again(bits: int, tmp_path: Path, kvp: Kvp) -> None:
    model = write_random(tmp_path / "model", config_of("qwen2", num_hidden_layers=4))
    write_file(tmp_path / "m.gguf", model, lambda name: Types.Q8_0 if "attn_v" in name else Types.Q5_0)
    out = converted(kvp, tmp_path / "m.gguf", "--q-bits", str(bits), "--q-group-size", "32")
    config = json.loads((out / "config.json").read_text())
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (bits, 32)
    assert float(mx.abs(logits(out) - logits(model)).mean()) < (0.5 if bits == 4 else 0.2)


def test_a_dtype_has_its_own_limits(tmp_path: Path, kvp: Kvp) -> None:
    """BF16 holds what fp16 does not."""
    model = write_random(tmp_path / "model", config_of("qwen2"))
    weights = mx.load(str(model / "model.safetensors"))
    weights["model.layers.0.mlp.up_proj.weight"] *= 1e6
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    write_file(tmp_path / "m.gguf", model, Types.BF16)
    refused(kvp, tmp_path / "m.gguf", "too large for float16")
    stored = mx.load(str(converted(kvp, tmp_path / "m.gguf", "--dtype", "bfloat16") / "model.safetensors"))
    expected = weights["model.layers.0.mlp.up_proj.weight"].astype(mx.bfloat16)
    assert (stored["model.layers.0.mlp.up_proj.weight"] == expected).all()


def test_tied_embedding_that_is_stored_twice(tmp_path: Path, kvp: Kvp) -> None:
    """As in Qwen2.5-Coder's published files: the output matrix is the embedding, quantised by another, finer type."""
    model = write_random(tmp_path / "model", config_of("qwen2", tie_word_embeddings=False))
    weights = mx.load(str(model / "model.safetensors"))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    write_file(tmp_path / "m.gguf", model, lambda name: Types.Q8_0 if name == "output.weight" else Types.Q5_0)
    out = converted(kvp, tmp_path / "m.gguf")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    stored = mx.load(str(out / "model.safetensors"))
    errors = [
        float(mx.abs(stored[name] - weights["lm_head.weight"]).max())
        for name in ("lm_head.weight", "model.embed_tokens.weight")
    ]
    assert 0 < 4 * errors[0] < errors[1]
    assert load_model(out)[0](IDS).shape == (1, 120, 300)


def test_memory_stays_near_a_tensor(tmp_path: Path) -> None:
    """A matrix is dequantised a few rows at a time."""
    from kvp_mlx.convert import gguf_file, gguf_tensors

    model = write_random(tmp_path / "model", config_of("qwen2"))
    write_file(tmp_path / "m.gguf", model, Types.Q5_0)
    tensors = gguf_file.read_gguf(tmp_path / "m.gguf").tensors
    whole = gguf_tensors.read_dense(tensors["token_embd.weight"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_file, "NUMBERS_AT_ONCE", 200)  # three rows
        assert [len(rows) for rows in tensors["token_embd.weight"].rows()] == [3] * 100
        assert (gguf_tensors.read_dense(tensors["token_embd.weight"]) == whole).all()


def test_tables_cover_all_parameters() -> None:
    """Every tensor of mlx-lm's own models has its name in the table, and no other."""
    import importlib

    for name, row in ARCHITECTURES.items():
        module = importlib.import_module(f"mlx_lm.models.{row.model_type or name}")
        model = module.Model(module.ModelArgs.from_dict(config_of(name) | {"tie_word_embeddings": False}))
        expected = {key for key, _ in tree_flatten(model.parameters()) if key.startswith("model.layers.0.")}
        assert {f"model.layers.0.{target}" for target, _ in row.layer.values()} == expected
