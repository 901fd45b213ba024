"""``kvp fit``: the closed form finds what is there to be found, for each kind of auxiliary."""

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import Kvp
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from support.directories import TEXT, write_llama

import kvp_mlx
from kvp_mlx.bundle.predictor import plan_blocks
from kvp_mlx.models.kinds import Target
from kvp_mlx.models.pruning import prune_config
from kvp_mlx.models.sections import RawLayer
from kvp_mlx.train.ridge import RidgeSums


def targets(width: int) -> tuple[Target, Target]:
    return Target("keys", "k_proj", width), Target("values", "v_proj", width)


def halves(y: np.ndarray) -> dict[str, mx.array]:
    keys, values = np.split(y, 2, axis=-1)
    return {"keys": mx.array(keys, mx.float32), "values": mx.array(values, mx.float32)}


def test_planted_linear_relation_is_recovered() -> None:
    rng = np.random.default_rng(0)
    (block,) = plan_blocks([None, (0,)], "hidden_state", [], 6, [targets(4), targets(4)])
    weight, bias = rng.normal(size=(8, 6)), rng.normal(size=8)
    sums = RidgeSums(block)
    for _ in range(5):
        x = rng.normal(size=(1, 20, 6)) + 3.0
        y = x @ weight.T + bias
        raw = RawLayer(mx.array(x, mx.float32), halves(y))
        sums.add(raw.hidden, {1: raw})
    found_weight, found_bias = sums.solve(penalty=1e-9)
    np.testing.assert_allclose(found_weight, weight, atol=1e-4)
    np.testing.assert_allclose(found_bias, bias, atol=1e-3)


def test_solution_is_the_ridge_minimum() -> None:
    rng = np.random.default_rng(1)
    (block,) = plan_blocks([None, (0,)], "hidden_state", [], 5, [targets(2), targets(2)])
    x, y = rng.normal(size=(1, 40, 5)), rng.normal(size=(1, 40, 4))
    sums = RidgeSums(block)
    sums.add(mx.array(x, mx.float32), {1: RawLayer(None, halves(y))})
    weight, bias = sums.solve(penalty=0.3)
    strength = 0.3 * np.square(x[0]).sum() / 5

    def objective(w: np.ndarray, b: np.ndarray) -> float:
        return float(np.square(x[0] @ w.T + b - y[0]).sum() + strength * np.square(w).sum())

    best = objective(weight, bias)
    for _ in range(50):
        assert objective(weight + rng.normal(0, 1e-2, weight.shape), bias + rng.normal(0, 1e-2, bias.shape)) > best


def cache_error(bundle: Path) -> float:
    """Mean squared error of the predicted entries, relative to their variance."""
    model = kvp_mlx.load(str(bundle))
    ids = mx.array([model.tokenizer.encode(TEXT)])
    predicted = kvp_mlx.predict_base_cache(model, ids)
    true = kvp_mlx.base_prefill(model, ids)
    error = variance = 0.0
    for ours, theirs in zip(predicted, true, strict=True):
        for a, b in zip(ours.keys_and_values(), theirs.keys_and_values(), strict=True):
            error += mx.square(a - b).sum().item()
            variance += mx.square(b - b.mean(axis=2, keepdims=True)).sum().item()
    return error / variance


KINDS = {
    "prefix": lambda tmp: ("--layers", 2),
    "prefix, three tokens before": lambda tmp: ("--layers", 2, "--preceding", 3),
    "pruned, a token before": lambda tmp: ("--prune", 0.5, "--preceding", 1),
    "pruned": lambda tmp: ("--prune", 0.5),
    "model": lambda tmp: ("--auxiliary", write_llama(tmp / "auxiliary", seed=3, num_hidden_layers=2, hidden_size=48)),
    "model, two sources": lambda tmp: (
        *("--auxiliary", write_llama(tmp / "auxiliary", seed=3, num_hidden_layers=3, num_key_value_heads=4)),
        *("--sources", 2),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_fitted_bundle_loads_and_predicts_better_than_the_mean(
    kind: str, base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp
) -> None:
    out = tmp_path / "bundle"
    options = (*KINDS[kind](tmp_path), "--data", text_file, "--out", out, "--tokens", 600, "--window", 64)
    outcome = kvp("fit", base_dir, *options, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json()["tokens"] == 600
    # Predicting the mean gives 1. An unrelated random auxiliary can only do a little better than that.
    assert cache_error(out) < (0.5 if kind.startswith("prefix") else 0.9)
    config = json.loads((out / "kvp.json").read_text())
    assert config["auxiliary"]["kind"] == kind.split(",", maxsplit=1)[0]
    assert config["training"]["data"] == [text_file.name]


def test_a_relation_to_the_token_before_is_recovered() -> None:
    rng = np.random.default_rng(0)
    (block,) = plan_blocks([None, (0,)], "hidden_state", [], 6, [targets(4), targets(4)], preceding=1)
    weight = rng.normal(size=(8, 12))
    sums = RidgeSums(block)
    for _ in range(5):
        x = rng.normal(size=(1, 20, 6))
        before = np.concatenate([x[:, :1], x[:, :-1]], axis=1)
        raw = RawLayer(mx.array(x, mx.float32), halves(np.concatenate([x, before], axis=-1) @ weight.T))
        first = block.gather({0: RawLayer(raw.hidden[:, :7], {})})
        rest = block.gather({0: RawLayer(raw.hidden[:, 7:], {})}, first)
        sums.add(mx.concatenate([first, rest], axis=1), {1: raw})
    found_weight, found_bias = sums.solve(penalty=1e-9)
    np.testing.assert_allclose(found_weight, weight, atol=1e-4)
    np.testing.assert_allclose(found_bias, 0, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "preceding"), [(("--layers", 2), 1), (("--layers", 2, "--preceding", 0), 0), (("--prune", 0.5), 0)]
)
def test_a_prefix_reads_the_token_before_unless_told_otherwise(
    options: tuple, preceding: int, base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp
) -> None:
    out = tmp_path / "bundle"
    kvp("fit", base_dir, *options, "--data", text_file, "--out", out, "--tokens", 64, "--window", 64)
    assert json.loads((out / "kvp.json").read_text())["predictor"]["preceding"] == preceding


def test_prefix_of_all_layers_but_one_has_no_maps(base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp) -> None:
    out = tmp_path / "bundle"
    outcome = kvp("fit", base_dir, "--layers", 3, "--data", text_file, "--out", out, "--tokens", 64)
    assert outcome.code == 0, outcome.err
    assert cache_error(out) < 1e-9


def test_base_as_its_own_auxiliary_is_fitted_exactly(base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp) -> None:
    out = tmp_path / "bundle"
    kvp("fit", base_dir, "--auxiliary", base_dir, "--data", text_file, "--out", out, "--tokens", 800, "--penalty", 1e-8)
    assert cache_error(out) < 1e-4  # the maps are stored in fp16


def test_same_seed_same_maps(base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp) -> None:
    common = ("fit", base_dir, "--layers", 1, "--data", text_file, "--tokens", 300, "--window", 64)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        kvp(*common, "--seed", seed, "--out", tmp_path / name)
    a, b, c = ((tmp_path / name / "predictor.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_auxiliary_runs_under_plain_mlx_lm(base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp) -> None:
    out = tmp_path / "bundle"
    kvp("fit", base_dir, "--prune", 0.5, "--data", text_file, "--out", out, "--tokens", 64)
    pruned, _ = load_model(out / "auxiliary")
    base, _ = load_model(base_dir)
    base.model.layers = [base.model.layers[i] for i in (0, 2)]
    ids = mx.array([[5, 6, 7]])
    assert mx.allclose(pruned(ids, cache=make_prompt_cache(pruned)), base(ids)).item()


def test_pruning_cuts_per_layer_lists() -> None:
    config = {"num_transformer_layers": 4, "num_kv_heads": [1, 2, 3, 4], "rope": [1.0, 2.0], "name": "x"}
    assert prune_config(config, [0, 2]) == {
        "num_transformer_layers": 2,
        "num_kv_heads": [1, 3],
        "rope": [1.0, 2.0],
        "name": "x",
    }


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_every_text_format_is_read(base_dir: Path, tmp_path: Path, kvp: Kvp) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(data / "a.txt", TEXT * 2)
    write(data / "b.jsonl", json.dumps({"text": TEXT * 2}) + "\n\n" + json.dumps({"text": TEXT}) + "\n")
    chat = {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Yes."}]}
    write(data / "c.jsonl.gz", gzip.compress(json.dumps(chat).encode()))
    write(data / "ignored.pdf", b"%PDF")
    outcome = kvp("fit", base_dir, "--layers", 1, "--data", data, "--out", tmp_path / "out", "--window", 64)
    assert outcome.code == 0, outcome.err
    recipe = json.loads((tmp_path / "out" / "kvp.json").read_text())["training"]
    assert recipe["data"] == ["a.txt", "b.jsonl", "c.jsonl.gz"]
    assert recipe["tokens"] > 200


BAD_DATA = {
    "missing": (lambda d: d / "no.txt", "does not exist"),
    "empty folder": (lambda d: d, "no .txt"),
    "wrong type": (lambda d: write(d / "a.pdf", b"%PDF"), "none of .txt"),
    "not UTF-8": (lambda d: write(d / "a.txt", b"caf\xe9" * 50), "UTF-8"),
    "not JSON": (lambda d: write(d / "a.jsonl", '{"text": "x"}\nnonsense\n'), "line 2"),
    "no text": (lambda d: write(d / "a.jsonl", '{"title": "x"}\n'), "'text'"),
    "gzip cut short": (lambda d: write(d / "a.txt.gz", gzip.compress(TEXT.encode())[:-30]), "cannot be read"),
    "messages of strings": (lambda d: write(d / "a.jsonl", '{"messages": ["x"]}'), "line 1"),
    "not gzip": (lambda d: write(d / "a.txt.gz", "plain"), "cannot be read"),
    "too short": (lambda d: write(d / "a.txt", "Hello."), "32 tokens"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_one_line_and_nothing_is_left(name: str, base_dir: Path, tmp_path: Path, kvp: Kvp) -> None:
    make, named = BAD_DATA[name]
    data = tmp_path / "data"
    data.mkdir()
    outcome = kvp("fit", base_dir, "--layers", 1, "--data", make(data), "--out", tmp_path / "out")
    assert outcome.code == 2
    assert named in outcome.err
    assert outcome.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((), "exactly one of"),
        (("--layers", 1, "--prune", 0.5), "exactly one of"),
        (("--layers", 4), "between 1 and 3"),
        (("--prune", 0.3), "0.75, 0.5 or 0.25"),
        (("--layers", 1, "--sources", 2), "--sources"),
        (("--layers", 1, "--preceding", 9), "--preceding"),
        (("--prune", 0.5, "--sources", 9), "1 to 2"),
        (("--layers", 1, "--tokens", 0), "--tokens"),
        (("--layers", 1, "--penalty", "nan"), "--penalty"),
        (("--auxiliary", "nowhere/at/all"), "nowhere"),
    ],
)
def test_bad_options_are_named(
    options: tuple, named: str, base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp
) -> None:
    outcome = kvp("fit", base_dir, *options, "--data", text_file, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert named in outcome.err
    assert not list(tmp_path.iterdir())


def test_auxiliary_of_another_vocabulary_is_refused(base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp) -> None:
    other = write_llama(tmp_path / "other", vocab_size=200)
    outcome = kvp("fit", base_dir, "--auxiliary", other, "--data", text_file, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "vocabulary (200)" in outcome.err


def test_existing_output_stays_unless_forced(base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp) -> None:
    out = tmp_path / "out"
    common = ("fit", base_dir, "--layers", 1, "--data", text_file, "--tokens", 64, "--out", out)
    assert kvp(*common).code == 0
    before = (out / "predictor.safetensors").read_bytes()
    refused = kvp(*common, "--seed", 7)
    assert refused.code == 2
    assert "--force" in refused.err
    assert (out / "predictor.safetensors").read_bytes() == before
    assert kvp(*common, "--seed", 7, "--window", 40, "--force").code == 0
    assert (out / "predictor.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["chapter1.txt", "config.json"])
def test_force_replaces_bundles_only(name: str, base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    write(out / name, "precious")
    outcome = kvp("fit", base_dir, "--layers", 1, "--data", text_file, "--out", out, "--force")
    assert outcome.code == 2
    assert (out / name).read_text() == "precious"


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_output_that_overlaps_the_base_is_refused(place: str, text_file: Path, tmp_path: Path, kvp: Kvp) -> None:
    base = write_llama(tmp_path / "models" / "base")
    before = sorted(tmp_path.rglob("*"))
    outcome = kvp("fit", base, "--layers", 1, "--data", text_file, "--out", base / place, "--force")
    assert outcome.code == 2
    assert "overlaps" in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_symlinked_output_is_replaced_where_it_points(
    base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp
) -> None:
    common = ("fit", base_dir, "--layers", 1, "--data", text_file, "--tokens", 64, "--force", "--out")
    kvp(*common, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert kvp(*common, tmp_path / "link", "--window", 40).code == 0
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real" / "kvp.json").read_text())["training"]["window"] == 40


def test_terminated_fit_leaves_nothing(base_dir: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = write(tmp_path / "long.txt", text_file.read_text() * 2000)
    command = [sys.executable, "-m", "kvp_mlx", "fit", str(base_dir), "--layers", "1"]
    process = subprocess.Popen([*command, "--data", str(data), "--out", str(out), "--tokens", "100000000"])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.glob(".out.*")), "the fit never started to write"
    process.terminate()
    assert process.wait(timeout=30) == 143
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]


def test_pruning_moves_the_quantisation_of_single_modules() -> None:
    odd, plain = {"group_size": 32, "bits": 8}, {"group_size": 32, "bits": 4}
    quantization = plain | {"model.layers.1.mlp.up_proj": odd, "model.layers.2.mlp.up_proj": odd, "lm_head": odd}
    config = prune_config({"num_hidden_layers": 4, "quantization": quantization, "eos_token_id": [1, 2, 3, 4]}, [0, 2])
    assert config["quantization"] == plain | {"model.layers.1.mlp.up_proj": odd, "lm_head": odd}
    assert config["eos_token_id"] == [1, 2, 3, 4]


def test_an_unknown_architecture_is_refused_by_name(text_file: Path, tmp_path: Path, kvp: Kvp) -> None:
    base = write_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mamba2"}))
    (base / "model.safetensors").unlink()  # so that it would be missed if anybody read on
    outcome = kvp("fit", base, "--layers", 1, "--data", text_file, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "architecture 'mamba2' is not supported" in outcome.err
    assert not (tmp_path / "out").exists()


def test_sliding_window_base_is_fitted_and_cannot_recompute(text_file: Path, tmp_path: Path, kvp: Kvp) -> None:
    layer_types = ["full_attention", "sliding_attention"] * 2
    base = write_llama(tmp_path / "base", layer_types=layer_types, sliding_window=16)
    out = tmp_path / "out"
    common = ("--data", text_file, "--tokens", 600, "--window", 64, "--out", out)
    assert kvp("fit", base, "--layers", 1, *common).code == 0
    asked = ("generate", text_file.read_text()[:200], "--model", out, "--max-tokens", 3, "--prefill", "kvp")
    result = kvp(*asked, "--exact-tail", 8, "--json").json()
    assert (result["prefill"], result["recomputed_tokens"]) == ("kvp", 8)
    outcome = kvp(*asked, "--recompute", 0.5)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "never recomputes" in outcome.err


def test_several_prefixes_in_one_pass_are_what_each_alone_is(
    base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp
) -> None:
    common = ("fit", base_dir, "--data", text_file, "--tokens", 300, "--window", 64)
    outcome = kvp(*common, "--layers", "2,1", "--out", tmp_path / "several", "--json")
    assert outcome.code == 0, outcome.err
    for layers in (1, 2):
        assert kvp(*common, "--layers", layers, "--out", tmp_path / str(layers)).code == 0
        alone, together = (folder / str(layers) for folder in (tmp_path, tmp_path / "several"))
        assert (alone / "kvp.json").read_text() == (together / "kvp.json").read_text()
        assert (alone / "predictor.safetensors").read_bytes() == (together / "predictor.safetensors").read_bytes()


@pytest.mark.parametrize("layers", ["1,x", "0", "1,99", ""])
def test_prefixes_that_are_none_are_refused(
    base_dir: Path, text_file: Path, tmp_path: Path, kvp: Kvp, layers: str
) -> None:
    outcome = kvp("fit", base_dir, "--layers", layers, "--data", text_file, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
