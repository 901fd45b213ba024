"""Decoding with the auxiliary's drafts and without: tokens per second and acceptance, by kind of task."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..arms.arm import Arm
from ..arms.kinds import KINDS, kvp_dial
from ..bundle.loading import KVPModel
from ..engine.context import Context
from ..engine.dial import FULL, Dial
from ..engine.prompt import encode
from ..engine.reply import reply
from ..engine.speculative import Draft, Drafting
from ..errors import InputError
from .document import heading
from .precision import precision_name
from .ttft import Sweep, fresh_prompt, quartiles

TASKS = {
    "code": "Write a Python class for a bank account, with deposits, withdrawals and a history, and show its use.",
    "prose": "Write an essay about what makes a bridge stand.",
    "quotation": "Repeat the text above, word for word.",
}
"""What follows the text of a prompt, by kind of task."""
WAYS: dict[Draft, tuple[Draft, ...]] = {
    "none": ("none",),
    "auxiliary": ("none", "auxiliary"),
    "auto": ("none", "auxiliary", "auto"),
}
"""What is compared where a draft is asked for: ``auto`` has to come near the better of the other two."""


@dataclass(frozen=True)
class Decoded:
    """One reply.

    Attributes:
        seconds: from its first token to its last.
        from_draft: whether the draft had each.
        drafted: how many the draft had proposed when each came.
    """

    seconds: float
    from_draft: list[bool]
    drafted: list[int]

    @property
    def tps(self) -> float:
        """Tokens per second after the first one."""
        return (len(self.from_draft) - 1) / self.seconds


def measure_drafts(
    model: KVPModel,
    name: str,
    text_ids: list[int],
    sweep: Sweep,
    drafting: Drafting,
    *,
    new_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Time greedy replies with drafts and without, arms interleaved; the first token does not count.

    What the auxiliary has to read before it can draft does: after full prefill that is the prompt.

    Args:
        model: the bundle.
        name: how the user called it.
        text_ids: real text as token ids; each prompt is a fresh stretch of it and a task.
        sweep: lengths of these stretches, arms (``full`` and those that predict) and rounds.
        drafting: how to draft.
        new_tokens: tokens to generate at most.
        progress: called with (rounds done, rounds in all).

    Raises:
        InputError: an auxiliary that cannot draft, or another arm.
    """
    replace(drafting, who="auxiliary").settled(model, is_quantised=False)
    dials = {arm.name: dial_of_arm(arm) for arm in sweep.arms}
    steps, total = itertools.count(1), len(sweep.prompt_tokens) * len(TASKS) * (sweep.rounds + 1)
    rows: list[dict[str, Any]] = []
    for length, (task, question) in itertools.product(sweep.prompt_tokens, TASKS.items()):
        ways = list(itertools.product(dials, WAYS[drafting.who]))
        replies: dict[tuple[str, Draft], list[Decoded]] = {way: [] for way in ways}
        for round_number in range(sweep.rounds + 1):
            text = model.text_tokenizer.decode(fresh_prompt(text_ids, length, round_number))
            is_raw = model.text_tokenizer.chat_template is None
            ids = encode(model, f"{text}\n\n{question}", raw=is_raw)
            for arm, who in ways:
                one = decoded(model, ids, dials[arm], max_tokens=new_tokens, draft=who, draft_tokens=drafting.tokens)
                if round_number and len(one.from_draft) > 1:
                    replies[arm, who].append(one)
            progress(next(steps), total)
        rows += [
            {"task": task, "prompt_tokens": length, "arm": arm, "draft": who}
            | _row(replies[arm, who], replies[arm, "none"], drafting.tokens)
            for arm, who in ways
        ]
    return heading(name, precision_name(model)) | {
        "rounds": sweep.rounds,
        "new_tokens": new_tokens,
        "draft_tokens": drafting.tokens,
        "rows": rows,
    }


def dial_of_arm(arm: Arm) -> Dial:
    """Return how an arm reads a prompt.

    Raises:
        InputError: it leaves no caches that the auxiliary could go on from.
    """
    if arm.kind not in (KINDS["full"], KINDS["kvp"]):
        raise InputError(f"drafts are measured after full and kvp, not after {arm.name}; leave it out of --arms.")
    return FULL if arm.name == "full" else kvp_dial(arm.numbers)


def decoded(model: KVPModel, ids: list[int], dial: Dial, **how: Any) -> Decoded:
    """Take a reply on a context of its own."""
    pieces = reply(Context(model), ids, dial, **how)
    first = next(pieces)
    start = time.perf_counter()
    others = list(pieces)
    seconds = time.perf_counter() - start
    all_of_it = (first, *others)
    return Decoded(seconds, [piece.from_draft for piece in all_of_it], [piece.drafted_tokens for piece in all_of_it])


def _row(replies: list[Decoded], plain: list[Decoded], tokens: int) -> dict[str, Any]:
    """Return what replies took, and how it compares with those without a draft; nothing where each ended at once."""
    if not replies:
        return {"tps": None, "ratio": None, "drafted_tokens": 0, "acceptance": None}
    tps = quartiles([one.tps for one in replies])
    return {
        "tps": tps,
        "ratio": tps["median"] / statistics.median(one.tps for one in plain) if plain else None,
        "drafted_tokens": sum(one.drafted[-1] for one in replies),
        "acceptance": acceptance(replies, tokens),
    }


def acceptance(replies: list[Decoded], tokens: int) -> list[float] | None:
    """Return for each position in a draft of ``tokens`` the share of drafts so long that were right up to there."""
    proposed, accepted = [0] * tokens, [0] * tokens
    for one in replies:
        position, before = 0, 0
        for from_draft, drafted in zip(one.from_draft, one.drafted, strict=True):
            if drafted > before:  # a round begins
                position = 0
            for place in range(drafted - before):
                proposed[place] += 1
            before = drafted
            if from_draft:
                accepted[position] += 1
                position += 1
    if not any(proposed):
        return None
    return [right / max(count, 1) for right, count in zip(accepted, proposed, strict=True)]
