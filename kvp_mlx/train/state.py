"""What a killed training run leaves behind: one file, always whole, that ``--resume`` goes on from."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten
from pydantic import TypeAdapter

from ..errors import InputError
from ..files import parse_json, unfinished
from ..models.safetensors import write_tensors

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
    """Write ``state.safetensors``; the file before stays until the new one is complete.

    Raises:
        KVPError: as ``write_tensors``.
    """
    arrays = dict(tree_flatten(_arrays(trained, optimizer)))
    with unfinished(directory / f".{STATE_FILE}") as work:
        write_tensors(arrays, work, metadata={"state": json.dumps(asdict(state) | {"speeds": []})})
        work.replace(directory / STATE_FILE)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's log, if there is one; a last line that a kill cut short is none.

    Raises:
        InputError: a line that is no entry.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    entries = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("}"):
            break
        entry = parse_json(line, f"{path}, line {number}")
        counts = [entry.get(name) for name in ("step", "tokens")] if isinstance(entry, dict) else [None]
        if not all(type(count) is int for count in counts):
            raise InputError(f"{path}, line {number} is no entry of a training's log; remove that line.")
        entries.append(entry)
    return entries


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
        state = TypeAdapter(TrainingState).validate_python(parse_json(metadata["state"], str(path)))
        if not min(state.step, state.batches, state.tokens, state.minutes) >= 0 or not state.minutes < math.inf:
            raise ValueError("counts that are none")
    except (RuntimeError, ValueError, KeyError, TypeError, InputError) as error:
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
