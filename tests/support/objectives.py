"""Models with their oracles, and every loss of a batch, for the tests of what training minimises."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support import losses as plain
from support.oracle import KVPrediction
from support.tiny import llama, openelm, paired, prefixed, pruned, small_llama

from kvp_mlx.bundle.adapter import SCALE, adapted_prefix, adapter_weights
from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.train.loop import Trained, TrainOptions, gradients_of
from kvp_mlx.train.objectives import (
    Weights,
    auxiliary_loss,
    base_loss,
    consistency_loss,
    continuation_losses,
    predict,
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
    "prefix, two tokens before": lambda: prefixed(llama(), 1, preceding=2),
    "model, one token before": lambda: paired(llama(), small_llama(), [(0,), (0,), (1,), (2,)], preceding=1),
}
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
