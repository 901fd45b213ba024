"""What a task is: the record that each file of ``tasks`` fills in, and that command, suite and pages read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..arms.arm import Arm
from ..bundle.loading import KVPModel
from ..engine.dial import PREDICT, Dial

Row = dict[str, Any]
Scores = dict[str, float]


@dataclass
class Item:
    """One question.

    Attributes:
        id: names it in the log.
        prompt: what the model reads: text, given as it stands or as a user's message through the chat template.
        answers: what is accepted, or a task's own reference.
        extra: what the task needs besides.
    """

    id: str
    prompt: str
    answers: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


Asked = tuple[Arm, Item]
Measure = Callable[[KVPModel, Sequence[Asked]], Iterable[Row]]
"""What arms do with items, a row for each in order; generated answers come in batches."""


def bundles_share(arms: Sequence[Arm]) -> Dial:
    """Return the dial of most tasks: prediction of the whole prompt, with the share that the bundle recomputes."""
    del arms
    return PREDICT


@dataclass(frozen=True)
class Run:
    """One task on its data, with its options.

    Attributes:
        task: its name.
        items: returns what is asked, given the bundle; a larger limit extends what a smaller one asks.
        measure: what arms do with items.
        encode: returns the token ids that arms read of an item.
        limit: items at most.
        seed: orders the items, and draws what is drawn.
        options: what the rows depend on besides.
        statistic: what becomes of the items' scores.
        has_grid: whether the items have lengths and depths.
        dial: how arms that predict read, given all arms; may refuse some (InputError).
    """

    task: str
    items: Callable[[KVPModel], list[Item]]
    measure: Measure
    encode: Callable[[KVPModel, Item], list[int]]
    limit: int | None
    seed: int
    options: dict[str, Any]
    statistic: Callable[[np.ndarray], float] = np.mean
    has_grid: bool = False
    dial: Callable[[Sequence[Arm]], Dial] = bundles_share


@dataclass(frozen=True)
class Place:
    """A place of a task in the suite.

    Attributes:
        name: of the files that it writes.
        files: by option, the data file's name in the folder that the suite is given.
        options: the other options of ``Task.run``.
        is_matched: whether token pruning is measured beside it.
        dials: further arms of the bundle, for the picture of ``kvp eval pareto``.
        is_default: whether it is measured where it is not named.
    """

    name: str
    files: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    is_matched: bool = True
    dials: tuple[str, ...] = ()
    is_default: bool = True


@dataclass(frozen=True)
class Task:
    """Everything that is known of one task.

    Attributes:
        name: of its command and in its documents.
        metric: what its score is.
        run: returns the task on its data. Its parameters are the command's options (``cli.tasks.OPTIONS`` has their
            types), its docstring is the command's help.
        places: in the suite.
        less_is_better: whether a lower score is better.
        difference_unit: of the difference between scores, where that is not the score's own.
        average: title of the mean difference over several documents of the task, where pages are to show it.
        runs_code: whether programs that models wrote are run, which has to be allowed.
    """

    name: str
    metric: str
    run: Callable[..., Run]
    places: tuple[Place, ...] = ()
    less_is_better: bool = False
    difference_unit: str = ""
    average: str = ""
    runs_code: bool = False


def row_of(score: float, metrics: Scores, ttft_ms: float, prompt_tokens: int, **more: Any) -> Row:
    """Return what the log keeps of one item under one arm, but for their names."""
    return {"score": score, "metrics": metrics, "ttft_ms": ttft_ms, "prompt_tokens": prompt_tokens} | more


def one_by_one(measure: Callable[[KVPModel, Arm, Item], Row]) -> Measure:
    """Return how many are measured, given how one is."""

    def measure_all(model: KVPModel, asked: Sequence[Asked]) -> Iterable[Row]:
        for arm, item in asked:
            yield measure(model, arm, item)

    return measure_all
