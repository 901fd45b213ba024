"""A number hidden in a long text."""

import random
from collections.abc import Sequence

from ..generation import Generation
from ..passages import DEPTHS, LENGTHS, Passages, grid_run
from ..task import Item, Place, Run, Scores, Task

CITIES = ("Aberdeen", "Bergen", "Cadiz", "Dakar", "Esbjerg", "Faro", "Genoa", "Havana", "Izmir", "Jeddah")


def ask(passages: Passages, length: int, depth: float, rng: random.Random) -> tuple[str, str]:
    """Return a passage with a number hidden in it and the question for it, and the number."""
    city, secret = rng.choice(CITIES), str(rng.randrange(10_000, 100_000))
    sentences = passages(length, rng, bool)
    sentences.insert(round(depth * len(sentences)), f"The secret number of {city} is {secret}.")
    prompt = f"{' '.join(sentences)}\n\nWhat is the secret number of {city}? Answer with the number."
    return prompt, secret


def score(item: Item, text: str) -> Scores:
    """Whether the hidden number appears."""
    return {"found": float(item.answers[0] in text)}


ANSWER = Generation(score, stop=(), max_tokens=24, chat=True)


def run(
    texts: list[str] | None = None,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    limit: int | None = 60,
    seed: int = 0,
) -> Run:
    """A number hidden in a long text: found or not, by length and depth."""
    return grid_run("needle", ask, ANSWER, texts, lengths, depths, limit, seed)


TASK = Task("needle", "found", run, places=(Place("needle", options={"limit": 60}),))
