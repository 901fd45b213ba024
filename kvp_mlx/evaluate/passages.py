"""Tasks on passages of text, by prompt length and by depth in the passage."""

import random
import re
from collections.abc import Callable, Sequence
from functools import partial

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..bundle.loading import KVPModel
from ..engine.prompt import check_window
from ..errors import InputError
from .generation import Generation, measure_generation
from .records import SAMPLE, hashes, read_texts
from .task import Item, Run

LENGTHS = (256, 512, 1024)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SENTENCE = re.compile(r"(?<=[.!?])\s+")
PASSAGE_TRIES = 50
TEMPLATE_TOKENS = 60
"""Room for the question and the chat template around a passage of a given length."""

Passages = Callable[[int, random.Random, Callable[[str], bool]], list[str]]
"""From a prompt's length, random numbers and which sentence is wanted to consecutive sentences with such a one."""
Ask = Callable[[Passages, int, float, random.Random], tuple[str, str]]
"""From passages, a prompt's length, a depth and random numbers to a prompt and the answer."""


def grid_run(
    task: str,
    ask: Ask,
    answer: Generation,
    texts: list[str] | None,
    lengths: Sequence[int],
    depths: Sequence[float],
    limit: int | None,
    seed: int,
) -> Run:
    """Return a run whose items cycle through lengths and depths, once unless ``limit`` says otherwise.

    Raises:
        InputError: a depth outside 0 to 1.
    """
    if bad := [depth for depth in depths if not 0 <= depth <= 1]:
        raise InputError(f"--depths lie between 0 and 1, not at {bad[0]:g}.")
    places, count = texts or [str(SAMPLE)], limit or len(lengths) * len(depths)
    options = {"data": hashes(places), "prompt_tokens": list(lengths), "depths": list(depths)}

    def items(model: KVPModel) -> list[Item]:
        for length in lengths:
            check_window(model, length, 1)
        return grid_items(ask, read_texts(places), model.text_tokenizer, lengths, depths, seed, count)

    return Run(task, items, measure_generation(answer), answer.encode, count, seed, options, has_grid=True)


def grid_items(
    ask: Ask,
    texts: Sequence[str],
    tokenizer: TokenizerWrapper,
    lengths: Sequence[int],
    depths: Sequence[float],
    seed: int,
    count: int,
) -> list[Item]:
    """Return ``count`` items, cycling through the grid of lengths and depths."""
    items, cells = [], [(length, depth) for length in lengths for depth in depths]
    passages = partial(passage, texts, tokenizer)
    for number in range(count):
        length, depth = cells[number % len(cells)]
        prompt, answer = ask(passages, length, depth, random.Random(f"{seed} {number}"))
        items.append(Item(str(number), prompt, [answer], {"length": length, "depth": depth}))
    return items


def passage(
    texts: Sequence[str],
    tokenizer: TokenizerWrapper,
    length: int,
    rng: random.Random,
    is_wanted: Callable[[str], bool] = bool,
) -> list[str]:
    """Return consecutive sentences from a random place that fill a prompt of ``length`` tokens, one of them wanted.

    Raises:
        InputError: many random places held no such passage.
    """
    tokens = length - TEMPLATE_TOKENS
    if tokens < 1:
        raise InputError(f"--prompt-tokens {length} leaves no room for a passage; give more than {TEMPLATE_TOKENS}.")
    long_enough = [text for text in texts if len(text) > 6 * tokens] or [max(texts, key=len)]
    if len(long_enough[0]) < tokens:
        raise InputError(
            f"the longest text of the data is far below {tokens:,} tokens; give --data or shorter lengths."
        )
    for _ in range(PASSAGE_TRIES):
        text = rng.choice(long_enough)
        start = rng.randrange(max(1, len(text) - 6 * tokens))
        sentences, used = [], 0
        for sentence in SENTENCE.split(" ".join(text[start : start + 8 * tokens].split()))[1:]:
            used += len(tokenizer.encode(f" {sentence}", add_special_tokens=False))
            if used > tokens:
                break
            sentences.append(sentence)
        if any(map(is_wanted, sentences)):
            return sentences
    raise InputError(f"the data holds no passage of {tokens} tokens in sentences fit for this; give other --data.")
