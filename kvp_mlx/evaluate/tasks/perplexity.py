"""Perplexity of text after a prompt."""

import math
from collections.abc import Sequence
from itertools import islice

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...arms.arm import Arm
from ...bundle.loading import KVPModel
from ...engine.prompt import check_window
from ...train.text import data_files, token_windows
from ..likelihood import continuation_losses
from ..records import SAMPLE, hashes
from ..task import Item, Place, Row, Run, Task, one_by_one, row_of


def items(
    places: Sequence[str], tokenizer: TokenizerWrapper, prompt: int, rest: int, seed: int, count: int | None
) -> list[Item]:
    """Return stretches of text as token ids: ``prompt`` tokens to read, ``rest`` tokens to score after them."""
    windows = token_windows(data_files(places), tokenizer, prompt + rest, seed)
    full = (window for window in windows if len(window) == prompt + rest)
    return [
        Item(str(number), "", extra={"prompt": window[:prompt], "rest": window[prompt:]})
        for number, window in enumerate(islice(full, count))
    ]


def prompt_ids(model: KVPModel, item: Item) -> list[int]:
    """Return the token ids that are read."""
    del model
    ids: list[int] = item.extra["prompt"]
    return ids


@one_by_one
def measure(model: KVPModel, arm: Arm, item: Item) -> Row:
    """Return an item's mean negative log-likelihood in nats per token; ``perplexity`` is the exponential of a mean."""
    prompt, rest = item.extra["prompt"], item.extra["rest"]
    losses, ttft_ms = continuation_losses(model, arm, prompt, [rest])
    return row_of(float(losses[0].mean()), {}, ttft_ms, len(prompt))


def perplexity(values: np.ndarray) -> float:
    """Return exp of the mean."""
    return math.exp(values.mean())


def run(
    texts: list[str] | None = None,
    prompt_tokens: int = 384,
    continuation_tokens: int = 128,
    limit: int | None = 100,
    seed: int = 0,
) -> Run:
    """Perplexity of text after a prompt that the arm has read."""
    places = texts or [str(SAMPLE)]
    options = {"data": hashes(places), "prompt_tokens": prompt_tokens, "continuation_tokens": continuation_tokens}

    def windows(model: KVPModel) -> list[Item]:
        check_window(model, prompt_tokens + continuation_tokens - 1)
        return items(places, model.text_tokenizer, prompt_tokens, continuation_tokens, seed, limit)

    return Run("perplexity", windows, measure, prompt_ids, limit, seed, options, perplexity)


PLACE = Place(
    "perplexity",
    {"texts": "wikitext2_test_raw.txt.gz"},
    {"prompt_tokens": 384, "continuation_tokens": 128, "limit": 60},
)
TASK = Task("perplexity", "perplexity", run, places=(PLACE,), less_is_better=True, difference_unit="nats per token")
