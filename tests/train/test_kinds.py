"""Fitting and training on every architecture, and what its kinds of layer allow of training's options."""

import itertools
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache
from support.architectures import CONFIGS, VOCABULARY, bundle, config_of, random_ids, tiny_model
from support.directories import TEXT, write_random, write_tokenizer

from kvp_mlx.engine.auxiliary import auxiliary_prefill
from kvp_mlx.models.families import kinds_of, text_model
from kvp_mlx.models.sections import run_layers
from kvp_mlx.train.loop import Trained, TrainOptions, make_optimizer, take_step
from kvp_mlx.train.objectives import Weights
from kvp_mlx.train.ridge import fit_predictors
from kvp_mlx.train.run import check_kinds, make_trainable
from kvp_mlx.train.state import TrainingState

WRITERS = ("o_proj", "out_proj", "down_proj", "dense", "output_linear", "w2", "proj_2")
"""Projections whose outputs are added to the residual stream."""
RECURRENT = ["qwen3_next", "qwen3_5", "qwen3_5_moe", "lfm2", "lfm2_moe"]


def windows(seed, count, tokens=48):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (count, tokens)).tolist()


def planted(name):
    """A model whose layers add nothing to the residual stream: all that they read is linear in the prefix's input."""
    base = text_model(tiny_model(name))
    silent = tree_map_with_path(
        lambda path, x: mx.zeros_like(x) if {*path.split(".")} & {*WRITERS} else x, base.parameters()
    )
    base.update(silent)
    return base


@pytest.mark.parametrize("name", CONFIGS)
def test_planted_linear_relations_are_recovered(name):
    base = planted(name)
    model = bundle(base, 1)
    fit_predictors([model], windows(0, 12), penalty=1e-9, progress=lambda done: None)
    ids = random_ids(31, 2)
    _, captured = run_layers(base, ids, make_prompt_cache(base), range(len(kinds_of(base))))
    inputs, _ = auxiliary_prefill(model, ids, make_prompt_cache(base))
    found = model.predictor(inputs)
    assert sorted(found) == list(range(2, len(kinds_of(base))))
    for layer, outputs in found.items():
        for target, output in outputs.items():
            true = captured[layer].raw[target]
            assert mx.abs(output - true).max() < 2e-3 * mx.abs(true).max(), (layer, target)


@pytest.mark.parametrize("objective", ["continuation", "paper"])
@pytest.mark.parametrize("name", CONFIGS)
def test_train_steps_lower_the_loss(name, objective):
    model = bundle(text_model(tiny_model(name)), 1)
    base = 0.0 if name in RECURRENT else 1.0
    weights = Weights() if objective == "continuation" else Weights(0, base=base, consistency=0.5)
    options = TrainOptions(minutes=None, tokens=1, window=48, right=16, splits=1, learning_rate=1e-2, weights=weights)
    model = make_trainable(model, options)
    trained, state = Trained(model, options), TrainingState(np.random.default_rng(0).integers(0, 2**31))
    optimizer, stream = make_optimizer(options, trained), itertools.repeat(windows(2, 4))
    losses = []
    for _ in range(8):
        state.batches = 0  # the same splits each time
        losses.append(take_step(model, trained, optimizer, stream, state, options)[0]["loss"])
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def directory_of(path, name):
    """Write a model directory of a tiny random model, with a tokeniser."""
    write_random(path, config_of(name, vocab_size=300, max_position_embeddings=2048) | {"eos_token_id": 2})
    write_tokenizer(path)
    return path


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 30)
    return file


@pytest.mark.parametrize("name", ["exaone4", "deepseek_v3", "qwen3_next", "gpt_oss", "lfm2_moe"])
def test_fit_and_generate(name, text_file, tmp_path, kvp):
    base, out = directory_of(tmp_path / name, name), tmp_path / "out"
    outcome = kvp("fit", base, "--layers", 1, "--data", text_file, "--tokens", 600, "--window", 96, "--out", out)
    assert outcome.code == 0, outcome.err
    asked = ("generate", TEXT[:300], "--model", out, "--max-tokens", 4, "--prefill", "kvp", "--json")
    result = kvp(*asked).json()
    assert (result["prefill"], result["exact_tail"]) == ("kvp", 32)
    again = kvp(*asked, "--recompute", 0.5)
    if name == "deepseek_v3":
        assert again.json()["recomputed_tokens"] > result["recomputed_tokens"]
    else:
        assert (again.code, again.err.count("\n")) == (2, 1)
        assert "exact tail goes on" in again.err
    assert (json.loads((out / "kvp.json").read_text())["recompute"] is not None) == (name == "deepseek_v3")


OTHER_KINDS = {"qwen3": "full attention", "qwen3_5": "gated delta net", "lfm2": "short convolution"}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_bundle_for_another_kind_is_refused_by_name_before_weights_are_read(name, text_file, tmp_path, kvp):
    base, out = directory_of(tmp_path / "base", "qwen3_next"), tmp_path / "out"
    common = ("--data", text_file, "--tokens", 400, "--window", 96, "--out", out)
    assert kvp("fit", base, "--layers", 1, *common).code == 0
    other = directory_of(tmp_path / name, name)
    outcome = kvp("generate", "Hello", "--model", out, "--base", other)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "made for a qwen3_next model" in outcome.err
    assert OTHER_KINDS[name] in outcome.err
    if name != "qwen3_5":  # which has the very same projections
        mismatched = kvp("generate", "Hello", "--model", out, "--base", other, "--allow-base-mismatch")
        assert (mismatched.code, mismatched.err.count("\n")) == (2, 1)


def test_kv_bits_are_refused_by_kind(text_file, tmp_path, kvp):
    outcome = kvp("generate", "Hello", "--model", directory_of(tmp_path / "base", "lfm2"), "--kv-bits", 8)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "short convolution" in outcome.err


PRUNED = {
    "deepseek_v3": True,
    "qwen3_moe": True,
    "mistral3": True,
    "lfm2": True,
    "qwen3_next": "gated delta net",
    "gpt_oss": "sliding attention",
    "exaone4": "full attention",
}


@pytest.mark.parametrize("name", PRUNED)
def test_pruning_keeps_kinds_or_is_refused_by_them(name, text_file, tmp_path, kvp):
    base, out = directory_of(tmp_path / name, name), tmp_path / "out"
    outcome = kvp("fit", base, "--prune", 0.5, "--data", text_file, "--tokens", 400, "--window", 96, "--out", out)
    if PRUNED[name] is not True:
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert PRUNED[name] in outcome.err
        assert not out.exists()
        return
    assert outcome.code == 0, outcome.err
    asked = ("generate", TEXT[:300], "--model", out, "--max-tokens", 4, "--prefill", "kvp", "--json")
    assert kvp(*asked).json()["prefill"] == "kvp"


def test_an_auxiliary_of_the_same_kinds_serves_each_layer_from_one_that_can(text_file, tmp_path, kvp):
    base, out = directory_of(tmp_path / "base", "qwen3_next"), tmp_path / "out"
    small = config_of("qwen3_next", vocab_size=300, num_hidden_layers=4)
    auxiliary = write_random(tmp_path / "small", small, seed=1)
    common = ("--data", text_file, "--tokens", 400, "--window", 96)
    outcome = kvp("fit", base, "--auxiliary", auxiliary, *common, "--out", out)
    assert outcome.code == 0, outcome.err
    layer_map = json.loads((out / "kvp.json").read_text())["predictor"]["layer_map"]
    assert layer_map == [[0], [0], [1], [1], [2], [2], [2], [3]]  # the sixth and seventh: not from full attention
    asked = ("generate", TEXT[:300], "--model", out, "--max-tokens", 4, "--prefill", "kvp", "--json")
    assert kvp(*asked).json()["prefill"] == "kvp"
    other = directory_of(tmp_path / "llama", "qwen3")
    refused = kvp("fit", base, "--auxiliary", other, *common, "--out", tmp_path / "no")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "gated delta net" in refused.err


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2"])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--objective", "paper"), "--objective paper"),
        (("--lora-rank", 4), "--lora-rank"),
        (("--recompute", 0.1), "--recompute"),
    ],
)
def test_what_needs_entries_is_refused_by_kind_before_the_fit(name, options, named, text_file, tmp_path, kvp):
    base = directory_of(tmp_path / name, name)
    (base / "model.safetensors").unlink()  # it would be missed if anybody read on
    outcome = kvp("train", base, "--layers", 2, *options, "--data", text_file, "--out", tmp_path / "out")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert named in outcome.err
    assert {"qwen3_next": "gated delta net", "lfm2": "short convolution"}[name] in outcome.err


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "qwen3_moe"])
def test_kinds_with_entries_are_trained_by_either(name, tmp_path):
    options = TrainOptions(
        minutes=None, tokens=1, weights=Weights(base=1), window=48, right=16, lora_rank=4, learning_rate=1e-3
    )
    check_kinds(directory_of(tmp_path, name), options, 2)
    model = make_trainable(bundle(tiny_model(name), 2), options)
    trained, stream = Trained(model, options), itertools.repeat(windows(2, 4))
    losses, _ = take_step(model, trained, make_optimizer(options, trained), stream, TrainingState(), options)
    assert np.isfinite(list(losses.values())).all()


def test_a_prefix_with_entries_may_have_updates_on_a_hybrid(tmp_path):
    base = directory_of(tmp_path, "gemma3_text")
    check_kinds(base, TrainOptions(minutes=None, tokens=1, lora_rank=4), 2)
