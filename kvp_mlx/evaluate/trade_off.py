"""The dial's trade-off: what each exact head and tail costs in time and gives in context recovery."""

from typing import Any

import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..bundle.loading import KVPModel
from ..engine.context import Context
from ..engine.dial import Dial
from ..engine.prefill import Progress
from ..engine.reply import first_token_on
from ..models.families import Cache
from ..train.recovery import recoveries, token_losses


def dials(heads: list[int], tails: list[int]) -> list[Dial]:
    """Return full prefill and the combinations of heads and tails."""
    return [Dial("full", 0, 0), *(Dial("kvp", head, tail) for head in heads for tail in tails)]


def measure_dials(
    model: KVPModel,
    windows: list[list[int]],
    continuation_tokens: int,
    choices: list[Dial],
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Measure recovery and the time to the first token for each dial, interleaved document by document.

    Args:
        model: the bundle.
        windows: token ids, each a prompt followed by ``continuation_tokens`` to score; the first warms up as well.
        continuation_tokens: tokens scored.
        choices: what to measure; full prefill first.
        progress: called with (documents done, documents in all).

    Returns:
        Rows of path, exact_head, exact_tail, ttft_ms (median), sooner (full's over it), recovery, and ``is_best``:
        no dial that is as quick recovers more.
    """
    losses: dict[str, list[float]] = {name: [] for name in ["no_context", *map(str, choices)]}
    times: dict[Dial, list[float]] = {choice: [] for choice in choices}
    for choice in choices:
        read_by(model, windows[0][:-continuation_tokens], choice)
    for number, window in enumerate(windows):
        prompt, rest = window[:-continuation_tokens], window[-continuation_tokens - 1 :]
        losses["no_context"].append(token_losses(model.base, make_prompt_cache(model.base), rest).mean())
        for choice in choices:
            ttft_ms, cache = read_by(model, prompt, choice)
            times[choice].append(ttft_ms)
            losses[str(choice)].append(token_losses(model.base, cache, rest).mean())
        progress(number + 1, len(windows))
    nll = {name: float(np.mean(values)) for name, values in losses.items()}
    recovery = recoveries(nll | {"full": nll[str(choices[0])]})
    median_ms = {choice: float(np.median(values)) for choice, values in times.items()}
    rows: list[dict[str, Any]] = [
        {
            "path": choice.path,
            "exact_head": choice.exact_head,
            "exact_tail": choice.exact_tail,
            "ttft_ms": round(median_ms[choice], 1),
            "sooner": round(median_ms[choices[0]] / median_ms[choice], 3),
            "recovery": round(recovery[str(choice)], 4),
        }
        for choice in choices
    ]
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
