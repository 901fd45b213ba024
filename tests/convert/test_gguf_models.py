"""GGUF files of every architecture, tensor type and RoPE scaling that converts; what does not is refused by name."""

import json
import math
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
from support.directories import LLAMA, write_llama, write_random
from support.gguf_files import Types, write_file

IDS = mx.array([np.random.default_rng(0).integers(3, 300, 120).tolist()])
TINY = {**LLAMA, "num_hidden_layers": 2}
CONFIGS = {
    "llama": {"head_dim": 32, "tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen3moe": {
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    "phi3": {"partial_rotary_factor": 0.5, "tie_word_embeddings": False},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "num_hidden_layers": 7,
        "rope_theta": 1e6,
    },
}


def config_of(name: str, **changes: object) -> dict:
    return TINY | {"model_type": name, "rope_theta": 10000.0} | CONFIGS[name] | changes


def logits(directory: Path, weights: dict[str, np.ndarray] | None = None) -> mx.array:
    """Return what a model says, with other weights than its own where they are given."""
    model, _ = load_model(directory)
    if weights:
        model.load_weights([(name, mx.array(array)) for name, array in weights.items()])
    model.set_dtype(mx.float32)
    return model(IDS)


def converted(kvp: Kvp, source: Path, *options: str) -> Path:
    out = source.with_name("out")
    outcome = kvp("convert", "gguf", source, "--out", out, *options)
    assert outcome.code == 0, outcome.err
    return out


def refused(kvp: Kvp, source: Path, named: str) -> None:
    out = source.with_name("out")
    outcome = kvp("convert", "gguf", source, "--out", out)
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert outcome.err.count("\n") == 1
    assert named in outcome.err
    assert not out.exists()
    assert not list(out.parent.glob(".out.*"))


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


# metadata, and what it is in config.json
SCALINGS = {
    "none": ({"type": "none"}, None),
    "no factor": ({"type": "yarn", "factor": 0.0}, None),
    "linear": ({"type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
    "linear by an old key": ({"scale_linear": 2.5}, {"type": "linear", "factor": 2.5}),
    "yarn": (
        {"type": "yarn", "factor": 4.0, "original_context_length": 64, "finetuned": True},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "yarn, length from the context": (
        {"type": "yarn", "factor": 2.0},
        {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512},
    ),
    "yarn with betas": (
        {"type": "yarn", "factor": 8.0, "original_context_length": 32, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0},
        {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 16, "beta_slow": 2},
    ),
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scaling_is_carried_over(name: str, architecture: str, tmp_path: Path, kvp: Kvp) -> None:
    stated, scaling = SCALINGS[name]
    model = write_random(tmp_path / "model", config_of(architecture, rope_scaling=scaling))
    prefix = {key: f"{architecture}.rope.{'' if key == 'scale_linear' else 'scaling.'}{key}" for key in stated}
    write_file(tmp_path / "m.gguf", model, Types.F32, **{prefix[key]: value for key, value in stated.items()})
    out = converted(kvp, tmp_path / "m.gguf")
    np.testing.assert_allclose(logits(out), logits(model), atol=1e-4, rtol=0)


def llama3_table(scaling: dict, dimensions: int, theta: float) -> np.ndarray:
    """What llama.cpp's converter computes for rope_freqs.weight, pair by pair."""
    factor, low, high = (scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original, table = scaling["original_max_position_embeddings"], []
    for pair in range(0, dimensions, 2):
        wavelength = 2 * math.pi * theta ** (pair / dimensions)
        if wavelength < original / high:
            table.append(1.0)
        elif wavelength > original / low:
            table.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            table.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(table, np.float32)


@pytest.mark.parametrize(
    ("factor", "low", "high", "original", "theta"),
    [
        (8.0, 1.0, 4.0, 8192, 500000.0),
        (32.0, 1.0, 4.0, 8192, 500000.0),
        (4.0, 1.0, 4.0, 64, 10000.0),
        (8.0, 1.5, 12.0, 256, 10000.0),
        (16.0, 1.0, 4.0, 40, 10000.0),
    ],
)
def test_llama_3_scaling_from_its_table(
    factor: float, low: float, high: float, original: int, theta: float, tmp_path: Path, kvp: Kvp
) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    model = write_random(tmp_path / "model", config_of("llama", rope_scaling=scaling, rope_theta=theta))
    write_file(tmp_path / "m.gguf", model, Types.F32, tensors={"rope_freqs.weight": llama3_table(scaling, 32, theta)})
    out = converted(kvp, tmp_path / "m.gguf")
    np.testing.assert_allclose(logits(out), logits(model), atol=1e-3, rtol=0)
    if original == 8192:
        assert json.loads((out / "config.json").read_text())["rope_scaling"] == scaling


def test_phi_3_long_rope(tmp_path: Path, kvp: Kvp) -> None:
    rng = np.random.default_rng(1)
    long, short = (rng.uniform(1, 5, 8).astype(np.float32) for _ in range(2))
    scaling = {"type": "longrope", "long_factor": long.tolist(), "short_factor": short.tolist()}
    config = config_of("phi3", rope_scaling=scaling, original_max_position_embeddings=128)
    model = write_random(tmp_path / "model", config | {"partial_rotary_factor": 1.0})
    stated = {
        "phi3.rope.scaling.original_context_length": 128,
        "phi3.rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(128)),
        "phi3.attention.sliding_window": 262144,
    }
    factors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    write_file(tmp_path / "m.gguf", model, Types.F32, tensors=factors, **stated)
    np.testing.assert_allclose(logits(converted(kvp, tmp_path / "m.gguf")), logits(model), atol=1e-4, rtol=0)
    write_file(
        tmp_path / "n.gguf", model, Types.F32, tensors=factors, **stated | {"phi3.rope.scaling.attn_factor": 1.5}
    )
    (tmp_path / "out").rename(tmp_path / "before")
    refused(kvp, tmp_path / "n.gguf", "phi3.rope.scaling.attn_factor = 1.5")


def test_a_sliding_window_ends_the_context(tmp_path: Path, kvp: Kvp) -> None:
    model = write_random(tmp_path / "model", config_of("phi3"))
    write_file(tmp_path / "m.gguf", model, Types.F32, **{"phi3.attention.sliding_window": 200})
    out = converted(kvp, tmp_path / "m.gguf")
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 200


NEUTRAL = {
    "llama.expert_count": 0,
    "llama.vocab_size": 300,
    "llama.attention.causal": True,
    "llama.logit_scale": 1.0,
    "llama.attention.clamp_kqv": 0.0,
    "llama.attention.scale": 32**-0.5,
    "llama.rope.dimension_count": 32,
    "general.anything": "x",
    "quantize.imatrix.file": "x",
}


def test_keys_that_change_nothing(tmp_path: Path, kvp: Kvp) -> None:
    model = write_random(tmp_path / "model", config_of("llama"))
    write_file(tmp_path / "m.gguf", model, Types.F32, **NEUTRAL)
    np.testing.assert_allclose(logits(converted(kvp, tmp_path / "m.gguf")), logits(model), atol=1e-4, rtol=0)


ONES = {"rope_freqs.weight": np.ones(16)}
# architecture, metadata, tensors, and what the error has to name
CHANGES_THE_MODEL: dict[str, tuple[str, dict, dict, str]] = {
    "experts": ("llama", {"llama.expert_count": 8}, {}, "llama.expert_count"),
    "logit scale": ("llama", {"llama.logit_scale": 0.125}, {}, "llama.logit_scale"),
    "embedding scale": ("llama", {"llama.embedding_scale": 12.0}, {}, "llama.embedding_scale"),
    "attention scale": ("llama", {"llama.attention.scale": 0.5}, {}, "llama.attention.scale"),
    "small attention scale": ("llama", {"llama.attention.scale": 0.01}, {}, "llama.attention.scale"),
    "soft cap": ("qwen2", {"qwen2.final_logit_softcapping": 30.0}, {}, "qwen2.final_logit_softcapping"),
    "not causal": ("llama", {"llama.attention.causal": False}, {}, "llama.attention.causal"),
    "list for a flag": ("llama", {"llama.expert_count": [1, 2]}, {}, "llama.expert_count"),
    "unknown": ("qwen3", {"qwen3.attention.dreams": 3}, {}, "qwen3.attention.dreams"),
    "value length": ("llama", {"llama.attention.value_length": 16}, {}, "llama.attention.value_length"),
    "key length": ("qwen2", {"qwen2.attention.key_length": 32}, {}, "heads of 32"),
    "partial RoPE": ("llama", {"llama.rope.dimension_count": 16}, {}, "llama.rope.dimension_count"),
    "unknown RoPE": ("llama", {"llama.rope.scaling.type": "spiral"}, {}, "spiral"),
    "long RoPE of llama": ("llama", {"llama.rope.scaling.type": "longrope"}, {}, "rope_factors_long.weight"),
    "attention factor": (
        "llama",
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.attn_factor": 0.5},
        {},
        "llama.rope.scaling.attn_factor",
    ),
    "yarn's logarithm": (
        "llama",
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.yarn_log_multiplier": 0.1,
        },
        {},
        "llama.rope.scaling.yarn_log_multiplier",
    ),
    "yarn of Phi-3": ("phi3", {"phi3.rope.scaling.type": "yarn", "phi3.rope.scaling.factor": 4.0}, {}, "yarn"),
    "another table": ("llama", {}, ONES, "rope_freqs.weight"),
    "table of another length": ("llama", {}, {"rope_freqs.weight": np.ones(7)}, "rope_freqs.weight"),
    "table of NaN": ("llama", {}, {"rope_freqs.weight": np.full(16, np.nan)}, "rope_freqs.weight"),
    "both scalings": (
        "llama",
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        ONES,
        "rope_freqs.weight",
    ),
    "half of long RoPE": ("phi3", {}, {"rope_factors_long.weight": np.ones(8)}, "rope_factors_short.weight"),
    "bias": ("llama", {}, {"blk.0.attn_q.bias": np.ones(128)}, "blk.0.attn_q.bias"),
    "sinks": ("qwen3", {}, {"blk.1.attn_sinks.weight": np.ones(4)}, "blk.1.attn_sinks.weight"),
    "adapter": ("llama", {"general.type": "adapter"}, {}, "adapter"),
    "another architecture": (
        "llama",
        {"general.architecture": "qwen2moe"},
        {},
        "holds a qwen2moe model; GGUF files of",
    ),
    "unknown architecture": ("llama", {"general.architecture": "mamba"}, {}, "mamba"),
}


@pytest.mark.parametrize("name", CHANGES_THE_MODEL)
def test_what_would_change_the_model_is_refused_by_name(name: str, tmp_path: Path, kvp: Kvp) -> None:
    architecture, changes, tensors, named = CHANGES_THE_MODEL[name]
    model = write_random(tmp_path / "model", config_of(architecture))
    write_file(tmp_path / "m.gguf", model, tensors=tensors, **changes)
    refused(kvp, tmp_path / "m.gguf", named)


def split(folder: Path, model: Path, parts: int = 3) -> list[Path]:
    """Write a split file, as llama-gguf-split does: all metadata in the first part."""
    files = [folder / f"m-{number:05d}-of-{parts:05d}.gguf" for number in range(1, parts + 1)]
    for number, file in enumerate(files):
        stated = {"split.no": number, "split.count": parts, "split.tensors.count": 20}
        write_file(file, model, Types.F32, only=lambda name, number=number: part_of(name) == number, **stated)
    return files


def part_of(name: str) -> int:
    return 1 + int(name.split(".")[1]) if name.startswith("blk.") else 0


@pytest.fixture
def two_layers(tmp_path: Path) -> Path:
    return write_random(tmp_path / "model", TINY)


def test_parts_that_llama_cpp_merged_are_one_file(two_layers: Path, tmp_path: Path, kvp: Kvp) -> None:
    """llama-gguf-split --merge leaves what it knew of the parts, with a count of 0."""
    stated = {"split.no": 0, "split.count": 0, "split.tensors.count": 20}
    write_file(tmp_path / "m.gguf", two_layers, Types.F32, **stated)
    np.testing.assert_allclose(logits(converted(kvp, tmp_path / "m.gguf")), logits(two_layers), atol=1e-4, rtol=0)


@pytest.mark.parametrize("named", [0, 2])
def test_split_files_are_read_as_one(named: int, two_layers: Path, tmp_path: Path, kvp: Kvp) -> None:
    files = split(tmp_path, two_layers)
    out = tmp_path / "out"
    outcome = kvp("convert", "gguf", files[named], "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    assert sorted(outcome.json()["source_sha256"]) == [file.name for file in files]
    np.testing.assert_allclose(logits(out), logits(two_layers), atol=1e-4, rtol=0)


def test_half_a_split_file(two_layers: Path, tmp_path: Path, kvp: Kvp) -> None:
    files = split(tmp_path, two_layers)
    hidden = files[1].rename(tmp_path / "elsewhere.gguf")
    refused(kvp, files[0], "m-00002-of-00003.gguf is missing")
    hidden.rename(files[1])
    whole = files[0].read_bytes()
    renamed = files[0].rename(tmp_path / "first.gguf")
    refused(kvp, renamed, "-00001-of-00003.gguf")
    files[0].write_bytes(files[1].read_bytes())
    refused(kvp, files[2], "another part")
    files[0].write_bytes(whole[: len(whole) // 2])
    refused(kvp, files[2], "m-00001-of-00003.gguf is not a whole GGUF file (it is cut short")


def test_parts_of_different_files(two_layers: Path, tmp_path: Path, kvp: Kvp) -> None:
    files = split(tmp_path, two_layers)
    stated = {"split.no": 2, "split.count": 3}
    write_file(files[2], two_layers, Types.F32, only=lambda name: part_of(name) in (0, 2), **stated)
    refused(kvp, files[0], "output_norm.weight, as another part")


def test_big_endian_is_named(two_layers: Path, tmp_path: Path, kvp: Kvp) -> None:
    write_file(tmp_path / "m.gguf", two_layers, Types.F32, big_endian=True)
    refused(kvp, tmp_path / "m.gguf", "big-endian")


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
