"""Fitting the estimator that tells which tokens prediction gets wrong."""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..bundle import KVPModel
from ..errors import KVPError
from ..families import RawPair
from .objectives import predict
from .teacher import Reading, make_batch, read, teach

DEVIATION_TOKENS = 8192
"""Tokens that the estimator is fitted on."""
PENALTY = 1e-2
"""Of the ridge regression, relative to the mean variance of its inputs."""


def with_estimator(model: KVPModel) -> KVPModel:
    """Return a bundle whose predictor has an estimator of deviation, not fitted if it had none."""
    if model.config.predictor.recompute is not None:
        return model
    model.predictor.add_estimator()
    predictor = model.config.predictor.model_copy(update={"recompute": 0.0})
    return replace(model, config=model.config.model_copy(update={"predictor": predictor}))


def fit_deviation(model: KVPModel, windows: Sequence[list[int]]) -> float | None:
    """Set the predictor's estimator of deviation by ridge regression, for the maps as they are now.

    Args:
        model: the bundle.
        windows: token ids; the first token of each, which attends to nothing but itself, is left out.

    Returns:
        The share of the deviation's variance that the estimator explains on these windows (R squared), or None where
        nothing is predicted.

    Raises:
        KVPError: the deviations are not finite (a broken model).
    """
    if not model.predictor.blocks:
        return None
    inputs, deviations = [], []
    for window in windows:
        batch = make_batch([window])
        teacher = teach(model, batch)
        reading = teacher.reading or read(model, batch.ids)
        inputs.append(np.array(estimator_input(model, reading)[0, 1:], dtype=np.float64))
        deviations.append(np.array(deviation(predict(model, teacher, reading, len(window)), teacher.raw)[0, 1:]))
        mx.clear_cache()
    x, y = np.concatenate(inputs), np.concatenate(deviations).astype(np.float64)
    if not np.isfinite(y).all():
        raise KVPError("the maps' errors are not finite; does the base model work at all?")
    centre = x.mean(axis=0)
    gram = (x - centre).T @ (x - centre)
    ridge = (PENALTY * np.trace(gram) / len(gram) + 1e-9) * np.eye(len(gram))
    weight = np.linalg.solve(gram + ridge, (x - centre).T @ (y - y.mean()))
    estimator = model.predictor.deviation
    estimator.linear.weight = mx.array(weight[None].astype(np.float32))
    estimator.linear.bias = mx.array([y.mean() - centre @ weight]).astype(mx.float32)
    mx.eval(estimator.parameters())
    return float(1 - np.square(y - y.mean() - (x - centre) @ weight).mean() / max(y.var(), 1e-12))


def estimator_input(model: KVPModel, reading: Reading) -> mx.array:
    """Return what the estimator reads (B, T, in)."""
    return reading.inputs[model.predictor.blocks[-1].name].astype(mx.float32)


def deviation(predicted: dict[int, RawPair], true: dict[int, RawPair]) -> mx.array:
    """Return each token's deviation (B, T), see ``DeviationEstimator``."""
    total = mx.array(0.0)
    for layer, pair in predicted.items():
        values = true[layer]["values"].astype(mx.float32)
        error = mx.square(pair["values"].astype(mx.float32) - values).sum(axis=-1)
        total = total + error / mx.square(values).sum(axis=-1).mean()
    return mx.log(total + 1e-12)
