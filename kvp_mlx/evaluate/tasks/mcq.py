"""Multiple choice (ARC, PIQA): the likeliest continuation wins."""

from collections.abc import Sequence

import numpy as np

from ...arms.arm import Arm
from ...bundle.loading import KVPModel
from ...engine.prompt import encode
from ...errors import InputError
from ..likelihood import Scoring, all_predicted, continuation_losses, predicted_losses, split_choices
from ..records import NUMBER, TEXT, TEXTS, hashes, read_records, shuffled
from ..task import Item, Measure, Place, Row, Run, Task, bundles_share, one_by_one, row_of


def items(places: Sequence[str], seed: int) -> list[Item]:
    """Return multiple-choice questions: ``query``, ``choices``, ``gold``.

    Raises:
        InputError: a ``gold`` that is the place of no choice.
    """
    records = shuffled(read_records(places, {"query": TEXT, "choices": TEXTS, "gold": NUMBER}), seed)
    if wrong := [record for record in records if not 0 <= record["gold"] < len(record["choices"])]:
        raise InputError(
            f"'gold' is {wrong[0]['gold']} where there are {len(wrong[0]['choices'])} choices; check --data."
        )
    if blank := [record for record in records if not all(map(str.strip, record["choices"]))]:
        raise InputError(
            f"a choice of '{blank[0]['query'][:60]}' is blank, which nothing can be likelier than; remove it."
        )
    return [
        Item(
            str(number),
            f"{record['query'].strip()}\nAnswer:",
            [f" {choice}" for choice in record["choices"]],
            {"gold": record["gold"]},
        )
        for number, record in enumerate(records)
    ]


def measure_choice(scoring: Scoring) -> Measure:
    """Return how multiple choice is measured."""

    def measure(model: KVPModel, arm: Arm, item: Item) -> Row:
        prompt, choices = split_choices(model, item.prompt, item.answers)
        losses, ttft_ms = continuation_losses(model, arm, prompt, choices)
        if scoring == Scoring.predicted and arm.kind.predicts:
            losses = [predicted_losses(model, prompt, choice)[0] for choice in choices]
        likelihoods = [-float(loss.sum()) for loss in losses]
        per_letter = [value / len(text.lstrip()) for value, text in zip(likelihoods, item.answers, strict=True)]
        right = {
            "accuracy": float(np.argmax(likelihoods) == item.extra["gold"]),
            "accuracy_per_letter": float(np.argmax(per_letter) == item.extra["gold"]),
        }
        return row_of(right["accuracy"], right, ttft_ms, len(prompt), likelihoods=likelihoods)

    return one_by_one(measure)


def run(data: list[str], scoring: Scoring = Scoring.continuation, limit: int | None = None, seed: int = 0) -> Run:
    """Multiple choice (ARC, PIQA): the likeliest continuation.

    Records have query, choices and gold.
    """
    return Run(
        "mcq",
        lambda _: items(data, seed),
        measure_choice(scoring),
        lambda model, item: encode(model, item.prompt, raw=True),
        limit,
        seed,
        {"data": hashes(data), "scoring": scoring.value},
        dial=all_predicted if scoring == Scoring.predicted else bundles_share,
    )


PLACES = tuple(Place(name, {"data": f"{name}.jsonl.gz"}, {"limit": 500}) for name in ("arc_easy", "piqa"))
TASK = Task("mcq", "accuracy", run, places=PLACES, average="Multiple choice")
