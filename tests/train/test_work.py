"""What training costs: its arithmetic, written out by hand for one tiny model, and its memory beside the peak."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.tiny import llama, paired, prefixed

from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.train.capacity import training_bytes
from kvp_mlx.train.loop import Trained, TrainOptions, make_optimizer, take_step
from kvp_mlx.train.objectives import Weights
from kvp_mlx.train.state import TrainingState
from kvp_mlx.train.work import flops_per_token

LAYER = 2 * (64 * 64 + 2 * 64 * 16 + 64 * 64 + 3 * 64 * 96)  # q, k and v, o, FFN
SCORES = 4 * 64 * 32  # half of a window of 64, and what a right part sees on average
HEAD = 2 * 64 * 97
MAPS = 2 * 64 * (2 * 2 * 16)  # two predicted layers


def test_flops_of_a_prefix() -> None:
    model = prefixed(llama(), 1)[0]
    options = TrainOptions(window=64, splits=2, right=16)
    teacher = 64 * 4 * (LAYER + SCORES)
    splits = (2 * 20 * 2 * (LAYER + SCORES)) + 3 * 20 * HEAD + 2 * (24 + 30) * MAPS
    assert flops_per_token(model, Trained(model, options), options) == (teacher + splits) / 64


def test_checkpointing_runs_the_predicted_layers_once_more() -> None:
    model = prefixed(llama(), 1)[0]
    plain, checkpointed = (TrainOptions(window=64, splits=1, right=16, checkpoint=value) for value in (False, True))
    extra = 16 * 2 * (LAYER + SCORES) / 64
    trained = Trained(model, plain)
    assert flops_per_token(model, trained, checkpointed) - flops_per_token(model, trained, plain) == extra


WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "vocab_size": 2000}


def wide_prefix() -> KVPModel:
    return prefixed(llama(**WIDE), 2)[0]


def wide_model() -> KVPModel:
    base = llama(**WIDE)
    return paired(base, llama(3, **WIDE | {"num_hidden_layers": 4}), [(i // 2,) for i in range(8)])[0]


MEMORY: dict[str, tuple[Callable[[], KVPModel], dict[str, Any]]] = {
    "prefix": (wide_prefix, {}),
    "prefix, batch of 4": (wide_prefix, {"batch_size": 4}),
    "prefix, long": (wide_prefix, {"window": 1024}),
    "prefix, long right part": (wide_prefix, {"window": 512, "right": 256}),
    "prefix, long right part, checkpoint": (wide_prefix, {"window": 512, "right": 256, "checkpoint": True}),
    "prefix, the paper's losses": (wide_prefix, {"weights": Weights(base=1, consistency=1)}),
    "model": (wide_model, {}),
    "model, all of it": (wide_model, {"train_auxiliary": True}),
    "model, all of it, the paper's losses": (
        wide_model,
        {"train_auxiliary": True, "weights": Weights(continuation=0, base=1, auxiliary=1, consistency=1)},
    ),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_estimate_is_near_the_peak(name: str) -> None:
    make, changes = MEMORY[name]
    options = TrainOptions(minutes=None, tokens=1, learning_rate=1e-3, **({"window": 256} | changes))
    model = make()
    mx.eval(model.base.parameters(), model.auxiliary.parameters(), model.predictor.parameters())
    trained = Trained(model, options)
    estimate = training_bytes(model, trained, options)
    rng = np.random.default_rng(0)
    stream = iter([rng.integers(0, 2000, (options.batch_size, options.window)).tolist() for _ in range(2)])
    mx.clear_cache()
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    optimizer = make_optimizer(options, trained)
    for _ in range(2):
        take_step(model, trained, optimizer, stream, TrainingState(), options)
    peak = mx.get_peak_memory() - start
    print(f"{name}: estimate {estimate / 2**20:.1f} MiB, peak {peak / 2**20:.1f} MiB")
    assert peak / 3 < estimate < 3 * peak
