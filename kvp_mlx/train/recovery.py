"""Context recovery: how much of what a prompt tells the full model still reaches it through a predicted cache.

Per document, the log-likelihood of the tokens that follow a prompt, under several caches. In every arm the base
reads the last prompt token itself, as in decoding; without context it reads nothing before it.
``recovery = (nll_no_context - nll_arm) / (nll_no_context - nll_full)``, and ``separation`` is the recovery of the
right document minus that of a wrong one of the same kind, kvp's over full's (design.md section 9).

Of a few documents likelihood is a noisy measure: a prediction that changes what the full model expects can hit by
chance. ``divergence`` is how far kvp's distribution of each token strays from full's, whatever the text goes on with.
"""

from collections.abc import Collection, Sequence
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..bundle.loading import KVPModel
from ..engine.dial import Dial
from ..engine.prefill import Progress, base_prefill, predict_base_cache
from ..errors import InputError, KVPError
from ..models.families import Cache
from ..models.sections import early_exit, output_head, run_layers
from .text import PromptWindow

ARMS = ("full", "kvp", "auxiliary", "wrong_document", "wrong_document_full", "no_context")
OF_THE_BASE = ("full", "wrong_document_full", "no_context")
"""Arms that no training changes."""
LIKELIEST = 64
"""Tokens that divergence tells apart, full's likeliest at each place; the others count as one."""
WITHOUT_AUXILIARY = tuple(arm for arm in ARMS if arm != "auxiliary")


class RecoveryMeasurement:
    """Context recovery on documents of one kind, which can be measured anew after the maps have changed.

    Args:
        model: the bundle.
        windows: token ids, each a prompt followed by ``continuation_tokens`` to score, or a window that says where its
            prompt ends. Each document's wrong document is the next one's prompt.
        continuation_tokens: tokens scored where the window does not say it.
        exact_tail: predicting, prompt tokens before the last that the base reads itself.
        recompute: predicting, the share of the other tokens that it also reads itself (default: the bundle's).
        arms: which of ``ARMS`` to measure; ``full`` and ``no_context`` always are, recovery is made of them.

    Raises:
        InputError: fewer than two documents, nothing left to predict, an unknown arm, or a share that the bundle
            cannot recompute.
    """

    def __init__(
        self,
        model: KVPModel,
        windows: Sequence[list[int]],
        continuation_tokens: int,
        *,
        exact_tail: int = 0,
        recompute: float | None = None,
        arms: Collection[str] = WITHOUT_AUXILIARY,
    ):
        if len(windows) < 2:
            raise InputError("context recovery needs at least two documents; give more --data.")
        self.model = model
        self.continuation_tokens = continuation_tokens
        self.splits = [
            window.prompt_tokens if isinstance(window, PromptWindow) else len(window) - continuation_tokens
            for window in windows
        ]
        if exact_tail > (shortest := min(self.splits)) - 2:
            raise InputError(f"an exact tail of {exact_tail} leaves nothing to predict of {shortest} prompt tokens.")
        self.windows = windows
        self.exact_tail = exact_tail
        self.recompute = Dial("kvp", 0, exact_tail, recompute).share(model.config)
        if unknown := set(arms) - set(ARMS):
            raise InputError(f"unknown arm '{min(unknown)}'; choose from {','.join(ARMS)}.")
        self.arms = [arm for arm in ARMS if arm in arms or arm in ("full", "no_context")]
        self._known: dict[str, list[np.ndarray]] = {}
        self._likeliest: dict[int, tuple[mx.array, mx.array]] = {}
        self._divergences: dict[int, np.ndarray] = {}

    def measure(self, progress: Progress = lambda done, total: None) -> dict[str, Any]:
        """Measure all arms.

        Args:
            progress: called with (documents done, documents in all).

        Returns:
            The JSON of ``kvp eval context``: documents, prompt_tokens, continuation_tokens, exact_tail, recompute,
            separation, divergence (nats per token) and, per arm, the mean negative log-likelihood in nats per token
            (``nll``) and ``recovery``.
        """
        losses: dict[str, list[np.ndarray]] = {arm: [] for arm in self.arms} | self._known
        for number in range(len(self.windows)):
            for arm in self.arms:
                if arm not in self._known:
                    losses[arm].append(self.token_losses(arm, number))
            progress(number + 1, len(self.windows))
        self._known = {arm: losses[arm] for arm in OF_THE_BASE if arm in losses}
        return self.summary(losses)

    def token_losses(self, arm: str, number: int) -> np.ndarray:
        """Return one document's negative log-likelihoods in nats, one for each token scored, under one arm."""
        model, cache, rest = self._read(arm, number)
        logits = logits_on(model, cache, rest)
        if arm == "full":
            self._likeliest[number] = likeliest(logits)
        elif arm == "kvp" and number in self._likeliest:
            self._divergences[number] = divergence(*self._likeliest[number], logits)
        return losses_of(logits, mx.array([rest[1:]]))[0]

    def _read(self, arm: str, number: int) -> tuple[nn.Module, Cache, list[int]]:
        """Return the model that goes on under an arm, its cache, and what it reads: the prompt's last token and on."""
        another = (number + 1) % len(self.windows)
        window, split = self.windows[number], self.splits[number]
        model, right = self.model, mx.array([window[: split - 1]])
        other = mx.array([self.windows[another][: self.splits[another] - 1]])
        rest = window[split - 1 :]
        if arm == "full":
            return model.base, base_prefill(model, right), rest
        if arm == "wrong_document_full":
            return model.base, base_prefill(model, other), rest
        if arm == "no_context":
            return model.base, make_prompt_cache(model.base), rest
        if arm == "auxiliary":
            alone = early_exit(model.base, model.config.auxiliary.layers) if model.is_prefix else model.auxiliary
            cache = make_prompt_cache(alone)
            run_layers(alone, right, cache)
            return alone, cache, rest
        ids = right if arm == "kvp" else other
        cache = predict_base_cache(model, ids, exact_tail=self.exact_tail, recompute=self.recompute)
        return model.base, cache, rest

    def summary(self, losses: dict[str, list[np.ndarray]]) -> dict[str, Any]:
        """Return the JSON of losses by arm, an array for each document."""
        tokens = max(map(len, losses["full"]))

        def nll(start: int, end: int) -> dict[str, float]:
            found = {arm: np.concatenate([row[start:end] for row in rows]) for arm, rows in losses.items()}
            return {arm: float(values.mean()) for arm, values in found.items()}

        means = nll(0, tokens)
        recovery = recoveries(means)
        gained = recovery["full"] - recovery.get("wrong_document_full", np.nan)
        separation = (recovery.get("kvp", np.nan) - recovery.get("wrong_document", np.nan)) / gained
        spans = {"first": (0, 1), "first_16": (0, 16), "rest": (16, tokens)}
        by_position = {
            name: recoveries(nll(start, end)).get("kvp") for name, (start, end) in spans.items() if start < tokens
        }
        return {
            "documents": len(self.windows),
            "prompt_tokens": round(median(self.splits)),
            "continuation_tokens": self.continuation_tokens,
            "exact_tail": self.exact_tail,
            "recompute": self.recompute,
            "separation": None if np.isnan(separation) else float(separation),
            "recovery_by_position": by_position,
            "divergence": float(np.concatenate(list(self._divergences.values())).mean()) if self._divergences else None,
            "arms": {arm: {"nll": means[arm], "recovery": recovery[arm]} for arm in self.arms},
        }


def recoveries(nll: dict[str, float]) -> dict[str, float]:
    """Return each arm's share of the log-likelihood gain that the prompt gives the full model.

    Raises:
        KVPError: it gives none at all.
    """
    gain = nll["no_context"] - nll["full"]
    if gain == 0:
        raise KVPError("the base says the same whatever it has read, so that nothing can be recovered; does it work?")
    return {arm: float((nll["no_context"] - value) / gain) for arm, value in nll.items()}


def token_losses(model: nn.Module, cache: Cache, ids: list[int]) -> np.ndarray:
    """Return the negative log-likelihoods of ``ids[1:]``, the model reading ``ids[:-1]`` on top of ``cache``."""
    return losses_of(logits_on(model, cache, ids), mx.array([ids[1:]]))[0]


def logits_on(model: nn.Module, cache: Cache, ids: list[int]) -> mx.array:
    """Return what a model makes of ``ids[:-1]`` on top of ``cache``: logits (1, T, vocab), fp32."""
    hidden, _ = run_layers(model, mx.array([ids[:-1]]), cache)
    return output_head(model, hidden).astype(mx.float32)


def likeliest(logits: mx.array) -> tuple[mx.array, mx.array]:
    """Return the ``LIKELIEST`` tokens of logits (1, T, vocab) and their log-probabilities, both (1, T, n)."""
    count = min(LIKELIEST, logits.shape[-1] - 1)
    ids = mx.argpartition(-logits, count - 1, axis=-1)[..., :count]
    found = mx.take_along_axis(logits, ids, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(ids, found)
    return ids, found


def divergence(ids: mx.array, expected: mx.array, logits: mx.array) -> np.ndarray:
    """Return KL(expected, logits) in nats (T,) of each token, all but the tokens ``ids`` (1, T, n) taken as one."""
    found = mx.take_along_axis(logits, ids, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
    p, q = (np.array(mx.exp(part), np.float64)[0] for part in (expected, found))
    p, q = (np.concatenate([part, 1 - part.sum(axis=-1, keepdims=True)], axis=-1).clip(1e-12) for part in (p, q))
    divergences: np.ndarray = (p * np.log(p / q)).sum(axis=-1)
    return divergences


def losses_of(logits: mx.array, targets: mx.array) -> np.ndarray:
    """Return the negative log-likelihoods (B, T) of ``targets`` (B, T) under ``logits`` (B, T, vocab)."""
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]  # (B, T, vocab) -> (B, T)
    return np.array(mx.logsumexp(logits, axis=-1) - chosen)
