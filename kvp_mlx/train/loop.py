"""The training loop: one optimiser step after another until the budget is spent, and nothing lost when killed."""

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from ..bundle.loading import KVPModel
from ..errors import InputError, KVPError
from ..files import write_text
from .objectives import Weights, auxiliary_loss, base_loss, consistency_loss, continuation_losses, predict
from .state import TrainingState, load_state, read_log, save_state
from .teacher import Batch, Reading, Teacher, make_batch, read, teach

RELATIVE_RATE = 3.6e-3
"""Peak learning rate over the root mean square of the maps' weights."""
WARM_UP_STEPS = 20
MIN_LEFT_TOKENS = 16
STATE_EVERY_SECONDS = 60.0

Losses = dict[str, mx.array]


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        minutes: of the clock, from the first step on; the learning rate follows it. Validations on the way count, the
            first and the last do not.
        tokens: token budget in place of minutes; with it, the same seed gives the same losses.
        learning_rate: AdamW's at its peak; warm-up over the first steps, then cosine to a tenth. None: see
            ``settled``.
        weight_decay: AdamW's, on matrices only.
        weights: of the objectives.
        window: tokens per window.
        lora_rank: rank of the low-rank updates with which the auxiliary reads; None: it reads as it is.
        train_auxiliary: train all of the auxiliary (kinds ``model`` and ``pruned``).
        checkpoint: compute the predicted layers' activations twice and keep none, for long windows.
        packed: fill windows with several pieces of text, so that all have one length.
        batch_size: windows that are run together.
        accumulate: batches whose gradients make one step.
        splits: split points per batch, for the continuation objective.
        right: tokens after a split; every other split has a quarter of it.
        recompute: share of the tokens before a split that has its true entries, as recomputation will give them.
        validate_every: minutes between validations.
        seed: of data order and split points.
    """

    minutes: float | None = 20.0
    tokens: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.01
    weights: Weights = field(default_factory=Weights)
    window: int = 512
    packed: bool = True
    batch_size: int = 1
    accumulate: int = 1
    splits: int = 3
    right: int = 128
    recompute: float = 0.0
    validate_every: float = 10.0
    lora_rank: int | None = None
    train_auxiliary: bool = False
    checkpoint: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what is given."""
        if (self.minutes is None) == (self.tokens is None):
            raise InputError("give one budget, --minutes or --tokens.")
        for name in ("minutes", "tokens", "learning_rate", "batch_size", "accumulate", "splits", "right", "lora_rank"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name.replace('_', '-')} must be positive, not {value}.")
        for name in ("weight_decay", "validate_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name.replace('_', '-')} must be a number from 0 up.")
        if not 0 <= self.recompute < 1:
            raise InputError(f"--recompute is a share of the tokens, from 0 to below 1, not {self.recompute}.")
        if self.window < 2 * MIN_LEFT_TOKENS:
            raise InputError(f"windows of {self.window} tokens are too short to split; give --window 32 or more.")

    def settled(self, model: KVPModel) -> "TrainOptions":
        """Return the options with what depends on the bundle filled in: weights of losses, and the learning rate.

        AdamW changes every weight by about its rate, so the rate is ``RELATIVE_RATE`` of the maps' root mean square.

        Raises:
            InputError: see ``Weights.settled``.
        """
        maps = [block.weight for block in model.predictor.maps.values()]
        squares, count = sum(mx.square(weight).sum() for weight in maps), sum(weight.size for weight in maps)
        size = cast(float, mx.sqrt(squares / max(count, 1)).item())
        rate = self.learning_rate or RELATIVE_RATE * size or RELATIVE_RATE
        return replace(self, weights=self.weights.settled(model), learning_rate=rate)

    def share(self, state: TrainingState) -> float:
        """Return how much of the budget is spent, 0 to 1."""
        spent = state.tokens / self.tokens if self.tokens else state.minutes / cast(float, self.minutes)
        return min(spent, 1.0)

    def is_over(self, state: TrainingState) -> bool:
        """Return whether a run ended at its budget."""
        return state.finished or self.share(state) >= 1

    def is_spent(self, state: TrainingState, step_minutes: float) -> bool:
        """Return whether no budget is left for another step, given how long the one before took."""
        return self.share(state) >= 1 or (self.minutes is not None and state.minutes + step_minutes > self.minutes)


class Trained(nn.Module):
    """The parts of a bundle that training changes."""

    def __init__(self, model: KVPModel, options: TrainOptions):
        super().__init__()
        self.predictor = model.predictor
        if options.train_auxiliary or options.lora_rank:
            self.auxiliary = model.auxiliary


def train(
    model: KVPModel,
    trained: Trained,
    batches: Callable[[int], Iterator[list[list[int]]]],
    options: TrainOptions,
    directory: Path,
    *,
    resume: bool,
    kept: dict[str, Any] | None = None,
    data: list[str],
    validate: Callable[[], dict[str, Any]],
    save: Callable[[dict[str, Any]], None],
    progress: Callable[[float, dict[str, Any]], None] = lambda share, entry: None,
) -> TrainingState:
    """Train until the budget is spent and return where it ended.

    Args:
        model: the bundle, whose parts in ``trained`` change in place.
        trained: what to train.
        batches: yields this process's batches of windows, forever, from the given batch number on.
        options: see ``TrainOptions``.
        directory: receives log.jsonl (a line per step and per validation) and state.safetensors.
        resume: go on from the state in ``directory``.
        kept: resuming, the record of the bundle that is there, the best so far, which ``save`` may have written after
            the state; without one the bundle is gone, and is written anew.
        data: names of what ``batches`` reads; a resumed run must have the same, and the same options.
        validate: measures ``divergence`` and whatever else goes into the log.
        save: called with the record of every validation that beats the ones before.
        progress: called after every step with the share of the budget that is spent and the step's log entry.

    Raises:
        KVPError: the loss is not finite; what was saved before stays.
    """
    optimizer = make_optimizer(options, trained)
    state = TrainingState(options={**asdict(options), "data": data})
    if resume:
        state = load_state(directory, trained, optimizer, state.options)
        state.best = kept or {}
    leads = mx.distributed.init().rank() == 0
    if options.is_over(state):
        keep_again(directory, state, trained, optimizer, validate, save)
        return state
    stream = batches(state.batches)
    log = Log(directory / "log.jsonl" if leads else Path(os.devnull), keep=state.step)
    clock, saved = time.perf_counter() - 60 * state.minutes, time.perf_counter()
    next_validation = state.minutes + options.validate_every if state.best else 0.0
    first, step_minutes = state.step, 0.0
    while True:
        state.minutes = shared_mean((time.perf_counter() - clock) / 60)
        state.finished = state.step > 0 and options.is_spent(state, step_minutes)
        if state.minutes >= next_validation or state.finished:
            next_validation = state.minutes + options.validate_every
            if leads:
                keep_best(state, validate(), log, save)
            if state.step == first:  # the budget begins with training
                shared_mean(0.0)  # all processes wait for the one that validates
                clock = time.perf_counter() - 60 * state.minutes
        if leads and (state.finished or time.perf_counter() - saved > STATE_EVERY_SECONDS):
            save_state(directory, state, trained, optimizer)
            saved = time.perf_counter()
        if state.finished:
            return state
        started = time.perf_counter()
        entry = counted_step(model, trained, optimizer, stream, state, options)
        step_minutes = shared_mean((time.perf_counter() - started) / 60)
        log.write(entry)
        progress(options.share(state), entry)


def counted_step(
    model: KVPModel,
    trained: Trained,
    optimizer: optim.Optimizer,
    stream: Iterator[list[list[int]]],
    state: TrainingState,
    options: TrainOptions,
) -> dict[str, Any]:
    """Take one step at the learning rate of its time and count it in ``state``; returns its log entry.

    Raises:
        KVPError: the loss is not finite.
    """
    optimizer.learning_rate = cast(float, options.learning_rate) * schedule(state.step, options.share(state))
    started = time.perf_counter()
    losses, tokens = take_step(model, trained, optimizer, stream, state, options)
    if not all(map(math.isfinite, losses.values())):
        raise KVPError(
            f"the loss is not a number after {state.tokens:,} tokens; the best bundle so far is kept. "
            "Start again with a lower --learning-rate."
        )
    state.step += 1
    state.batches += options.accumulate * mx.distributed.init().size()
    state.tokens += tokens
    speed = tokens / (time.perf_counter() - started)
    state.speeds.append(speed)
    entry = {"step": state.step, "tokens": state.tokens, **losses}
    return entry | {"minutes": round(state.minutes, 2), "tokens_per_second": round(speed, 1)}


def keep_best(state: TrainingState, record: dict[str, Any], log: "Log", save: Callable[[dict[str, Any]], None]) -> None:
    """Log a validation, and save the bundle if none before strayed less from what the base itself expects."""
    record = record | {"step": state.step, "tokens": state.tokens, "minutes": round(state.minutes, 2)}
    log.write(record)
    if not state.best or record["divergence"] < state.best.get("divergence", math.inf):  # older runs have none
        state.best = record
        save(record)


def keep_again(
    directory: Path,
    state: TrainingState,
    trained: Trained,
    optimizer: optim.Optimizer,
    validate: Callable[[], dict[str, Any]],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Save the last state of a finished run as its bundle, where the best one is gone."""
    if state.best or mx.distributed.init().rank() > 0:
        return
    keep_best(state, validate(), Log(directory / "log.jsonl", keep=state.step), save)
    save_state(directory, state, trained, optimizer)


class Log:
    """A JSONL file that a resumed run cuts back to the step it goes on from."""

    def __init__(self, path: Path, keep: int):
        kept = [entry for entry in read_log(path) if entry["step"] <= keep] if keep else []
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self.file = path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        """Append one line."""
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()


def make_optimizer(options: TrainOptions, trained: Trained) -> optim.Optimizer:
    """Return AdamW by the paper's rule: no decay on one-dimensional parameters (arXiv 2410.08391, appendix)."""
    matrices, vectors = (
        optim.AdamW(cast(float, options.learning_rate), betas=[0.9, 0.95], weight_decay=decay, bias_correction=True)
        for decay in (options.weight_decay, 0.0)
    )
    optimizer = optim.MultiOptimizer([matrices, vectors], [lambda _, array: array.ndim > 1])
    optimizer.init(trained.trainable_parameters())
    return optimizer


def schedule(step: int, share: float) -> float:
    """Return the learning rate's factor at a step, when ``share`` of the budget is spent."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def shared_mean(value: float) -> float:
    """Return the mean of a number over all processes (``mlx.launch``), so that they decide alike."""
    total = cast(float, mx.distributed.all_sum(mx.array(value), stream=mx.cpu).item())
    return total / mx.distributed.init().size()


def take_step(
    model: KVPModel,
    trained: Trained,
    optimizer: optim.Optimizer,
    stream: Iterator[list[list[int]]],
    state: TrainingState,
    options: TrainOptions,
) -> tuple[dict[str, float], int]:
    """Take one optimiser step; returns the mean losses and the tokens read, over all processes."""
    group = mx.distributed.init()
    gradients: Any = None
    totals: dict[str, float] = {}
    tokens = 0
    for turn in range(options.accumulate):
        number = state.batches + turn * group.size() + group.rank()
        windows = next(stream)
        batch = make_batch(windows)
        rng = random.Random(f"{options.seed} {number}")
        for part, gradient in gradients_of(model, trained, batch, options, rng):
            gradients = gradient if gradients is None else tree_map(mx.add, gradients, gradient)
            mx.eval(part, gradients)
            for name, value in part.items():
                totals[name] = totals.get(name, 0.0) + cast(float, value.item()) / options.accumulate
        tokens += sum(map(len, windows))
        mx.clear_cache()
    gradients = nn.average_gradients(tree_map(lambda g: g / options.accumulate, gradients))
    gradients, _ = optim.clip_grad_norm(gradients, 1.0)
    optimizer.update(trained, gradients)
    mx.eval(trained.parameters(), optimizer.state)
    return {name: shared_mean(total) for name, total in totals.items()}, round(group.size() * shared_mean(tokens))


def gradients_of(
    model: KVPModel, trained: Trained, batch: Batch, options: TrainOptions, rng: random.Random
) -> Iterator[tuple[Losses, Any]]:
    """Yield the losses of a batch and their gradients, part by part, so that one part's memory serves the next.

    The parts add up to the whole: a split's share of the continuation loss each, and the paper's losses together.
    """
    teacher = teach(model, batch)
    reading = teacher.reading
    if reading is None and "auxiliary" not in trained:
        reading = read(model, batch.ids)
        mx.eval(reading.inputs)
    for loss in parts_of(model, teacher, reading, batch, options, rng):
        (total, losses), gradient = nn.value_and_grad(trained, loss)()
        yield {"loss": total, **losses}, gradient


def parts_of(
    model: KVPModel,
    teacher: Teacher,
    reading: Reading | None,
    batch: Batch,
    options: TrainOptions,
    rng: random.Random,
) -> Iterator[Callable[[], tuple[mx.array, Losses]]]:
    """Yield functions that return a weighted loss and the single losses that it is made of."""
    weights = options.weights

    points = split_points(batch, options, rng) if weights.continuation else []

    def continuation(read_here: Reading, split: int, end: int) -> tuple[mx.array, Losses]:
        divergence, residual = continuation_losses(
            model, teacher, read_here, batch, split, end, recompute=options.recompute, checkpoint=options.checkpoint
        )
        losses = {"continuation": divergence / len(points), "residual": residual / len(points)}
        return weights.continuation * (losses["continuation"] + weights.residual * losses["residual"]), losses

    def all_continuations() -> tuple[mx.array, Losses]:
        read_here = read(model, batch.ids[:, : max(split for split, _ in points)])
        totals, losses = zip(*(continuation(read_here, *point) for point in points), strict=True)
        return sum(totals, mx.array(0.0)), {name: sum(part[name] for part in losses) for name in losses[0]}

    def predicted_alone() -> tuple[mx.array, Losses]:
        read_here = reading or read(model, batch.ids)
        predicted = predict(model, teacher, read_here, batch.ids.shape[1])
        losses: Losses = {}
        if weights.base:
            losses["base"] = base_loss(model, teacher, read_here, predicted, batch, weights.z)
        if weights.auxiliary:
            losses["auxiliary"] = auxiliary_loss(model, read_here, batch, weights.z)
        if weights.consistency:
            losses["consistency"] = consistency_loss(model, teacher, predicted, batch)
        total = sum((getattr(weights, name) * value for name, value in losses.items()), mx.array(0.0))
        return total, losses

    if reading is not None:
        yield from (partial(continuation, reading, *point) for point in points)
    elif points:
        yield all_continuations
    if weights.paper:
        yield predicted_alone


def split_points(batch: Batch, options: TrainOptions, rng: random.Random) -> list[tuple[int, int]]:
    """Draw ``(split, end)`` pairs within the batch's shortest window; where prompts end, there is one alone."""
    shortest = cast(int, batch.kept.sum(axis=1).min().item())
    if batch.prompt_tokens is not None:
        return [(batch.prompt_tokens, min(batch.prompt_tokens + options.right, shortest))]
    points = []
    for number in range(options.splits):
        right = options.right if number % 2 == 0 else max(options.right // 4, 1)
        right = min(right, shortest // 2)
        split = rng.randint(min(MIN_LEFT_TOKENS, shortest // 4), shortest - right)
        points.append((split, split + right))
    return points
