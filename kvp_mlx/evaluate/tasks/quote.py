"""A marked sentence of a long text, to be repeated."""

import difflib
import random
from collections.abc import Sequence

from ..generation import Generation
from ..passages import DEPTHS, LENGTHS, Passages, grid_run
from ..task import Item, Place, Run, Scores, Task

MARKED_WORDS = (6, 20)


def ask(passages: Passages, length: int, depth: float, rng: random.Random) -> tuple[str, str]:
    """Return a passage with a marked sentence and the request to repeat it, and the sentence."""
    sentences = passages(length, rng, is_quotable)
    fitting = [i for i, sentence in enumerate(sentences) if is_quotable(sentence)]
    place = min(fitting, key=lambda i: abs(i - depth * (len(sentences) - 1)))
    marked, sentences[place] = sentences[place], f"[[ {sentences[place]} ]]"
    return f"{' '.join(sentences)}\n\nRepeat the sentence between [[ and ]] word for word.", marked


def is_quotable(sentence: str) -> bool:
    """Return whether a sentence is neither too short nor too long to be asked for."""
    return MARKED_WORDS[0] <= len(sentence.split()) <= MARKED_WORDS[1]


def score(item: Item, text: str) -> Scores:
    """Whether the sentence appears letter by letter, and how alike the closest reading is (0 to 1)."""
    answer, wanted = " ".join(text.split()), item.answers[0]
    similar = difflib.SequenceMatcher(None, wanted, answer[: len(wanted) + 40], autojunk=False).ratio()
    return {"verbatim": float(wanted in answer), "similarity": similar}


ANSWER = Generation(score, stop=(), max_tokens=48, chat=True)


def run(
    texts: list[str] | None = None,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    limit: int | None = 60,
    seed: int = 0,
) -> Run:
    """A marked sentence of a long text, to be repeated word for word, by length and depth."""
    return grid_run("quote", ask, ANSWER, texts, lengths, depths, limit, seed)


TASK = Task("quote", "verbatim", run, places=(Place("quote", options={"limit": 30}, is_matched=False),))
