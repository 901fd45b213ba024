"""What a killed training run leaves behind: one file, always whole, that ``--resume`` goes on from."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import InputError

STATE_FILE = "state.safetensors"


@dataclass
class TrainingState:
    """Where a run stands; with the weights and the optimiser's moments, all that the next step depends on.

    Attributes:
        step: optimiser steps taken.
        batches: batches drawn, over all processes.
        tokens: tokens read.
        minutes: time spent.
        best: the record of the best validation.
        speeds: tokens per second of every step since the start or resumption.
        options: what the run was started with, for ``--resume`` to compare.
        finished: whether the budget is spent.
    """

    step: int = 0
    batches: int = 0
    tokens: int = 0
    minutes: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    finished: bool = False


def save_state(directory: Path, state: TrainingState, trained: nn.Module, optimizer: optim.Optimizer) -> None:
    """Write ``state.safetensors``; the file before stays until the new one is complete."""
    arrays = dict(tree_flatten(_arrays(trained, optimizer)))
    work = directory / f".{STATE_FILE}"
    mx.save_safetensors(str(work), arrays, metadata={"state": json.dumps(asdict(state) | {"speeds": []})})
    work.replace(directory / STATE_FILE)


def _arrays(trained: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any]:
    return {"weights": trained.trainable_parameters(), "optimizer": optimizer.state}


def load_state(
    directory: Path, trained: nn.Module, optimizer: optim.Optimizer, options: dict[str, Any]
) -> TrainingState:
    """Read ``state.safetensors`` back into the module and the optimiser.

    Raises:
        InputError: it is not readable, or was written with other options.
    """
    path = directory / STATE_FILE
    try:
        arrays, metadata = cast(tuple[dict[str, mx.array], dict[str, str]], mx.load(str(path), return_metadata=True))
        state = TrainingState(**json.loads(metadata["state"]))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged; start again with --force in place of --resume.") from error
    for name, value in json.loads(json.dumps(options)).items():
        if state.options.get(name) != value:
            raise InputError(
                f"the unfinished run in {directory} had {name} = {state.options.get(name)}, not {value}; repeat its "
                "command with --resume, or start again with --force."
            )
    expected = {name: array.shape for name, array in tree_flatten(_arrays(trained, optimizer))}
    if {name: array.shape for name, array in arrays.items()} != expected:
        raise InputError(f"{path} lacks tensors of this run; start again with --force in place of --resume.")
    tree: Any = tree_unflatten(list(arrays.items()))
    trained.update(tree["weights"])
    optimizer.state = tree["optimizer"]
    mx.eval(trained.parameters(), optimizer.state)
    return state
