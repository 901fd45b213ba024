"""What training minimises, against the runtime itself and against NumPy in float64."""

import random
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support import losses as plain
from support.objectives import (
    ALL,
    END,
    MODELS,
    SPLIT,
    Z,
    batch_of,
    each_model,
    everything,
    losses_of,
    plain_losses,
)
from support.tiny import estimating, llama, prefixed, token_ids

import kvp_mlx
from kvp_mlx.bundle.config import RecomputeConfig
from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.engine.auxiliary import auxiliary_prefill
from kvp_mlx.engine.prefill import base_prefill
from kvp_mlx.errors import InputError
from kvp_mlx.train.loop import TrainOptions, split_points
from kvp_mlx.train.objectives import (
    OBJECTIVES,
    Weights,
    auxiliary_loss,
    base_loss,
    continuation_losses,
    kl_divergence,
    log_partition,
    predict,
    student_cache,
    weights_of,
    with_true_entries,
)
from kvp_mlx.train.teacher import Batch, read, teach


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


def choosing(model: KVPModel, **settings: Any) -> KVPModel:
    """Return a bundle that recomputes the same tokens in all layers, an end of four in any case."""
    recompute = RecomputeConfig(asking_tokens=4, lower_layers=1.0, **settings)
    return replace(estimating(model), config=model.config.model_copy(update={"recompute": recompute}))


@each_model
def test_tokens_that_will_be_recomputed_are_exact_in_training(name: str) -> None:
    """Written out with a cache that holds true entries of the end and of what the estimator thinks worst of."""
    model = choosing(MODELS[name]()[0])
    ids = token_ids(30)
    loss = losses_of(model, batch_of(ids), recompute=0.3)["continuation"].item()
    inputs, _ = auxiliary_prefill(model, mx.array(ids[:, :SPLIT]), make_prompt_cache(model.auxiliary))
    worst = mx.argsort(-model.predictor.deviations(inputs)[0, : SPLIT - 4])[: round(0.3 * (SPLIT - 4))]
    worst = mx.concatenate([worst, mx.arange(SPLIT - 4, SPLIT)])
    cache, true = (make(model, mx.array(ids[:, :SPLIT])) for make in (kvp_mlx.predict_base_cache, base_prefill))
    for layer, other in zip(cache, true, strict=True):
        layer.keys[:, :, worst], layer.values[:, :, worst] = other.keys[:, :, worst], other.values[:, :, worst]
    student = model.base(mx.array(ids[:, SPLIT:END]), cache=cache)
    teacher = model.base(mx.array(ids), cache=make_prompt_cache(model.base))[:, SPLIT:END]
    assert loss == pytest.approx(plain.divergence(np.array(teacher), np.array(student)).mean(), rel=1e-4)
    assert loss < losses_of(model, batch_of(ids))["continuation"].item()


@pytest.mark.parametrize("weight", [0.0, 1.0, 8.0])
def test_the_tokens_exact_in_training_are_those_that_the_runtime_recomputes(weight: float) -> None:
    """Where the prefix is asked, what the end attends to counts in both."""
    model = choosing(MODELS["prefix of llama"]()[0], asks="prefix", attention_weight=weight, attention_reach=1)
    ids = token_ids(SPLIT)
    teacher = teach(model, batch_of(ids))
    cache = student_cache(model, teacher.reading, predict(model, teacher, teacher.reading, SPLIT), SPLIT)
    exact = with_true_entries(model, teacher, teacher.reading, cache, SPLIT, 0.4)
    plainly = kvp_mlx.predict_base_cache(model, mx.array(ids), recompute=0)
    repaired = kvp_mlx.predict_base_cache(model, mx.array(ids), recompute=0.4, exact_tail=4)
    found, expected = (
        np.flatnonzero((one[2].keys_and_values()[0] != other[2].keys_and_values()[0]).any(axis=(0, 1, 3)))
        for one, other in ((exact, cache), (repaired, plainly))
    )
    np.testing.assert_array_equal(found, expected)
    assert found[-4:].tolist() == [13, 14, 15, 16]
    assert len(found) == 4 + round(0.4 * 13)


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
