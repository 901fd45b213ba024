"""Token pruning at equal TTFT: how much of a prompt a baseline may keep to be as fast as a predicted cache."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from ..arms.arm import Arm
from ..arms.clock import first_token
from ..arms.kinds import KINDS, parse_arm
from ..bundle.loading import KVPModel
from .summary import EQUAL_TTFT

LEAST, MOST = 0.05, 0.95
"""Shares of the prompt between which one is sought."""
TOLERANCE = 0.03
TRIES = 3


def pruning_kinds() -> list[str]:
    """Return the kinds of arms that leave tokens of the prompt out."""
    return [name for name, kind in KINDS.items() if kind.prunes]


def pruning_arm(kind: str, share: float) -> Arm:
    """Return a pruning arm of a share of the prompt; LazyLLM's falls to a third of it, as in the paper's 0.75-0.25."""
    return parse_arm("-".join([kind, *(f"{share / 3**number:.3f}" for number in range(KINDS[kind].numbers))]))


def match(model: KVPModel, target: Arm, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
    """Find, for each kind of token pruning, the share of the prompt at which it is as fast as a target, as measured.

    Args:
        model: the bundle.
        target: the arm to be as fast as.
        prompts: token ids, one prompt per round of measurement.

    Returns:
        Per kind ``target``, ``arm`` and ``ttft_ratio``, its time over the target's. Where even ``LEAST`` of the
        prompt takes longer the arm is None: no share is as fast.
    """
    found = []
    for kind in pruning_kinds():
        share, ratio = matching_share(partial(ttft_ratios, model, target, kind, prompts))
        is_reached = ratio <= EQUAL_TTFT or share > LEAST
        name = pruning_arm(kind, share).name if is_reached else None
        found.append({"target": target.name, "kind": kind, "arm": name, "ttft_ratio": ratio})
    return found


def matching_share(ratios: Callable[[Sequence[float]], list[float]]) -> tuple[float, float]:
    """Return the share of the prompt whose time comes closest to the target's, and its time over the target's.

    Args:
        ratios: returns the time over the target's at each share; it rises with the share, about in a line.
    """
    low, high = LEAST, MOST
    tried = dict(zip((low, high), ratios((low, high)), strict=True))
    for _ in range(TRIES):
        if tried[low] >= 1 - TOLERANCE or tried[high] <= 1 + TOLERANCE:
            break  # an end is as close as it gets
        share = low + (high - low) * (1 - tried[low]) / (tried[high] - tried[low])
        (tried[share],) = ratios((share,))
        if abs(tried[share] - 1) <= TOLERANCE:
            break
        low, high = (share, high) if tried[share] < 1 else (low, share)
    return min(tried.items(), key=lambda pair: abs(pair[1] - 1))


def ttft_ratios(
    model: KVPModel, target: Arm, kind: str, prompts: Sequence[list[int]], shares: Sequence[float]
) -> list[float]:
    """Return median TTFT at each share over the target's, all measured in turn on every prompt."""
    arms, rounds = [target, *(pruning_arm(kind, share) for share in shares)], []
    for prompt in prompts:
        times = [first_token(model, arm, mx.array([prompt])).ttft_ms for arm in arms]
        rounds.append([time / times[0] for time in times[1:]])
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def match_by_work(model: KVPModel, target: Arm, prompt_tokens: int) -> list[dict[str, Any]]:
    """Return what ``match`` does, by arithmetic and in steps of 0.05: a guess, without measuring."""
    allowed, found = target.work(model, prompt_tokens).flops, []
    for kind in pruning_kinds():
        shares = [LEAST + 0.05 * step for step in range(19)]
        work = {share: pruning_arm(kind, share).work(model, prompt_tokens).flops / allowed for share in shares}
        share = max((share for share in shares if work[share] <= 1), default=None)
        name = None if share is None else pruning_arm(kind, share).name
        found.append({"target": target.name, "kind": kind, "arm": name, "ttft_ratio": work[share or LEAST]})
    return found
