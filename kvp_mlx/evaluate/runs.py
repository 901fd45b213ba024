"""One way to carry out any task on its data: what ``kvp eval TASK`` and the suite do."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..arms.arm import Arm
from ..arms.kinds import parse_arms, with_dial
from ..bundle.loading import KVPModel, bundle_directory
from ..device.blas import openblas_threads
from ..device.machine import describe_machine
from ..engine.calibration import auto_min_tokens
from ..engine.dial import QUALITIES, Dial
from ..engine.prefill import Progress
from ..errors import InputError
from ..files import sha256_of
from ..models.safetensors import fingerprint
from .records import hash_of
from .rows import run_items
from .summary import grid, summarise
from .task import Item, Run


def answering_arms(names: str) -> list[Arm]:
    """Read comma-separated names of arms whose models go on after the first token.

    Raises:
        InputError: no such arm, or one that can only be timed.
    """
    arms = parse_arms(names)
    if timed := [arm.name for arm in arms if arm.kind.read is None]:
        raise InputError(f"the arm {timed[0]} can only be timed ('kvp bench ttft'); leave it out here.")
    return arms


def carry_out(
    run: Run,
    model: KVPModel,
    name: str,
    arms: Sequence[Arm],
    *,
    log: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Measure a run, going on with a log that was begun.

    Args:
        run: the task on its data.
        model: the bundle.
        name: how the bundle was named when it was loaded.
        arms: ways to the first token.
        log: see ``run_items``.
        progress: called with (rows done, rows in all).

    Returns:
        The task's JSON document: ``summarise``'s, the grid of tasks that have one, the bundle and the recipe.
    """
    dial, items = run.dial(arms), items_of(run, model)
    arms = [with_dial(arm, dial) for arm in arms]
    recipe = {
        "task": run.task,
        **setting(model, name, dial),
        **(qualities(model) if any(arm.kind.form in QUALITIES for arm in arms) else {}),
        "seed": run.seed,
        "first_prompt": hash_of(items[0].prompt),  # the wording is part of a task
        **run.options,
    }
    rows = run_items(model, arms, items, run.measure, recipe=recipe, log=log, progress=progress)
    document = summarise(run.task, model, arms, rows, statistic=run.statistic)
    if run.has_grid:
        document["grid"] = grid(items, rows)
    machine = describe_machine() | {"blas_threads": openblas_threads()}
    return document | {"model": name, "layers": model.config.auxiliary.layers, "recipe": recipe, "machine": machine}


def setting(model: KVPModel, name: str, dial: Dial) -> dict[str, Any]:
    """Return what rows depend on beside their task: our version, the weights, what is recomputed, the machine."""
    machine, recompute = describe_machine(), model.config.recompute
    return {
        "kvp_mlx": __version__,
        **weights(model, name),
        "recompute": dial.share(model.config),
        "choice": None if recompute is None else recompute.model_dump(exclude={"share"}),
        **{key: machine[key] for key in ("chip", "device", "mlx", "mlx_lm")},
        "blas_threads": openblas_threads(),
    }


def qualities(model: KVPModel) -> dict[str, Any]:
    """Return what decides how arms named after a quality read a prompt."""
    return {
        "dials": [dial.model_dump(mode="json") for dial in model.config.dials],
        "auto_min_tokens": auto_min_tokens(model),
    }


def items_of(run: Run, model: KVPModel) -> list[Item]:
    """Return what a run asks.

    Raises:
        InputError: nothing, the data being too short or unanswerable; or two items of one name, of which a log would
            have one.
    """
    items = run.items(model)[: run.limit]
    if not items:
        raise InputError(f"the data holds nothing that {run.task} could ask; give other --data or shorter lengths.")
    name, count = Counter(item.id for item in items).most_common(1)[0]
    if count > 1:
        raise InputError(f"{count} records are called {name[:80]!r}; give each an id of its own, and every file once.")
    return items


def weights(model: KVPModel, name: str) -> dict[str, str]:
    """Return the fingerprints of a bundle's parts: the base that runs, the predictor, and others where it has them."""
    found = {"base": fingerprint(model.base_path)}
    if model.config.auxiliary.fingerprint is not None:
        found["auxiliary"] = model.config.auxiliary.fingerprint
    for part in ("predictor", "adapter"):
        if (path := bundle_directory(name) / f"{part}.safetensors").exists():
            found[part] = f"sha256:{sha256_of(path)}"
    return found
