"""The dial's trade-off: what each setting costs in time and gives in recovery, and what a bundle keeps of it."""

import os
from collections.abc import Mapping, Sequence
from itertools import groupby, islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..arms.arm import Arm
from ..arms.kinds import parse_arm
from ..bundle.config import MeasuredDial, read_config
from ..bundle.loading import KVPModel
from ..bundle.named import DATA, NAMED
from ..engine.context import Context
from ..engine.decode import Answer, decode_alone, decode_refining
from ..engine.dial import FULL, Dial
from ..engine.prefill import Progress
from ..engine.prompt import check_window
from ..engine.reply import first_token_on
from ..errors import InputError
from ..files import expanded
from ..models.families import Cache
from ..train.recovery import recoveries, token_losses
from .rows import run_items
from .summary import retention
from .task import Item, Row, one_by_one, row_of
from .tasks.document import items
from .tasks.squad import ANSWER, f1


def dials(
    heads: list[int], tails: list[int], shares: Sequence[float | None] = (None,), refine_tokens: int = 0
) -> list[Dial]:
    """Return full prefill and the combinations of heads, tails and shares to recompute (None: the bundle's)."""
    predicted = (Dial("kvp", *each, refine_tokens=refine_tokens) for each in product(heads, tails, shares))
    return [FULL, *predicted]


KEPT = ("exact_head", "exact_tail", "recompute", "recovery", "sooner")


class Followed(NamedTuple):
    """A prompt and what follows it, which is scored.

    Attributes:
        prompt: token ids.
        text: token ids of what follows; empty where that is the answer that full prefill gives.
        question: what the prompt asks, whose answers are accepted.
    """

    prompt: list[int]
    text: Sequence[int] = ()
    question: Item | None = None


def questions_of(model: KVPModel, places: Sequence[str], tokens: int, seed: int, limit: int) -> list[Followed]:
    """Return questions about documents, prompts of up to ``tokens`` tokens.

    What follows is left to full prefill: its own answers tell the dials apart by fewer prompts than accepted ones do,
    which may be unlikely whichever way the prompt is read.

    Args:
        model: the bundle.
        places: records with title, context, question and answers (``tasks.document``).
        tokens: of a prompt; contexts of one title are joined, as many as it takes.
        seed: orders them.
        limit: questions at most.

    Raises:
        InputError: unusable data, or more tokens than the context window holds.
    """
    check_window(model, tokens)
    found = islice(items(places, model.text_tokenizer, [tokens], seed), limit)
    return [Followed(ANSWER.encode(model, item), question=item) for item in found]


def own_answer(model: KVPModel, prompt: list[int], cache: Cache, refine_tokens: int = 0) -> Answer:
    """Return the base's greedy answer, its end included, on a cache of all prompt tokens but the last."""
    answer = Answer(prompt[-1], cache, None, model.text_tokenizer, ANSWER.stop, ANSWER.max_tokens)
    if decode_refining(model, answer, prompt, refine_tokens):
        decode_alone(model.base, [answer])
    return answer


def measure_dials(
    model: KVPModel,
    documents: Mapping[int, Sequence[Followed]],
    choices: Sequence[Dial],
    *,
    recipe: dict[str, Any] | None = None,
    log: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Measure recovery and the time to the first token for each dial, interleaved document by document.

    Args:
        model: the bundle.
        documents: by their length, prompts of about that many tokens, each with what follows and is scored.
        choices: what to measure; full prefill first.
        recipe: what the numbers depend on besides; a log of another one is refused.
        log: JSONL, a row for each document as soon as it is measured; a begun one is gone on with (``rows.run_items``).
        progress: called with (documents done, documents in all).

    Returns:
        For each length ``summarised`` rows, the shortest first.
    """
    warm: set[int] = set()

    def measure(model: KVPModel, _: Arm, item: Item) -> Row:
        length, followed = item.extra["length"], item.extra["followed"]
        if length not in warm:
            warm.add(length)
            for choice in choices:
                read_by(model, followed.prompt, choice)
        return measured(model, followed, choices)

    items = [
        Item(f"{length} {number}", "", extra={"length": length, "followed": followed})
        for length, found in sorted(documents.items())
        for number, followed in enumerate(found)
    ]
    full, each = [parse_arm("full")], one_by_one(measure)
    rows = run_items(model, full, items, each, recipe=recipe or {}, log=log, progress=progress)
    by_length = groupby(zip(items, rows, strict=True), key=lambda pair: pair[0].extra["length"])
    return [row for _, pairs in by_length for row in summarised(model, [row for _, row in pairs], choices)]


def measured(model: KVPModel, followed: Followed, choices: Sequence[Dial]) -> Row:
    """Return what full prefill takes for one prompt; the metrics hold that, and quality, by dial."""
    prompt, text, question = followed
    rest, metrics = [prompt[-1], *text], {}
    for choice in choices:
        name = setting_of(choice)
        metrics[f"{name} ttft_ms"], cache = read_by(model, prompt, choice)
        if question is not None:
            answer = own_answer(model, prompt, cache, choice.refine_tokens)
            said = answer.text()
            if choice == choices[0]:
                rest, expected = [prompt[-1], *answer.tokens], said
            metrics[f"{name} score"], metrics[f"{name} agreement"] = f1(said, question.answers), f1(said, [expected])
        metrics[f"{name} loss"] = float(token_losses(model.base, cache, rest).mean())
    metrics["no_context loss"] = float(token_losses(model.base, make_prompt_cache(model.base), rest).mean())
    return row_of(metrics["full loss"], metrics, metrics["full ttft_ms"], len(prompt))


def setting_of(dial: Dial) -> str:
    """Return the short name of a dial whose bundle is known."""
    refined = f"+{dial.refine_tokens}" if dial.refine_tokens else ""
    return "full" if dial.path == "full" else f"{dial.exact_head}+{dial.exact_tail}-{dial.recompute}{refined}"


def summarised(model: KVPModel, measurements: Sequence[Row], choices: Sequence[Dial]) -> list[dict[str, Any]]:
    """Return what documents of one length say about each dial.

    Returns:
        Rows of path, exact_head, exact_tail, recompute, refine_tokens, prompt_tokens (their mean), documents, ttft_ms
        (median), sooner (full's over it), recovery, context_gain (nats per token that the prompt gives full prefill;
        recovery is a share of it, and means nothing where it is not above 0), and ``is_best``: no dial that is as quick
        recovers more.
        Of questions also score (mean F1 of each dial's own greedy answer), agreement (mean F1 of it with full's answer)
        and, where full's score is above 0, the retention of that with its interval.
    """

    def values(name: str, what: str) -> list[float]:
        return [row["metrics"][f"{name} {what}"] for row in measurements]

    names = ["full", *map(setting_of, choices[1:])]
    nll = {name: float(np.mean(values(name, "loss"))) for name in ("no_context", *names)}
    recovery = recoveries(nll)
    median_ms = {name: float(np.median(values(name, "ttft_ms"))) for name in names}
    rows: list[dict[str, Any]] = [
        {
            "path": choice.path,
            "exact_head": choice.exact_head,
            "exact_tail": choice.exact_tail,
            "recompute": 0.0 if choice.path == "full" else choice.share(model.config),
            "refine_tokens": choice.refine_tokens,
            "prompt_tokens": round(float(np.mean([row["prompt_tokens"] for row in measurements]))),
            "documents": len(measurements),
            "ttft_ms": round(median_ms[name], 1),
            "sooner": round(median_ms["full"] / median_ms[name], 3),
            "recovery": round(recovery[name], 4),
            "context_gain": round(nll["no_context"] - nll["full"], 4),
        }
        for name, choice in zip(names, choices, strict=True)
    ]
    if "full score" in measurements[0]["metrics"]:
        for row, name in zip(rows, names, strict=True):
            row |= {what: round(float(np.mean(values(name, what))), 4) for what in ("score", "agreement")}
            if rows[0]["score"]:
                row["retention"] = retention(values(name, "score"), values("full", "score"))
    for row in rows:
        quicker = [other["recovery"] for other in rows if other["ttft_ms"] <= row["ttft_ms"]]
        row["is_best"] = row["recovery"] == max(quicker)
    return rows


def read_by(model: KVPModel, prompt: list[int], dial: Dial) -> tuple[float, Cache]:
    """Take a prompt's first token; returns the TTFT in ms, and the base's cache of all prompt tokens but the last."""
    context = Context(model)
    first = first_token_on(context, prompt, dial.settled(model.config, len(prompt), 0, 0))
    context.keep(len(prompt) - 1)
    return first.ttft_ms, context.cache


def soonest(rows: Sequence[dict[str, Any]], promises: Mapping[Any, float]) -> list[MeasuredDial]:
    """Return for each quality, by prompt length, the setting that keeps its promise soonest.

    That is ``full`` where no prediction does, or none that does is sooner, where the prompts told nothing of what was
    scored, and on prompts shorter than all measured.

    Args:
        rows: of ``measure_dials``, of one or more prompt lengths.
        promises: by quality, what it keeps (see ``keeps``).
    """
    found = []
    for quality, least in promises.items():
        found.append(MeasuredDial(quality=quality, from_tokens=0, path="full"))
        for length in sorted({row["prompt_tokens"] for row in rows}):
            kept: list[dict[str, Any]] = [
                {name: row[name] for name in KEPT}
                | {"refine_tokens": row.get("refine_tokens") or None, "retention": row.get("retention", {}).get("mean")}
                for row in rows
                if row["prompt_tokens"] == length and row["sooner"] > 1 and keeps(row, least)
            ]
            if kept:
                best = max(kept, key=lambda row: row["sooner"])
                found.append(MeasuredDial(quality=quality, from_tokens=length, **best))
            elif found[-1].path != "full":
                found.append(MeasuredDial(quality=quality, from_tokens=length, path="full"))
    return found


def keeps(row: dict[str, Any], least: float) -> bool:
    """Return whether a dial keeps a quality's promise.

    Recovery tells it, to two places. The score of as many answers as can be asked in an hour does not, it is known to a
    tenth or so; but where even the upper end of its interval is too low, a recovery that says otherwise is wrong.
    """
    most = row["retention"]["interval"][1] if "retention" in row else least
    return round(row["recovery"], 2) >= least and most >= least and row["context_gain"] > 0


def own_directory(name: str) -> Path:
    """Return the directory of a bundle that may be changed.

    Raises:
        InputError: it ships with the package, came from the Hub, or is read-only.
    """
    place = expanded(name)
    is_own = name not in NAMED and place.is_dir() and DATA not in place.resolve().parents
    if not is_own or not all(os.access(path, os.W_OK) for path in (place, place / "kvp.json") if path.exists()):
        raise InputError(f"{name} is no bundle of your own that can be written; copy its directory, and name the copy.")
    return place


def store_dials(directory: Path, measured: Sequence[MeasuredDial]) -> None:
    """Put measured dials into a bundle's kvp.json, in place of those that are there."""
    read_config(directory).model_copy(update={"dials": tuple(measured)}).save(directory)
