"""Model directories with fields of wrong sizes and types: one line, exit code 2, before anything is built."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import Kvp
from mlx_lm.utils import load_model as mlx_lm_load_model
from mlx_lm.utils import quantize_model, save_config, save_model
from support.directories import write_llama

from kvp_mlx.errors import BundleError
from kvp_mlx.models.loading import load_model, load_tokenizer


def config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def quantisation(directory: Path, **changes: object) -> None:
    data = json.loads((directory / "config.json").read_text())
    config(directory, quantization=data["quantization"] | changes, quantization_config=data["quantization"] | changes)


def reshape(directory: Path, name: str, shape: tuple[int, ...]) -> None:
    path = str(directory / "model.safetensors")
    arrays = dict(mx.load(path))
    arrays[name] = mx.zeros(shape, arrays[name].dtype)
    mx.eval(arrays)
    mx.save_safetensors(path, arrays)


@pytest.fixture(scope="session")
def quantised_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = write_llama(tmp_path_factory.mktemp("plain") / "model")
    out = tmp_path_factory.mktemp("quantised") / "model"
    model, settings = quantize_model(*mlx_lm_load_model(plain), group_size=32, bits=4)
    save_model(out, model)
    save_config(settings, out / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((plain / name).read_bytes())
    return out


@pytest.fixture
def quantised(quantised_model: Path, tmp_path: Path) -> Path:
    out = tmp_path / "model"
    out.mkdir()
    for path in quantised_model.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


K_PROJ = "model.layers.0.self_attn.k_proj"
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a million layers": (lambda d: config(d, num_hidden_layers=1_000_000), "num_hidden_layers is 1000000"),
    "10^30 layers": (lambda d: config(d, num_hidden_layers=10**30), "num_hidden_layers"),
    "no layers": (lambda d: config(d, num_hidden_layers=0), "num_hidden_layers is 0"),
    "layers as text": (lambda d: config(d, num_hidden_layers="4"), "num_hidden_layers is 4"),
    "an end token beyond the vocabulary": (lambda d: config(d, eos_token_id=10**9), "eos_token_id is 1000000000"),
    "an end token below it": (lambda d: config(d, eos_token_id=[2, -1]), "eos_token_id is -1"),
    "an end token as text": (lambda d: config(d, eos_token_id="2"), "eos_token_id is 2"),
    "an end token that is true": (lambda d: config(d, eos_token_id=True), "eos_token_id is True"),
    "end tokens in a list's list": (lambda d: config(d, eos_token_id=[[2]]), "eos_token_id is [2]"),
    "another file's end token": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": [2, 151643]}') and None,
        "eos_token_id is 151643",
    ),
    "layers as a list": (lambda d: config(d, num_hidden_layers=[4]), "num_hidden_layers"),
    "a huge vocabulary": (lambda d: config(d, vocab_size=10**12), ""),
    "a huge width": (lambda d: config(d, hidden_size=10**9), ""),
    "a width of one": (lambda d: config(d, hidden_size=1), ""),
    "no heads": (lambda d: config(d, num_attention_heads=0), ""),
    "heads that cannot share": (lambda d: config(d, num_attention_heads=4, num_key_value_heads=3), "cannot share"),
    "width as text": (lambda d: config(d, hidden_size="64"), "hidden_size is '64'"),
    "negative width": (lambda d: config(d, hidden_size=-64), "hidden_size is '-64'"),
    "theta as text": (lambda d: config(d, rope_theta="10000"), "rope_theta is '10000'"),
    "theta below 0": (lambda d: config(d, rope_theta=-1), "rope_theta is '-1'"),
    "theta 0": (lambda d: config(d, rope_theta=0.0), "rope_theta is '0.0'"),
    "theta below 0 among the parameters": (
        lambda d: config(d, rope_parameters={"rope_type": "default", "rope_theta": -5.0}),
        "rope_parameters.rope_theta is '-5.0'",
    ),
    "factor 0": (lambda d: config(d, rope_scaling={"type": "linear", "factor": 0}), "rope_scaling.factor is '0'"),
    "theta infinite": (lambda d: config(d, rope_theta=float("inf")), "rope_theta is 'inf'"),
    "RoPE stretched to infinity": (
        lambda d: config(d, rope_scaling={"type": "linear", "factor": float("inf")}),
        "rope_scaling.factor is 'inf'",
    ),
    "RoPE factors of no number": (
        lambda d: config(d, rope_parameters={"rope_type": "longrope", "short_factor": [1.0, float("nan")]}),
        "rope_parameters.short_factor is 'nan'",
    ),
    "eps as an object": (lambda d: config(d, rms_norm_eps={}), "rms_norm_eps is '{}'"),
    "a truth value as text": (lambda d: config(d, tie_word_embeddings="yes"), "tie_word_embeddings"),
    "model_type as a list": (lambda d: config(d, model_type=["llama"]), "states no model_type"),
    "config as a list": (lambda d: (d / "config.json").write_text("[]"), "states no model_type"),
    "config nested": (lambda d: (d / "config.json").write_text("[" * 99_999), "nested"),
    "config with a lone surrogate": (
        lambda d: (d / "config.json").write_text('{"model_type": "llama", "x": "\\ud800"}'),
        "half a character",
    ),
    "generation config nested": (lambda d: (d / "generation_config.json").write_text("[" * 99_999), "cannot load"),
    "tokeniser nested": (lambda d: (d / "tokenizer.json").write_text("[" * 99_999), "tokeniser"),
    "tokeniser config nested": (lambda d: (d / "tokenizer_config.json").write_text("[" * 99_999), "tokeniser"),
    "group size 0": (lambda d: quantisation(d, group_size=0), "group_size is 0"),
    "group size negative": (lambda d: quantisation(d, group_size=-32), "group_size is -32"),
    "group size as text": (lambda d: quantisation(d, group_size="32"), "group_size is 32"),
    "0 bits": (lambda d: quantisation(d, bits=0), "bits is 0"),
    "7 bits": (lambda d: quantisation(d, bits=7), "bits is 7"),
    "group size 0 of one module": (
        lambda d: quantisation(d, **{K_PROJ: {"group_size": 0, "bits": 4}}),
        "group_size is 0",
    ),
    "too many scales": (lambda d: reshape(d, f"{K_PROJ}.scales", (32, 128)), f"{K_PROJ}.scales"),
    "too few scales": (lambda d: reshape(d, f"{K_PROJ}.scales", (32, 1)), K_PROJ),
    "no scales": (lambda d: reshape(d, f"{K_PROJ}.scales", (32, 0)), f"{K_PROJ}.scales"),
    "scales of other rows": (lambda d: reshape(d, f"{K_PROJ}.scales", (16, 2)), f"{K_PROJ}.scales"),
    "biases of another shape": (lambda d: reshape(d, f"{K_PROJ}.biases", (32, 1)), f"{K_PROJ}.biases"),
    "a weight of other words": (lambda d: reshape(d, f"{K_PROJ}.weight", (32, 3)), K_PROJ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_one_line_and_nothing_built(name: str, quantised: Path, tmp_path: Path, text_file: Path, kvp: Kvp) -> None:
    change, reason = HOSTILE[name]
    change(quantised)
    start = time.monotonic()
    outcome = kvp("fit", quantised, "--layers", 1, "--data", text_file, "--tokens", 64, "--out", tmp_path / "out")
    assert outcome.code == 2, outcome.err
    assert outcome.err.startswith("kvp: ")
    assert outcome.err.count("\n") == 1
    assert reason in outcome.err
    assert time.monotonic() - start < 5
    assert not (tmp_path / "out").exists()


def test_ordinary_spellings_are_taken(quantised: Path) -> None:
    config(quantised, rope_theta=10000, tie_word_embeddings=1, head_dim=None, max_position_embeddings=512.0)
    model, _ = load_model(quantised)
    assert len(model.layers) == 4


def test_end_tokens_may_stand_in_rows_that_pad_the_vocabulary(quantised: Path) -> None:
    data = json.loads((quantised / "config.json").read_text())
    last = data["vocab_size"] - 1
    assert len(load_tokenizer(quantised, data | {"eos_token_id": [2, last]}).eos_token_ids & {2, last}) == 2
    assert load_tokenizer(quantised, data | {"eos_token_id": None}) is not None


def test_two_files_with_one_tensor_are_refused(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    (model / "model-2.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    with pytest.raises(BundleError, match="twice"):
        load_model(model)
