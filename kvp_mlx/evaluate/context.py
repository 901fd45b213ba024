"""Context recovery: how much of what a prompt tells the full model still reaches it through a predicted cache.

Per document, the log-likelihood of the tokens that follow a prompt, under several caches. In every arm the base
reads the last prompt token itself, as in decoding; without context it reads nothing before it.
``recovery = (nll_no_context - nll_arm) / (nll_no_context - nll_full)``, and ``separation`` is the recovery of the
right document minus that of a wrong one of the same kind, kvp's over full's (design.md section 9).
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..bundle import KVPModel
from ..errors import InputError
from ..families import Cache, output_head, run_layers
from ..pipeline import base_prefill, predict_base_cache

ARMS = ("full", "kvp", "wrong_document", "wrong_document_full", "no_context")


def measure_context(
    model: KVPModel,
    windows: list[list[int]],
    continuation_tokens: int,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure all arms on documents of one kind.

    Args:
        model: the bundle.
        windows: token ids, each a prompt followed by ``continuation_tokens`` to score; all of one length. Each
            document's wrong document is the next one's prompt.
        continuation_tokens: tokens scored.
        progress: called with (documents done, documents in all).

    Returns:
        The JSON of ``kvp eval context``: documents, prompt_tokens, continuation_tokens, separation and, per
        arm, the mean negative log-likelihood in nats per token (``nll``) and ``recovery``.

    Raises:
        InputError: fewer than two documents.
    """
    if len(windows) < 2:
        raise InputError("context recovery needs at least two documents; give more --data.")
    split = len(windows[0]) - continuation_tokens
    totals = dict.fromkeys(ARMS, 0.0)
    for number, window in enumerate(windows):
        wrong = windows[(number + 1) % len(windows)]
        for arm, cache in arm_caches(model, window[: split - 1], wrong[: split - 1]):
            totals[arm] += continuation_nll(model, cache, window[split - 1 :])
        progress(number + 1, len(windows))
    nll = {arm: total / len(windows) for arm, total in totals.items()}
    gain = nll["no_context"] - nll["full"]
    recovery = {arm: (nll["no_context"] - value) / gain for arm, value in nll.items()}
    return {
        "documents": len(windows),
        "prompt_tokens": split,
        "continuation_tokens": continuation_tokens,
        "separation": (recovery["kvp"] - recovery["wrong_document"])
        / (recovery["full"] - recovery["wrong_document_full"]),
        "arms": {arm: {"nll": nll[arm], "recovery": recovery[arm]} for arm in ARMS},
    }


def arm_caches(model: KVPModel, prompt: list[int], wrong: list[int]) -> Iterator[tuple[str, Cache]]:
    """Yield each arm's base cache, holding all but the last prompt token, one at a time."""
    right_ids, wrong_ids = mx.array([prompt]), mx.array([wrong])
    yield "full", base_prefill(model, right_ids)
    yield "kvp", predict_base_cache(model, right_ids)
    yield "wrong_document", predict_base_cache(model, wrong_ids)
    yield "wrong_document_full", base_prefill(model, wrong_ids)
    yield "no_context", make_prompt_cache(model.base)


def continuation_nll(model: KVPModel, cache: Cache, ids: list[int]) -> float:
    """Return the mean negative log-likelihood of ``ids[1:]``, the base reading ``ids[:-1]`` on top of ``cache``."""
    inputs, targets = mx.array([ids[:-1]]), mx.array([ids[1:]])
    hidden, _ = run_layers(model.base, inputs, cache)
    logits = output_head(model.base, hidden).astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]  # (B, T, vocab) -> (B, T)
    return cast(float, (mx.logsumexp(logits, axis=-1) - chosen).mean().item())
