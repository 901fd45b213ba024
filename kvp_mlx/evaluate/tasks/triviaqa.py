"""TriviaQA without passages, in the template of the paper (arXiv 2410.08391)."""

import string
from collections.abc import Sequence
from typing import Any

from ..generation import Generation, measure_generation
from ..records import TEXT, TEXTS, after_examples, hashes, read_records
from ..task import Item, Place, Run, Scores, Task


def items(places: Sequence[str], shots: int, seed: int) -> list[Item]:
    """Return the questions that have an answer, after solved examples that are the first of the shuffled data."""
    records = read_records(places, {"question": TEXT, "answers": TEXTS})
    examples, asked = after_examples([record for record in records if record["answers"]], shots, seed)
    solved = "".join(f"{question(record)} {record['answers'][0]}\n" for record in examples)
    return [Item(str(number), solved + question(record), record["answers"]) for number, record in enumerate(asked)]


def question(record: dict[str, Any]) -> str:
    """Return a question in the paper's template."""
    return f"Question: {record['question']}\nAnswer:"


def score(item: Item, text: str) -> Scores:
    """Exact match with any alias, case and punctuation aside."""
    return {"exact_match": exact_match(text, item.answers)}


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """Return whether a bare answer is one of the accepted."""
    return float(bare(answer) in map(bare, accepted))


def bare(text: str) -> str:
    """Return text without case, punctuation and outer white space, as the template compares it."""
    return text.strip().lower().translate(str.maketrans("", "", string.punctuation))


ANSWER = Generation(score, stop=("\n", ".", ","), max_tokens=32)


def run(data: list[str], shots: int = 1, max_tokens: int | None = None, limit: int | None = None, seed: int = 0) -> Run:
    """TriviaQA without passages, in the paper's template: exact match.

    Records have question and answers.
    """
    options = {"data": hashes(data), "shots": shots, "max_tokens": max_tokens}
    measure = measure_generation(ANSWER, max_tokens)
    return Run("triviaqa", lambda _: items(data, shots, seed), measure, ANSWER.encode, limit, seed, options)


PLACE = Place("triviaqa", {"data": "triviaqa_validation.jsonl.gz"}, {"shots": 1, "limit": 500})
TASK = Task("triviaqa", "exact match", run, places=(PLACE,))
