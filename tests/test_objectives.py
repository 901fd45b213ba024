"""What training minimises, against the runtime itself and against NumPy in float64."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from support import losses as plain
from support.oracle import KVPrediction
from support.tiny import llama, openelm, paired, prefixed, pruned, small_llama, token_ids

import kvp_mlx
from kvp_mlx.adapter import SCALE, adapted_prefix, adapter_weights
from kvp_mlx.bundle import KVPModel
from kvp_mlx.errors import InputError
from kvp_mlx.train.loop import Trained, TrainOptions, gradients_of, split_points
from kvp_mlx.train.objectives import (
    OBJECTIVES,
    Weights,
    auxiliary_loss,
    base_loss,
    consistency_loss,
    continuation_losses,
    kl_divergence,
    log_partition,
    predict,
    weights_of,
)
from kvp_mlx.train.teacher import Batch, make_batch, read, teach

Z = 1e-2
SPLIT, END = 17, 26


def adapted() -> tuple[KVPModel, KVPrediction]:
    """A prefix that reads with low-rank updates which are not zero."""
    model, oracle = prefixed(llama(), 1)
    mx.random.seed(0)
    auxiliary = adapted_prefix(model.base, 1, 2)
    updates = {
        name: mx.random.normal(array.shape) * (0.1 if name.endswith("lora_b") else 0.3)
        for name, array in adapter_weights(auxiliary).items()
    }
    auxiliary.load_weights(list(updates.items()), strict=False)
    config = model.config.model_copy(
        update={"auxiliary": model.config.auxiliary.model_copy(update={"adapter_rank": 2})}
    )
    arrays = {name: np.array(array) for name, array in updates.items()}
    return replace(model, auxiliary=auxiliary, config=config), plain.with_updates(oracle, arrays, SCALE)


MODELS: dict[str, Callable[[], tuple[KVPModel, KVPrediction]]] = {
    "prefix of llama": lambda: prefixed(llama(), 1),
    "prefix of openelm": lambda: prefixed(openelm(), 1),
    "model": lambda: paired(llama(), small_llama(), [(0,), (0,), (1,), (2,)]),
    "pruned": lambda: paired(openelm(), pruned(openelm(), [0, 2]), [(0,), (0,), (1,), (1,)], retained=[0, 2]),
    "two sources": lambda: paired(llama(), small_llama(), [(0, 1), (0, 1), (1, 2), (1, 2)]),
    "prefix with updates": adapted,
}
WITH_OUTPUT = ("model", "pruned", "two sources")
each_model = pytest.mark.parametrize("name", MODELS)


def batch_of(*documents: np.ndarray) -> Batch:
    return make_batch([document[0].tolist() for document in documents])


def losses_of(model: KVPModel, batch: Batch, split: int = SPLIT, end: int = END, **options: Any) -> dict[str, mx.array]:
    """All losses by name, differentiable in the maps and whatever else the reading is made of."""
    teacher = teach(model, batch)
    reading = teacher.reading or read(model, batch.ids)
    predicted = predict(model, teacher, reading, batch.ids.shape[1])
    kl, residual = continuation_losses(model, teacher, reading, batch, split, end, **options)
    losses = {
        "continuation": kl,
        "residual": residual,
        "base": base_loss(model, teacher, reading, predicted, batch, Z),
        "consistency": consistency_loss(model, teacher, predicted, batch),
    }
    if not model.is_prefix:
        losses["auxiliary"] = auxiliary_loss(model, reading, batch, Z)
    return losses


def plain_losses(oracle: KVPrediction, ids: np.ndarray) -> dict[str, float]:
    kl, residual = plain.continuation(oracle, ids, SPLIT, END)
    return {
        "continuation": kl,
        "residual": residual,
        "base": plain.base(oracle, ids, Z),
        "consistency": plain.consistency(oracle, ids),
        "auxiliary": plain.auxiliary(oracle, ids, Z),
    }


# --- values ----------------------------------------------------------------------------------------------------------


@each_model
def test_continuation_is_the_divergence_that_decoding_sees(name: str) -> None:
    """Written out with the runtime's own predicted cache and the plain model."""
    model, _ = MODELS[name]()
    ids = token_ids(30)
    loss = losses_of(model, batch_of(ids))["continuation"].item()
    cache = kvp_mlx.predict_base_cache(model, mx.array(ids[:, :SPLIT]))
    student = model.base(mx.array(ids[:, SPLIT:END]), cache=cache)
    true = model.base(mx.array(ids), cache=make_prompt_cache(model.base))[:, SPLIT:END]
    assert loss == pytest.approx(plain.divergence(np.array(true), np.array(student)).mean(), rel=1e-4)
    assert loss > 1e-3


@each_model
def test_every_loss_is_what_numpy_makes_of_it(name: str) -> None:
    model, oracle = MODELS[name]()
    ids = token_ids(30)
    found, expected = losses_of(model, batch_of(ids)), plain_losses(oracle, ids)
    for loss, value in found.items():
        assert value.item() == pytest.approx(expected[loss], rel=2e-4), loss
        assert value.item() > 1e-3


def test_teacher_in_chunks_is_the_teacher_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = token_ids(30)
    for name, make in MODELS.items():
        model, _ = make()
        whole = losses_of(model, batch_of(ids))
        with monkeypatch.context() as patch:
            patch.setattr("kvp_mlx.train.teacher.CHUNK", 7)
            chunked = losses_of(model, batch_of(ids))
        for loss, value in whole.items():
            assert chunked[loss].item() == pytest.approx(value.item(), rel=1e-4), (name, loss)


def test_exact_entries_have_no_loss() -> None:
    """A prefix of all layers but the last leaves nothing to predict."""
    model, _ = prefixed(llama(), 3)
    batch = batch_of(token_ids(30))
    teacher = teach(model, batch)
    kl, residual = continuation_losses(model, teacher, teacher.reading, batch, SPLIT, END)
    assert kl.item() == pytest.approx(0, abs=1e-5)
    assert residual.item() == 0


@pytest.mark.parametrize("name", ["prefix of llama", "prefix of openelm", "model", "pruned", "two sources"])
def test_base_loss_with_true_entries_is_the_plain_cross_entropy(name: str) -> None:
    """Its own position included: with the true entries in the predicted ones' place nothing is changed."""
    model, oracle = MODELS[name]()
    ids = token_ids(30)
    batch = batch_of(ids)
    teacher = teach(model, batch)
    reading = teacher.reading or read(model, batch.ids)
    found = base_loss(model, teacher, reading, teacher.raw, batch, Z).item()
    assert found == pytest.approx(plain.cross_entropy(oracle.base.forward(ids).logits, ids, Z), rel=1e-5)


def test_z_loss_is_the_squared_log_partition() -> None:
    model, oracle = MODELS["model"]()
    ids = token_ids(20)
    batch = batch_of(ids)
    reading = read(model, batch.ids)
    without, half, whole = (auxiliary_loss(model, reading, batch, z).item() for z in (0.0, 0.5, 1.0))
    logits = oracle.auxiliary.forward(ids).logits[:, :-1]
    squared = np.square(np.log(np.exp(logits).sum(axis=-1))).mean()
    assert half - without == pytest.approx(0.5 * squared, rel=1e-5)
    assert whole - without == pytest.approx(squared, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_divergence_and_log_partition_of_logits_of_any_size(scale: float, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(0)
    true, predicted = (mx.array(scale * rng.normal(size=(2, 3, 50)), dtype) for _ in range(2))
    expected = plain.divergence(*(np.array(x.astype(mx.float32)) for x in (true, predicted)))
    found = np.array(kl_divergence(true, predicted))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * max(scale, 1))
    logits = np.array(true.astype(mx.float32), np.float64)
    partition = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    wide = true.astype(mx.float32)
    np.testing.assert_allclose(np.array(log_partition(wide, mx.softmax(wide, axis=-1))), partition, rtol=1e-6)
    assert np.abs(np.array(kl_divergence(true, true))).max() == 0


def test_divergence_of_very_close_distributions_keeps_its_sign_and_size() -> None:
    """Where training ends: differences of 1e-3 in logits, a divergence of 1e-7."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(1, 400, 300)).astype(np.float32)
    predicted = (true + rng.normal(0, 1e-2, true.shape)).astype(np.float32)
    found = kl_divergence(mx.array(true), mx.array(predicted)).mean().item()
    assert found == pytest.approx(plain.divergence(true, predicted).mean(), rel=1e-2)


# --- padding ---------------------------------------------------------------------------------------------------------


@each_model
def test_padded_batch_is_the_token_weighted_mean_of_its_windows(name: str) -> None:
    model, _ = MODELS[name]()
    long, short = token_ids(30, seed=1), token_ids(21, seed=2)
    both = losses_of(model, batch_of(long, short))
    one, other = losses_of(model, batch_of(long)), losses_of(model, batch_of(short), end=21)
    tokens = {
        "continuation": (END - SPLIT, 21 - SPLIT),
        "residual": (END - SPLIT, 21 - SPLIT),
        "base": (29, 20),
        "auxiliary": (29, 20),
        "consistency": (30, 21),
    }
    for loss, value in both.items():
        expected = np.average([one[loss].item(), other[loss].item()], weights=tokens[loss])
        assert one[loss].item() != pytest.approx(other[loss].item(), rel=1e-3)
        assert value.item() == pytest.approx(expected, rel=1e-5), loss


@each_model
def test_what_padding_holds_changes_nothing_at_all(name: str) -> None:
    model, _ = MODELS[name]()
    batch = batch_of(token_ids(30, seed=1), token_ids(21, seed=2))
    other = Batch(mx.where(batch.kept, batch.ids, 55), batch.kept)
    (losses, gradient), (same_losses, same_gradient) = (
        everything(model, TrainOptions(tokens=1, minutes=None, weights=ALL), one) for one in (batch, other)
    )
    assert losses == same_losses
    for key, array in gradient.items():
        assert np.array_equal(array, same_gradient[key]), key


# --- gradients -------------------------------------------------------------------------------------------------------


ALL = Weights(continuation=1, residual=1, base=1, auxiliary=0, consistency=1)


def everything(
    model: KVPModel, options: TrainOptions, batch: Batch, **trained: Any
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The losses of a batch and their gradient, as the training loop adds them up."""
    losses: dict[str, float] = {}
    total: dict[str, np.ndarray] = {}
    for part, gradient in gradients_of(model, Trained(model, options), batch, options, random.Random(0)):
        for name, value in part.items():
            losses[name] = losses.get(name, 0.0) + value.item()
        for name, array in tree_flatten(gradient):
            total[name] = total.get(name, 0.0) + np.array(array, np.float64)
    return losses, total


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
        for loss, gradients in found.items():
            gradient = gradients[f"auxiliary.{weight}.weight"]
            scale = np.linalg.norm(gradient)
            assert (gradient * direction).sum() == pytest.approx(expected[loss], rel=1e-2, abs=1e-3 * scale), (
                loss,
                weight,
            )


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
            for loss, gradients in found.items():
                gradient = gradients[f"auxiliary.{name}"]
                scale = np.linalg.norm(gradient)
                assert (gradient * direction).sum() == pytest.approx(expected[loss], rel=1e-2, abs=1e-3 * scale), (
                    loss,
                    name,
                )


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
    again, other = everything(model, replace(options, checkpoint=True), batch)
    assert again == pytest.approx(losses, rel=1e-5)
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


@each_model
def test_parts_add_up_to_the_weighted_sum(name: str) -> None:
    """What the loop takes as its loss and gradient is the sum that the weights say, split by split."""
    model, oracle = MODELS[name]()
    weights = Weights(
        continuation=2, residual=3, base=0.5, auxiliary=0.0 if model.is_prefix else 0.7, consistency=0.1, z=Z
    )
    options = TrainOptions(weights=weights, right=8, splits=3)
    ids = token_ids(40)
    losses, _ = everything(model, options, batch_of(ids))
    parts = [losses["continuation"] + 3 * losses["residual"], losses["base"], losses["consistency"]]
    expected = np.dot([2, 0.5, 0.1], parts) + 0.7 * losses.get("auxiliary", 0.0)
    assert losses["loss"] == pytest.approx(expected, rel=1e-5)
    points = split_points(batch_of(ids), options, random.Random(0))
    pairs = np.array([plain.continuation(oracle, ids, split, end) for split, end in points])
    assert losses["continuation"] == pytest.approx(pairs[:, 0].mean(), rel=2e-4)
    assert losses["residual"] == pytest.approx(pairs[:, 1].mean(), rel=2e-4)


def test_split_points_stay_inside_the_shortest_window() -> None:
    batch = batch_of(token_ids(200), token_ids(60))
    options = TrainOptions(right=24, splits=4)
    drawn = [split_points(batch, options, random.Random(seed)) for seed in range(300)]
    rights = [[end - split for split, end in points] for points in drawn]
    assert all(row == [24, 6, 24, 6] for row in rights)
    splits = [split for points in drawn for split, _ in points]
    assert min(splits) == 15
    assert max(end for points in drawn for _, end in points) == 60
    assert len(set(splits)) > 30


# --- weights ---------------------------------------------------------------------------------------------------------


def test_defaults_depend_on_the_bundle() -> None:
    prefix, model = MODELS["prefix of llama"]()[0], MODELS["model"]()[0]
    settled = OBJECTIVES["paper"].settled(model)
    assert (settled.continuation, settled.base, settled.auxiliary, settled.z) == (0, 1, 1, 1e-4)
    assert settled.consistency == pytest.approx(1 / 4)
    assert OBJECTIVES["paper"].settled(prefix).auxiliary == 0
    deeper = prefixed(llama(num_hidden_layers=6), 1)[0]
    assert OBJECTIVES["paper"].settled(deeper).consistency == pytest.approx(1 / 6)
    assert OBJECTIVES["continuation"].settled(prefix) == Weights(1, 5, 0, 0, 0, 0)


def test_given_weights_take_the_place_of_the_named_ones() -> None:
    weights = weights_of("paper", base=None, consistency=0.5, continuation=0.25, z=0.0)
    assert weights == Weights(continuation=0.25, residual=5, base=1, auxiliary=None, consistency=0.5, z=0)
    assert weights.paper
    assert not Weights().paper


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"base": -1}, "negative"),
        ({"consistency": -0.1}, "negative"),
        ({"continuation": 0}, "weight 0"),
        ({"continuation": 0, "residual": 5, "z": 1}, "weight 0"),
        ({"base": float("nan")}, "weight"),
        ({"base": float("inf")}, "weight"),
    ],
)
def test_useless_weights_are_refused(weights: dict[str, float], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Weights(**weights)


def test_auxiliary_loss_of_a_prefix_is_refused() -> None:
    model = MODELS["prefix of llama"]()[0]
    with pytest.raises(InputError, match="--auxiliary-weight"):
        Weights(auxiliary=1).settled(model)
    with pytest.raises(InputError, match="weight 0"):
        Weights(continuation=0, auxiliary=None).settled(model)
