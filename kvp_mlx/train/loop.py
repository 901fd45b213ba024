"""``kvp train``: maps trained by gradient from their ridge start, within a budget of minutes or tokens."""

import itertools
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from ..bundle import KVPModel
from ..errors import KVPError
from ..evaluate.context import measure_context
from .continuation import continuation_loss, teach


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        minutes: wall-clock budget.
        learning_rate: of AdamW at its peak; warm-up over the first 3 % of the budget, then cosine to a tenth.
        windows_per_step: windows whose gradients are averaged into one step.
        splits: split points per window.
        right: tokens of the right part; half of the splits use a quarter of it.
        validate_every: minutes between validations; the best state is kept.
        seed: of data order and split points.
    """

    minutes: float
    learning_rate: float = 1e-3
    windows_per_step: int = 1
    splits: int = 2
    right: int = 96
    validate_every: float = 10.0
    seed: int = 0


def train_predictor(
    model: KVPModel,
    windows: Iterator[list[int]],
    held_back: list[list[int]],
    options: TrainOptions,
    *,
    log: Path,
    save: Callable[[dict[str, Any]], None],
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Train the maps in place and return what came out.

    Args:
        model: bundle with initialised maps.
        windows: endless stream of training windows.
        held_back: windows of one length for validation (context recovery).
        options: see ``TrainOptions``.
        log: JSONL file, one line per step and per validation.
        save: called with the record of every validation that beats the ones before.
        progress: called with the share of the budget that is spent.

    Raises:
        KVPError: the loss is not finite; what was saved before stays.
    """
    group = mx.distributed.init()
    rank, size = group.rank(), group.size()
    windows = itertools.islice(windows, rank, None, size)
    rng = random.Random(options.seed * size + rank)
    optimizer = optim.AdamW(learning_rate=options.learning_rate, betas=[0.9, 0.95], weight_decay=0.01)
    best: dict[str, Any] = {}
    start, tokens, steps, next_validation = time.perf_counter(), 0, 0, 0.0
    with log.open("a", encoding="utf-8") if rank == 0 else open(os.devnull, "w", encoding="utf-8") as lines:
        while True:
            minutes = shared_mean((time.perf_counter() - start) / 60)
            if minutes >= min(next_validation, options.minutes):
                next_validation = minutes + options.validate_every
                if rank == 0:
                    record = validate(model, held_back) | {"tokens": tokens, "minutes": round(minutes, 1)}
                    print(json.dumps(record), file=lines, flush=True)
                    if not best or record["recovery"] > best["recovery"]:
                        best = record
                        save(best)
            if minutes >= options.minutes:
                return best
            optimizer.learning_rate = options.learning_rate * schedule(minutes / options.minutes)
            loss, read = step(model, list(itertools.islice(windows, options.windows_per_step)), optimizer, rng, options)
            if not math.isfinite(loss):
                raise KVPError(
                    f"the loss is {loss} after {tokens} tokens; the last good state is kept. Lower the rate."
                )
            tokens, steps = tokens + read, steps + 1
            entry = {"step": steps, "tokens": tokens, "loss": round(loss, 5), "minutes": round(minutes, 2)}
            print(json.dumps(entry), file=lines, flush=True)
            progress(minutes / options.minutes)


def shared_mean(value: float) -> float:
    """Return the mean of a number over all processes (``mlx.launch``), so that they decide alike."""
    total = cast(float, mx.distributed.all_sum(mx.array(value), stream=mx.cpu).item())
    return total / mx.distributed.init().size()


def schedule(share: float) -> float:
    """Return the learning rate's factor when ``share`` of the budget is spent."""
    if share < 0.03:
        return max(share / 0.03, 0.01)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


def step(
    model: KVPModel, windows: list[list[int]], optimizer: optim.Optimizer, rng: random.Random, options: TrainOptions
) -> tuple[float, int]:
    """Take one optimiser step; returns the mean loss and the tokens read."""
    total, gradients, count = 0.0, None, 0
    for window in windows:
        teacher = teach(model, window)
        for number in range(options.splits):
            right = options.right if number % 2 == 0 else options.right // 4
            right = min(right, len(window) // 2)
            split = rng.randint(min(16, len(window) // 4), len(window) - right)
            loss_and_gradient = nn.value_and_grad(
                model.predictor, lambda t=teacher, s=split, r=right: continuation_loss(model, t, s, r)
            )
            loss, gradient = loss_and_gradient()
            gradients = gradient if gradients is None else tree_map(mx.add, gradients, gradient)
            mx.eval(loss, gradients)
            total, count = total + loss.item(), count + 1
        mx.clear_cache()
    gradients = tree_map(lambda g: g / count, gradients)
    gradients, _ = optim.clip_grad_norm(nn.average_gradients(gradients), 1.0)
    optimizer.update(model.predictor, gradients)
    mx.eval(model.predictor.parameters(), optimizer.state)
    size = mx.distributed.init().size()
    return shared_mean(total / count), round(size * shared_mean(sum(map(len, windows))))


def validate(model: KVPModel, held_back: list[list[int]]) -> dict[str, Any]:
    """Return recovery and separation on held-back windows, the last quarter of each scored."""
    result = measure_context(model, held_back, len(held_back[0]) // 4)
    return {"recovery": result["arms"]["kvp"]["recovery"], "separation": result["separation"]}
