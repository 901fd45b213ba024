"""Fitting the estimator that says which tokens the base had better read itself."""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..bundle.config import RecomputeConfig
from ..bundle.loading import KVPModel
from ..device.hosts import Hosts
from ..engine.prefill import Progress
from ..engine.recompute import settings_of
from ..errors import KVPError
from ..models.families import fixed_kinds
from ..models.kinds import RawOutputs
from ..models.sections import output_head, run_streams
from .objectives import kl_divergence, predict, student_cache
from .teacher import Reading, Teacher, exact_layers, make_batch, read, teach

DEVIATION_TOKENS = 8192
"""Tokens that the estimator is fitted on."""
PREDICTED_SHARE = 0.75
"""Of a window: prediction of these tokens is judged by what it does to the others."""
PENALTY = 0.1
"""Of the ridge regression, relative to the mean variance of its inputs."""


def with_estimator(model: KVPModel) -> KVPModel:
    """Return a bundle whose predictor has an estimator of deviation, not fitted if it had none.

    A base that cannot recompute gets none.
    """
    if model.config.recompute is not None or fixed_kinds(model.base):
        return model
    model.predictor.add_estimator()
    return replace(model, config=model.config.model_copy(update={"recompute": RecomputeConfig()}))


def fit_deviation(
    model: KVPModel,
    windows: Sequence[list[int]],
    progress: Progress = lambda done, total: None,
    hosts: Hosts | None = None,
) -> float | None:
    """Set the predictor's estimator of deviation by ridge regression, for the maps as they are now.

    What counts is how a text's tokens compare with one another, so each window's deviations are centred.

    Args:
        model: the bundle.
        windows: token ids; the first token of each, which attends to nothing but itself, is left out, and so are those
            that are recomputed in any case.
        progress: called with (windows done, windows in all).
        hosts: each of which calls this with windows of its own.

    Returns:
        The share of the deviation's variance that the estimator explains on these windows (R squared), or None where
        there is none, nothing is predicted or no window is long enough.

    Raises:
        KVPError: the deviations are not finite (a broken model).
    """
    width = sum(block.in_width for block in model.predictor.blocks[-1:])
    inputs, deviations, asking = [np.zeros((0, width))], [np.zeros(0)], settings_of(model).asking_tokens
    for number, window in enumerate(windows if "deviation" in model.predictor else []):
        progress(number, len(windows))
        split = round(PREDICTED_SHARE * len(window))
        if split <= asking + 2:
            continue
        batch = make_batch([window])
        teacher = teach(model, batch)
        reading = teacher.reading or read(model, batch.ids)
        found = np.array(deviation(model, teacher, reading, split)[0, 1:-asking], dtype=np.float64)
        inputs.append(np.array(estimator_input(model, reading)[0, 1 : split - asking], dtype=np.float64))
        deviations.append(found - found.mean())
        mx.clear_cache()
    x, y = np.concatenate(inputs), np.concatenate(deviations)
    if hosts is not None:
        x, y = hosts.gathered(x), hosts.gathered(y)
    if not len(y):
        return None
    if not np.isfinite(y).all():
        raise KVPError("the maps' errors are not finite; does the base model work at all?")
    centre = x.mean(axis=0)
    gram = (x - centre).T @ (x - centre)
    ridge = (PENALTY * np.trace(gram) / len(gram) + 1e-9) * np.eye(len(gram))
    weight = np.linalg.solve(gram + ridge, (x - centre).T @ y)
    estimator = model.predictor.deviation
    estimator.linear.weight = mx.array(weight[None].astype(np.float32))
    estimator.linear.bias = mx.array([-centre @ weight]).astype(mx.float32)
    mx.eval(estimator.parameters())
    return float(1 - np.square(y - (x - centre) @ weight).mean() / max(y.var(), 1e-12))


def estimator_input(model: KVPModel, reading: Reading) -> mx.array:
    """Return what the estimator reads (B, T, in)."""
    return reading.inputs[model.predictor.blocks[-1].name].astype(mx.float32)


def deviation(model: KVPModel, teacher: Teacher, reading: Reading, split: int) -> mx.array:
    """Return each token's deviation (B, split): the logarithm of its error plus half that of its harm.

    Error is the squared one of its predicted values (or latents), relative to the mean square of a layer's, summed
    over layers: what is far off may be asked for. See ``harm`` for what the text itself goes on to need.
    """
    predicted = predict(model, teacher, reading, split)
    true = {layer: {kind: x[:, :split] for kind, x in teacher.raw[layer].items()} for layer in predicted}
    error = mx.array(0.0)
    for layer, pair in predicted.items():
        name = "values" if "values" in pair else next(iter(pair))
        values = true[layer][name].astype(mx.float32)
        squared = mx.square(pair[name].astype(mx.float32) - values).sum(axis=-1)
        error = error + squared / mx.square(values).sum(axis=-1).mean()
    return mx.log(error + 1e-12) + 0.5 * mx.log(harm(model, teacher, reading, predicted, true) + 1e-12)


def harm(
    model: KVPModel, teacher: Teacher, reading: Reading, predicted: dict[int, RawOutputs], true: dict[int, RawOutputs]
) -> mx.array:
    """Return how far what follows strays because of each token's prediction (B, split), in nats, to first order.

    What strays is the base's distribution of all tokens from ``split`` on, by KL(true, predicted): its gradient with
    respect to a token's keys and values, halfway between the true and the predicted ones, times their error; the
    absolute values are summed over layers, keys and values.

    Args:
        model: the bundle.
        teacher: the base's reading of the text.
        reading: the auxiliary's.
        predicted: raw pairs of the first ``split`` tokens.
        true: the base's own.
    """
    start, split = exact_layers(model), tree_flatten(true)[0][1].shape[1]
    logits = output_head(model.base, teacher.streams[-1][:, split:])

    def divergence(pairs: dict[int, RawOutputs]) -> mx.array:
        cache = student_cache(model, reading, pairs, split)
        streams, _ = run_streams(model.base, teacher.streams[0][:, split:], cache, start)
        return kl_divergence(logits, output_head(model.base, streams[-1])).sum()

    middle = tree_map(lambda one, other: (one + other) / 2, predicted, true)
    slopes = mx.grad(divergence)(middle)
    effects = tree_map(lambda slope, one, other: mx.abs((slope * (one - other)).sum(axis=-1)), slopes, predicted, true)
    return sum((effect.astype(mx.float32) for _, effect in tree_flatten(effects)), mx.array(0.0))
