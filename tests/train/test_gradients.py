"""Gradients of all that training minimises, against central differences in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support import losses as plain
from support.objectives import ALL, MODELS, adapted, batch_of, each_model, everything, losses_of, plain_losses
from support.tiny import llama, prefixed, token_ids

from kvp_mlx.bundle.adapter import SCALE, adapter_weights
from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.train.loop import Trained, TrainOptions


def map_gradients(model: KVPModel, gradient: dict[str, np.ndarray]) -> dict[tuple[int, str], list[np.ndarray]]:
    """Cut the wide maps' gradients up: per base layer and kind, of the weight and of the bias."""
    cut = {}
    for block in model.predictor.blocks:
        start = 0
        for layer, kind, width in block.targets:
            arrays = (gradient[f"predictor.maps.{block.name}.{part}"] for part in ("weight", "bias"))
            cut[layer, kind] = [array[start : start + width] for array in arrays]
            start += width
    return cut


def slopes(function: Callable[[float], dict[str, float]]) -> dict[str, float]:
    """Central differences at 0."""
    step = 1e-5
    up, down = function(step), function(-step)
    return {name: (up[name] - down[name]) / (2 * step) for name in up}


def gradients_by_loss(model: KVPModel, ids: np.ndarray, options: TrainOptions) -> dict[str, dict[str, np.ndarray]]:
    trained, batch = Trained(model, options), batch_of(ids)
    found = {}
    for loss in losses_of(model, batch):
        _, gradient = nn.value_and_grad(trained, lambda loss=loss: losses_of(model, batch)[loss])()
        found[loss] = {name: np.array(array, np.float64) for name, array in tree_flatten(gradient)}
    return found


@each_model
def test_gradient_in_every_map_is_the_slope(name: str) -> None:
    """Every map along a random direction, against central differences of the float64 losses."""
    model, oracle = MODELS[name]()
    ids, rng = token_ids(30), np.random.default_rng(3)
    found = {
        loss: map_gradients(model, gradient)
        for loss, gradient in gradients_by_loss(model, ids, TrainOptions()).items()
        if loss != "auxiliary"
    }
    for target, pair in oracle.maps.items():
        for part in (0, 1):
            direction = rng.normal(size=pair[part].shape)
            direction /= np.linalg.norm(direction)

            def moved(step: float, target: Any = target, part: int = part, d: np.ndarray = direction) -> dict:
                own = list(oracle.maps[target])
                own[part] = own[part] + step * d
                return plain_losses(replace(oracle, maps={**oracle.maps, target: tuple(own)}), ids)

            expected = slopes(moved)
            for loss, gradients in found.items():
                slope = (gradients[target][part] * direction).sum()
                scale = np.linalg.norm(gradients[target][part])
                assert slope == pytest.approx(expected[loss], rel=1e-2, abs=1e-3 * scale + 1e-7), (loss, target, part)


def assert_slopes(
    found: dict[str, dict[str, np.ndarray]], weight: str, direction: np.ndarray, expected: dict[str, float]
) -> None:
    """Check each loss's gradient in a weight along a direction."""
    for loss, gradients in found.items():
        scale = np.linalg.norm(gradients[weight])
        slope = (gradients[weight] * direction).sum()
        assert slope == pytest.approx(expected[loss], rel=1e-2, abs=1e-3 * scale), (loss, weight)


AUXILIARY_WEIGHTS = {
    "model": (
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.input_layernorm",
        "model.layers.2.self_attn.v_proj",
    ),
    "pruned": (
        "transformer.token_embeddings",
        "transformer.layers.0.attn.qkv_proj",
        "transformer.layers.0.attn.k_norm",
        "transformer.layers.0.ffn.proj_2",
        "transformer.layers.1.attn.qkv_proj",
    ),
}


@pytest.mark.parametrize("name", AUXILIARY_WEIGHTS)
def test_gradient_in_the_auxiliary_is_the_slope(name: str) -> None:
    model, oracle = MODELS[name]()
    ids, rng = token_ids(30), np.random.default_rng(3)
    found = gradients_by_loss(model, ids, TrainOptions(train_auxiliary=True))
    for weight in AUXILIARY_WEIGHTS[name]:
        kept = oracle.auxiliary.weights[f"{weight}.weight"]
        direction = rng.normal(size=kept.shape)
        direction /= np.linalg.norm(direction)

        def moved(step: float, key: str = f"{weight}.weight", kept: np.ndarray = kept, d: Any = direction) -> dict:
            oracle.auxiliary.weights[key] = kept + step * d
            try:
                return plain_losses(oracle, ids)
            finally:
                oracle.auxiliary.weights[key] = kept

        expected = slopes(moved)
        assert_slopes(found, f"auxiliary.{weight}.weight", direction, expected)


def test_gradient_in_the_updates_is_the_slope() -> None:
    model, reader = adapted()
    plain_prefix = prefixed(llama(), 1)[1]
    updates = {name: np.array(array, np.float64) for name, array in adapter_weights(model.auxiliary).items()}
    ids, rng = token_ids(30), np.random.default_rng(3)
    found = gradients_by_loss(model, ids, TrainOptions(lora_rank=2))
    assert plain_losses(reader, ids) == plain_losses(plain.with_updates(plain_prefix, updates, SCALE), ids)
    for owner in ("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.0.mlp.down_proj"):
        for part in ("lora_a", "lora_b"):
            name = f"model.{owner}.{part}"
            direction = rng.normal(size=updates[name].shape)
            direction /= np.linalg.norm(direction)

            def moved(step: float, name: str = name, d: np.ndarray = direction) -> dict:
                changed = updates | {name: updates[name] + step * d}
                return plain_losses(plain.with_updates(plain_prefix, changed, SCALE), ids)

            expected = slopes(moved)
            assert_slopes(found, f"auxiliary.{name}", direction, expected)


OPTIONS = {
    "maps": {},
    "updates": {"lora_rank": 2},
    "whole auxiliary": {"train_auxiliary": True},
}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    ("name", "how"),
    [(name, "maps") for name in MODELS]
    + [("prefix with updates", "updates"), ("model", "whole auxiliary"), ("pruned", "whole auxiliary")],
)
def test_gradient_reaches_what_is_trained_and_nothing_else(name: str, how: str, checkpoint: bool) -> None:
    model, _ = MODELS[name]()
    before = {key: np.array(array) for key, array in tree_flatten(model.base.parameters())}
    weights = replace(ALL, auxiliary=float(how == "whole auxiliary"))
    options = TrainOptions(weights=weights, right=8, checkpoint=checkpoint, **OPTIONS[how])
    losses, gradient = everything(model, options, batch_of(token_ids(40)))
    expected = {f"predictor.{key}" for key, _ in tree_flatten(model.predictor.parameters())}
    if how == "updates":
        expected |= {f"auxiliary.{key}" for key in adapter_weights(model.auxiliary)}
    elif how == "whole auxiliary":
        expected |= {f"auxiliary.{key}" for key, _ in tree_flatten(model.auxiliary.parameters())}
    assert gradient.keys() == expected
    unreached = {key for key, array in gradient.items() if not np.abs(array).max() > 0}
    assert unreached == {key for key in expected if how == "updates" and beyond_the_last_reading(key)}
    assert set(losses) == {"loss", "continuation", "residual", "base", "consistency"} | (
        {"auxiliary"} if weights.auxiliary else set()
    )
    after = dict(tree_flatten(model.base.parameters()))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], np.array(after[key])) for key in before)


def beyond_the_last_reading(key: str) -> bool:
    """Whether an update of the prefix's extra layer stands after its keys and values, which are all that is used."""
    return ".layers.1." in key and not any(part in key for part in ("k_proj", "v_proj"))


@each_model
def test_gradient_checkpointing_changes_neither_losses_nor_gradients(name: str) -> None:
    model, _ = MODELS[name]()
    how = {"lora_rank": 2} if name == "prefix with updates" else {"train_auxiliary": not model.is_prefix}
    options = TrainOptions(weights=ALL, right=8, **how)
    batch = batch_of(token_ids(40, seed=1), token_ids(33, seed=2))
    losses, gradient = everything(model, options, batch)
    repeated, other = everything(model, replace(options, checkpoint=True), batch)
    assert repeated == pytest.approx(losses, rel=1e-5)
    for key, array in gradient.items():
        np.testing.assert_allclose(other[key], array, rtol=1e-4, atol=1e-5 * np.abs(array).max(), err_msg=key)


def test_gradient_checkpointing_saves_memory() -> None:
    model, _ = prefixed(llama(num_hidden_layers=16), 1)
    batch = batch_of(token_ids(400, batch=1))
    peaks = {}
    for checkpoint in (False, True):
        options = TrainOptions(window=400, right=200, splits=1, checkpoint=checkpoint)
        everything(model, options, batch)
        mx.clear_cache()
        mx.reset_peak_memory()
        start = mx.get_active_memory()
        everything(model, options, batch)
        peaks[checkpoint] = mx.get_peak_memory() - start
    assert peaks[True] < 0.7 * peaks[False]
