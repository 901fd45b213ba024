"""The log-likelihood that arms give to texts that follow a prompt."""

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arms.arm import Arm
from ..arms.kinds import KINDS
from ..bundle.loading import KVPModel
from ..engine.decode import repeated
from ..engine.dial import PREDICT, Dial
from ..engine.prefill import predict_base_cache
from ..engine.prompt import check_window
from ..errors import InputError
from ..models.sections import output_head, run_layers
from ..train.objectives import PredictedOnlyCache
from ..train.recovery import losses_of
from .answer import read_prompt


class Scoring(StrEnum):
    """How the arm kvp scores a given continuation.

    ``continuation``: it reads the prompt, the base goes on; ``predicted``: the paper's, all keys and values are
    predicted, the continuation's too.
    """

    continuation = "continuation"
    predicted = "predicted"


def all_predicted(arms: Sequence[Arm]) -> Dial:
    """Return the dial of the paper's scoring: the base reads nothing itself, in no arm.

    Raises:
        InputError: an arm whose numbers say otherwise.
    """
    if other := [arm.name for arm in arms if arm.kind.predicts and (arm.kind is not KINDS["kvp"] or any(arm.numbers))]:
        raise InputError(f"scoring 'predicted' predicts all of the prompt, so {other[0]} is no arm of it; take kvp.")
    return replace(PREDICT, recompute=0.0)


def split_choices(model: KVPModel, prompt: str, choices: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Return a prompt's tokens and each choice's, cut where the prompt alone ends (as lm-evaluation-harness does).

    A prompt of no tokens is ``prefix_token``, so that a choice's first token is scored too.

    Raises:
        InputError: see ``prefix_token``.
    """
    encode = model.text_tokenizer.encode
    ids = encode(prompt)
    choices_ids = [encode(prompt + choice)[len(ids) :] for choice in choices]
    return ids or [prefix_token(model)], choices_ids


def prefix_token(model: KVPModel) -> int:
    """Return what stands before a text without a prompt: BOS, or else the end of a text before (as for lm-eval).

    Raises:
        InputError: the tokeniser has neither.
    """
    tokenizer = model.text_tokenizer
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError("a text without a prompt needs a BOS or end-of-text token before it; this tokeniser has neither.")


def continuation_losses(
    model: KVPModel, arm: Arm, prompt: list[int], continuations: Sequence[list[int]]
) -> tuple[list[np.ndarray], float]:
    """Return the negative log-likelihoods of each continuation's tokens after a prompt, and the TTFT in ms.

    The arm reads the prompt, its model goes on from the last token: what decoding sees.

    Raises:
        InputError: see ``check_continuations``.
    """
    longest = check_continuations(model, prompt, continuations)
    first = read_prompt(model, arm, prompt)
    inputs = mx.array([[prompt[-1], *c[:-1], *[0] * (longest - len(c))] for c in continuations])  # (B, T), padded
    targets = mx.array([[*c, *[0] * (longest - len(c))] for c in continuations])
    hidden, _ = run_layers(first.network, inputs, repeated(first.network, first.cache, len(continuations)))
    losses = losses_of(logits_of(first.network, hidden), targets)
    return [row[: len(c)] for row, c in zip(losses, continuations, strict=True)], first.ttft_ms


def predicted_losses(model: KVPModel, prompt: list[int], continuation: list[int]) -> tuple[np.ndarray, bool]:
    """Return a continuation's negative log-likelihoods as the paper scores, and whether it is the greedy one.

    All keys and values are predicted: each position sees the predicted pairs up to its own and none that the base
    computed, the continuation's too.

    Raises:
        InputError: see ``check_continuations``.
    """
    check_continuations(model, prompt, [continuation])
    ids = mx.array([[*prompt, *continuation]])
    cache = predict_base_cache(model, ids[:, :-1], recompute=0.0)
    hidden, _ = run_layers(model.base, ids[:, :-1], [PredictedOnlyCache(layer) for layer in cache])
    logits, targets = logits_of(model.base, hidden[:, len(prompt) - 1 :]), mx.array([continuation])
    return losses_of(logits, targets)[0], bool(mx.all(mx.argmax(logits, axis=-1) == targets))


def logits_of(network: nn.Module, hidden: mx.array) -> mx.array:
    """Return the logits (B, T, vocabulary) of what the last layer returns (B, T, hidden)."""
    return output_head(network, hidden).astype(mx.float32)


def check_continuations(model: KVPModel, prompt: list[int], continuations: Sequence[list[int]]) -> int:
    """Return the length of the longest continuation; its last token is scored but not read.

    Raises:
        InputError: it does not fit the context window after the prompt, or a text has no token.
    """
    if not prompt or not all(continuations):
        raise InputError("prompt and continuation need at least one token each.")
    longest = max(map(len, continuations))
    check_window(model, len(prompt) + longest - 1)
    return longest


def reply_log_probabilities(model: KVPModel, arm: Arm, prompt: list[int], reply: list[int]) -> tuple[np.ndarray, float]:
    """Return the log-probabilities (reply tokens, vocabulary) that an arm gives along a reply, and the TTFT in ms."""
    first = read_prompt(model, arm, prompt)
    hidden, _ = run_layers(first.network, mx.array([[prompt[-1], *reply[:-1]]]), first.cache)
    logits = logits_of(first.network, hidden)
    return np.array((logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0]), first.ttft_ms
