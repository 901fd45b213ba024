"""The dial: what each exact head and tail costs in time and gives in context recovery."""

import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..bundle.loading import KVPModel
from ..engine.context import Context
from ..engine.prefill import Progress
from ..train.recovery import recoveries, token_losses


@dataclass(frozen=True)
class Setting:
    """One way to read a prompt."""

    path: str
    exact_head: int = 0
    exact_tail: int = 0


def settings(heads: list[int], tails: list[int]) -> list[Setting]:
    """Return full prefill and the combinations of heads and tails."""
    return [Setting("full"), *(Setting("kvp", head, tail) for head in heads for tail in tails)]


def measure_dial(
    model: KVPModel,
    windows: list[list[int]],
    continuation_tokens: int,
    choices: list[Setting],
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Measure recovery and the time to the first token for each setting, interleaved document by document.

    Args:
        model: the bundle.
        windows: token ids, each a prompt followed by ``continuation_tokens`` to score; the first warms up as well.
        continuation_tokens: tokens scored.
        choices: what to measure; full prefill first.
        progress: called with (documents done, documents in all).

    Returns:
        Rows of path, exact_head, exact_tail, ttft_ms (median), sooner (full's over it), recovery, and ``is_best``:
        no setting that is as quick recovers more.
    """
    losses: dict[Any, list[float]] = {choice: [] for choice in [*choices, "no_context"]}
    seconds: dict[Setting, list[float]] = {choice: [] for choice in choices}
    for choice in choices:
        _read(model, windows[0][:-continuation_tokens], choice)
    for number, window in enumerate(windows):
        prompt, rest = window[:-continuation_tokens], window[-continuation_tokens - 1 :]
        losses["no_context"].append(token_losses(model.base, make_prompt_cache(model.base), rest).mean())
        for choice in choices:
            start = time.perf_counter()
            context = _read(model, prompt, choice)
            seconds[choice].append(time.perf_counter() - start)
            losses[choice].append(token_losses(model.base, context.cache, rest).mean())
        progress(number + 1, len(windows))
    nll = {str(choice): float(np.mean(values)) for choice, values in losses.items()}
    recovery = recoveries(nll | {"full": nll[str(choices[0])]})
    full_ms = 1e3 * float(np.median(seconds[choices[0]]))
    rows = [
        vars(choice)
        | {
            "ttft_ms": round(1e3 * float(np.median(seconds[choice])), 1),
            "sooner": round(full_ms / (1e3 * float(np.median(seconds[choice]))), 3),
            "recovery": round(recovery[str(choice)], 4),
        }
        for choice in choices
    ]
    for row in rows:
        quicker = [other["recovery"] for other in rows if other["ttft_ms"] <= row["ttft_ms"]]
        row["is_best"] = row["recovery"] == max(quicker)
    return rows


def _read(model: KVPModel, prompt: list[int], choice: Setting) -> Context:
    """Read a prompt but for its last token, to the first token's logits; the context then lacks that token again."""
    context = Context(model)
    context.read(prompt, choice.path, exact_head=choice.exact_head, exact_tail=choice.exact_tail)
    logits = model.base(mx.array([prompt[len(context.tokens) :]]), cache=context.cache)
    mx.eval(logits[:, -1], [layer.state for layer in context.cache])
    context.grown_to(prompt)
    context.keep(len(prompt) - 1)
    return context
