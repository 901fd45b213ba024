"""A task on its data, ready to be measured: what ``kvp eval TASK`` asks for, and one way to carry it out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..arms.arm import Arm
from ..bundle.loading import KVPModel, base_directory, bundle_directory
from ..device.blas import openblas_threads
from ..device.machine import describe_machine
from ..engine.prefill import Progress
from ..errors import InputError
from ..files import sha256_of
from ..models.safetensors import fingerprint
from ..train.text import data_files
from . import measures, tasks
from .loop import Measure, grid, run_items, summarise
from .records import SAMPLE, read_texts
from .tasks import Item


@dataclass(frozen=True)
class Run:
    """One task on its data.

    Attributes:
        task: its name.
        items: returns what is asked, given the bundle; a larger limit extends what a smaller one asks.
        measure: what arms do with items.
        limit: items at most.
        seed: orders the items, and draws what is drawn.
        options: what the rows depend on besides.
        statistic: what becomes of the items' scores.
        has_grid: whether the items have lengths and depths.
    """

    task: str
    items: Callable[[KVPModel], list[Item]]
    measure: Measure
    limit: int | None
    seed: int
    options: dict[str, Any]
    statistic: Callable[[np.ndarray], float] = np.mean
    has_grid: bool = False


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
    if run.options.get("scoring") == "predicted":
        model = all_predicted(model, arms)
    items = items_of(run, model)
    recipe = {
        "task": run.task,
        **setting(model, name),
        "seed": run.seed,
        "first_prompt": measures.hash_of(items[0].prompt),  # the wording is part of a task
        **run.options,
    }
    rows = run_items(model, arms, items, run.measure, recipe=recipe, log=log, progress=progress)
    document = summarise(run.task, model, arms, rows, statistic=run.statistic)
    if run.has_grid:
        document["grid"] = grid(items, rows)
    machine = describe_machine() | {"blas_threads": openblas_threads()}
    return document | {"model": name, "layers": model.config.auxiliary.layers, "recipe": recipe, "machine": machine}


def all_predicted(model: KVPModel, arms: Sequence[Arm]) -> KVPModel:
    """Return the bundle as the paper scores it: nothing is read again, in no arm.

    Raises:
        InputError: an arm whose numbers say otherwise.
    """
    if other := [arm.name for arm in arms if arm.kind == "kvp" and any(arm.numbers)]:
        raise InputError(f"scoring 'predicted' predicts all of the prompt, so {other[0]} is no arm of it; take kvp.")
    return replace(model, recompute=0.0)


def setting(model: KVPModel, name: str) -> dict[str, Any]:
    """Return what rows depend on beside their task: our version, the weights, the share recomputed, the machine."""
    machine = describe_machine()
    return {
        "kvp_mlx": __version__,
        **weights(model, name),
        "recompute": model.recompute,
        **{key: machine[key] for key in ("chip", "device", "mlx", "mlx_lm")},
        "blas_threads": openblas_threads(),
    }


def items_of(run: Run, model: KVPModel) -> list[Item]:
    """Return what a run asks.

    Raises:
        InputError: nothing, the data being too short or unanswerable.
    """
    items = run.items(model)[: run.limit]
    if not items:
        raise InputError(f"the data holds nothing that {run.task} could ask; give other --data or shorter lengths.")
    return items


def weights(model: KVPModel, name: str) -> dict[str, str]:
    """Return the fingerprints of a bundle's parts: the base that runs, the predictor, and others where it has them."""
    found = {"base": fingerprint(base_directory(model.config.base, bundle_directory(name)))}
    if model.config.auxiliary.fingerprint is not None:
        found["auxiliary"] = model.config.auxiliary.fingerprint
    for part in ("predictor", "adapter"):
        if (path := bundle_directory(name) / f"{part}.safetensors").exists():
            found[part] = f"sha256:{sha256_of(path)}"
    return found


def hashes(places: Sequence[str]) -> dict[str, str]:
    """Return the data files' names and SHA-256, for the recipe."""
    return {path.name: sha256_of(path) for path in data_files(list(places))}


def triviaqa(data: list[str], shots: int, max_tokens: int | None, limit: int | None, seed: int) -> Run:
    """TriviaQA in the paper's template."""
    options = {"data": hashes(data), "shots": shots, "max_tokens": max_tokens}
    measure = measures.measure_generation("triviaqa", max_tokens)
    return Run("triviaqa", lambda _: tasks.triviaqa_items(data, shots, seed), measure, limit, seed, options)


def squad(data: list[str], max_tokens: int | None, limit: int | None, seed: int) -> Run:
    """SQuAD, passage and question."""
    options = {"data": hashes(data), "max_tokens": max_tokens}
    measure = measures.measure_generation("squad", max_tokens)
    return Run("squad", lambda _: tasks.squad_items(data, seed), measure, limit, seed, options)


def gsm8k(data: list[str], shots: int, max_tokens: int | None, limit: int | None, seed: int) -> Run:
    """GSM8K after solved examples."""
    options = {"data": hashes(data), "shots": shots, "max_tokens": max_tokens}
    measure = measures.measure_generation("gsm8k", max_tokens)
    return Run("gsm8k", lambda _: tasks.gsm8k_items(data, shots, seed), measure, limit, seed, options)


def mcq(data: list[str], scoring: str, limit: int | None, seed: int) -> Run:
    """Multiple choice."""
    options = {"data": hashes(data), "scoring": scoring}
    return Run("mcq", lambda _: tasks.choice_items(data, seed), measures.measure_choice(scoring), limit, seed, options)


def chat(data: list[str], limit: int | None, seed: int) -> Run:
    """Agreement along the full model's reply."""
    return Run(
        "chat", lambda _: tasks.chat_items(data, seed), measures.measure_chat, limit, seed, {"data": hashes(data)}
    )


def humaneval(data: list[str], samples: int, temperature: float, limit: int | None, seed: int) -> Run:
    """HumanEval; what the models write is run."""
    options = {"data": hashes(data), "samples": samples, "temperature": temperature}
    measure = measures.measure_humaneval(samples, temperature, seed)
    return Run("humaneval", lambda _: tasks.humaneval_items(data), measure, limit, seed, options)


def perplexity(
    data: list[str] | None, prompt_tokens: int, continuation_tokens: int, limit: int | None, seed: int
) -> Run:
    """Perplexity of text after a prompt (default: of our sample)."""
    places = data or [str(SAMPLE)]
    options = {"data": hashes(places), "prompt_tokens": prompt_tokens, "continuation_tokens": continuation_tokens}

    def items(model: KVPModel) -> list[Item]:
        return tasks.window_items(places, model.text_tokenizer, prompt_tokens, continuation_tokens, seed, limit)

    return Run("perplexity", items, measures.measure_perplexity, limit, seed, options, measures.perplexity)


def needle(data: list[str] | None, lengths: list[int], depths: list[float], limit: int | None, seed: int) -> Run:
    """A number hidden in a text, by length and depth."""
    return _grid("needle", tasks.needle_items, data, lengths, depths, limit, seed)


def quote(data: list[str] | None, lengths: list[int], depths: list[float], limit: int | None, seed: int) -> Run:
    """A marked sentence of a text, by length and depth."""
    return _grid("quote", tasks.quote_items, data, lengths, depths, limit, seed)


def _grid(
    task: str,
    make_items: Callable[..., list[Item]],
    data: list[str] | None,
    lengths: list[int],
    depths: list[float],
    limit: int | None,
    seed: int,
) -> Run:
    """Return a run whose items cycle through lengths and depths, once unless ``limit`` says otherwise.

    Raises:
        InputError: a depth outside 0 to 1.
    """
    if bad := [depth for depth in depths if not 0 <= depth <= 1]:
        raise InputError(f"--depths lie between 0 and 1, not at {bad[0]:g}.")
    places, count = data or [str(SAMPLE)], limit or len(lengths) * len(depths)
    options = {"data": hashes(places), "prompt_tokens": lengths, "depths": depths}

    def items(model: KVPModel) -> list[Item]:
        return make_items(read_texts(places), model.text_tokenizer, lengths, depths, seed, count)

    return Run(task, items, measures.measure_generation(task), count, seed, options, has_grid=True)
