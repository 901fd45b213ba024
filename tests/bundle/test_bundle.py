"""What is wrong with a bundle is named before anything is computed: one line, exit code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import Kvp
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from support.directories import write_llama

import kvp_mlx
from kvp_mlx.files import sha256_of


def edit(bundle: Path, **changes: object) -> None:
    path = bundle / "kvp.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_part(bundle: Path, part: str, **changes: object) -> None:
    edit(bundle, **{part: json.loads((bundle / "kvp.json").read_text())[part] | changes})


def without(arrays: dict, name: str) -> dict:
    return {other: array for other, array in arrays.items() if other != name}


def replace_tensors(bundle: Path, change: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> None:
    path = str(bundle / "predictor.safetensors")
    arrays = change(dict(mx.load(path)))
    mx.eval(arrays)
    mx.save_safetensors(path, arrays)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def quantise_base(bundle: Path, base_dir: Path) -> None:
    model, config = quantize_model(*load_model(base_dir), group_size=32, bits=4)
    save_model(bundle / "base", model)
    save_config(config, bundle / "base" / "config.json")


MAP = "maps.hidden_2"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no kvp.json": (lambda b: (b / "kvp.json").unlink(), "not a bundle"),
    "kvp.json cut short": (lambda b: truncate(b / "kvp.json", 100), "not readable JSON"),
    "kvp.json a list": (lambda b: (b / "kvp.json").write_text("[]"), "kvp.json"),
    "unknown key": (lambda b: edit(b, surprise=1), "surprise"),
    "unknown key inside": (lambda b: edit_part(b, "base", surprise=1), "base.surprise"),
    "newer format": (lambda b: edit(b, format_version=3), "format version 3"),
    "missing part": (lambda b: edit(b, predictor=None), "predictor"),
    "unknown kind": (lambda b: edit_part(b, "auxiliary", kind="psychic"), "auxiliary.kind"),
    "ill-typed layers": (lambda b: edit_part(b, "auxiliary", layers="two"), "auxiliary.layers"),
    "two places for the base": (lambda b: edit_part(b, "base", hub_id="a/b"), "exactly one of"),
    "prefix of another depth": (lambda b: edit_part(b, "auxiliary", layers=1), "must be null"),
    "prefix deeper than the base": (lambda b: edit_part(b, "auxiliary", layers=9), "9 auxiliary layers"),
    "layer map too short": (lambda b: edit_part(b, "predictor", layer_map=[None, None, None]), "3 entries"),
    "layer map past the auxiliary": (lambda b: edit_part(b, "predictor", layer_map=[None] * 3 + [[7]]), "[7]"),
    "exact layer predicted": (lambda b: edit_part(b, "predictor", layer_map=[None, None, [2], [2]]), "must be null"),
    "no predictor": (lambda b: (b / "predictor.safetensors").unlink(), "is missing"),
    "predictor cut short": (lambda b: truncate(b / "predictor.safetensors", 4000), "cut short"),
    "predictor header cut short": (lambda b: truncate(b / "predictor.safetensors", 20), "cut short"),
    "predictor empty": (lambda b: truncate(b / "predictor.safetensors", 0), "not a safetensors file"),
    "predictor garbage": (
        lambda b: (b / "predictor.safetensors").write_bytes(b"\7" + b"\0" * 7 + b"garbage"),
        "not a saf",
    ),
    "predictor of an unknown type": (
        lambda b: (b / "predictor.safetensors").write_bytes(
            (b / "predictor.safetensors").read_bytes().replace(b'"F16"', b'"F17"')
        ),
        "not a safetensors file",
    ),
    "predictor of integers": (
        lambda b: replace_tensors(b, lambda a: {k: v.astype(mx.int32) for k, v in a.items()}),
        "is I32",
    ),
    "predictor not finite": (
        lambda b: replace_tensors(b, lambda a: {k: v * mx.inf for k, v in a.items()}),
        "not finite",
    ),
    "tokeniser cut short": (lambda b: truncate(b / "base" / "tokenizer.json", 300), "tokeniser"),
    "tensor missing": (lambda b: replace_tensors(b, lambda a: without(a, f"{MAP}.bias")), f"{MAP}.bias"),
    "tensor unknown": (lambda b: replace_tensors(b, lambda a: a | {"maps.extra": mx.zeros(3)}), "maps.extra"),
    "tensor transposed": (lambda b: replace_tensors(b, lambda a: a | {f"{MAP}.bias": mx.zeros(3)}), "has shape (3,)"),
    "no base": (lambda b: edit_part(b, "base", path="elsewhere"), "elsewhere"),
    "another base": (lambda b: write_llama(b / "base", seed=9), "fingerprint"),
    "base cut short": (lambda b: truncate(b / "base" / "model.safetensors", 9000), "cut short"),
    "base without config": (lambda b: (b / "base" / "config.json").unlink(), "config.json"),
    "base of an unsupported architecture": (
        lambda b: (b / "base" / "config.json").write_text(
            json.dumps(json.loads((b / "base" / "config.json").read_text()) | {"model_type": "mamba"})
        ),
        "mamba",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_that_names_it(name: str, bundle: Path, kvp: Kvp) -> None:
    damage, named = DAMAGE[name]
    damage(bundle)
    outcome = kvp("generate", "hello", "--model", bundle, "--json")
    assert (outcome.code, outcome.out) == (2, "")
    assert named in outcome.err
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err


def test_another_base_runs_when_allowed(bundle: Path, kvp: Kvp) -> None:
    write_llama(bundle / "base", seed=9)
    outcome = kvp("generate", "hello", "--model", bundle, "--max-tokens", 2, "--allow-base-mismatch", "--json")
    assert outcome.code == 0
    assert len(outcome.json()["tokens"]) <= 2


def test_directory_that_is_no_bundle(tmp_path: Path, kvp: Kvp) -> None:
    outcome = kvp("info", tmp_path)
    assert outcome.code == 2
    assert "not a bundle" in outcome.err


def test_name_that_is_nothing(tmp_path: Path, kvp: Kvp) -> None:
    outcome = kvp("info", tmp_path / "nothing")
    assert outcome.code == 2
    assert "no directory, Hub id" in outcome.err


def test_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, kvp: Kvp) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outcome = kvp("info", "nobody/nothing-of-the-kind")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "available from the Hub" in outcome.err


def test_base_without_a_tokeniser_loads_for_token_ids(bundle: Path, kvp: Kvp) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bundle / "base" / name).unlink()
    model = kvp_mlx.load(str(bundle))
    assert model.tokenizer is None
    assert kvp_mlx.predict_base_cache(model, mx.array([[5, 6, 7]]))[-1].offset == 3
    outcome = kvp("generate", "hello", "--model", bundle)
    assert outcome.code == 2
    assert "no tokeniser" in outcome.err


def test_quantised_base_runs(bundle: Path, base_dir: Path) -> None:
    quantise_base(bundle, base_dir)
    quantised = kvp_mlx.load(str(bundle))
    assert kvp_mlx.predict_base_cache(quantised, mx.array([[5, 6, 7]]))[-1].offset == 3


@pytest.fixture
def pruned(base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp) -> Path:
    out = tmp_path / "pruned"
    assert kvp("fit", base_dir, "--prune", 0.5, "--data", text_file, "--tokens", 64, "--out", out).code == 0
    return out


def test_another_auxiliary_is_refused(pruned: Path, kvp: Kvp) -> None:
    write_llama(pruned / "auxiliary", seed=5, num_hidden_layers=2, tokenizer=False)
    outcome = kvp("generate", "hello", "--model", pruned)
    assert outcome.code == 2
    assert "fingerprint" in outcome.err


def test_auxiliary_of_another_vocabulary_is_refused(pruned: Path, kvp: Kvp) -> None:
    write_llama(pruned / "auxiliary", seed=5, num_hidden_layers=2, vocab_size=200, tokenizer=False)
    edit_part(pruned, "auxiliary", fingerprint=None)
    outcome = kvp("generate", "hello", "--model", pruned)
    assert outcome.code == 2
    assert "vocabulary (200)" in outcome.err


def test_context_window_is_the_smaller_one(pruned: Path) -> None:
    assert kvp_mlx.load(str(pruned)).context_length == 512
    config = json.loads((pruned / "auxiliary" / "config.json").read_text())
    (pruned / "auxiliary" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    assert kvp_mlx.load(str(pruned)).context_length == 100


def test_retained_layers_have_to_make_the_depth(pruned: Path, kvp: Kvp) -> None:
    edit_part(pruned, "auxiliary", retained_layers=[0, 1, 2])
    outcome = kvp("info", pruned)
    assert outcome.code == 2
    assert "retained_layers" in outcome.err


def test_prefix_shares_every_weight_with_its_base(bundle: Path, base_dir: Path) -> None:
    quantise_base(bundle, base_dir)
    loaded = kvp_mlx.load(str(bundle), allow_base_mismatch=True)
    assert loaded.auxiliary.model.embed_tokens is loaded.base.model.embed_tokens
    assert all(a is b for a, b in zip(loaded.auxiliary.layers, loaded.base.layers, strict=False))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8, 0.999])
def test_one_flipped_bit_is_found(share: float, bundle: Path, kvp: Kvp) -> None:
    path = bundle / "predictor.safetensors"
    flip(path, int(share * path.stat().st_size))
    outcome = kvp("generate", "hello", "--model", bundle)
    assert (outcome.code, outcome.out) == (2, "")
    assert "predictor.safetensors is not as it was written" in outcome.err


def test_what_is_written_has_hashes_and_what_was_written_before_loads(bundle: Path, pruned: Path) -> None:
    for directory in (bundle, pruned):
        data = json.loads((directory / "kvp.json").read_text())
        assert data["sha256"] == {"predictor.safetensors": sha256_of(directory / "predictor.safetensors")}
    edit(bundle, sha256={})
    flip(bundle / "predictor.safetensors", (bundle / "predictor.safetensors").stat().st_size - 1)
    kvp_mlx.load(str(bundle))
    data = json.loads((bundle / "kvp.json").read_text())
    del data["sha256"]
    (bundle / "kvp.json").write_text(json.dumps(data))
    kvp_mlx.load(str(bundle))


@pytest.mark.parametrize("hashes", [{"base/model.safetensors": "0"}, {"predictor.safetensors": 5}, ["x"], "x"])
def test_hashes_of_something_else_are_refused(hashes: object, bundle: Path, kvp: Kvp) -> None:
    edit(bundle, sha256=hashes)
    outcome = kvp("info", bundle)
    assert outcome.code == 2
    assert "sha256" in outcome.err


def test_a_hub_id_is_no_folder(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kvp: Kvp) -> None:
    """A folder that stands where the base's Hub id would lead from here is not the base."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundle / "base", tmp_path / "owner" / "name")
    edit_part(bundle, "base", path=None, hub_id="owner/name", revision="main")
    outcome = kvp("generate", "hello", "--model", bundle)
    assert outcome.code == 2
    assert "available from the Hub" in outcome.err
    for odd in ("../name", "owner/../name", "/etc/passwd", "owner", ""):
        edit_part(bundle, "base", hub_id=odd)
        outcome = kvp("generate", "hello", "--model", bundle)
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("text", ["[" * 99_999, '{"a":' * 500 + "1" + "}" * 500, '{"training": {"x": "\\udc00"}}'])
def test_json_that_cannot_be_walked_through(text: str, bundle: Path, kvp: Kvp) -> None:
    (bundle / "kvp.json").write_text(text)
    outcome = kvp("info", bundle)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "kvp.json is not readable JSON" in outcome.err
