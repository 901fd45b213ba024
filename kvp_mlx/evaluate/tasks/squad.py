"""SQuAD: a passage and a question about it."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..generation import Generation, measure_generation
from ..records import TEXT, TEXTS, hashes, name_of, read_records, shuffled
from ..task import Item, Place, Run, Scores, Task

EXAMPLE = {
    "context": "The lighthouse at Skerryvore was built by Alan Stevenson between 1838 and 1844.",
    "question": "Who built the lighthouse?",
    "answer": "Alan Stevenson",
}
ARTICLES = re.compile(r"\b(a|an|the)\b")


def items(places: Sequence[str], seed: int) -> list[Item]:
    """Return questions about a passage that stands before them, after one solved example of our own.

    Without it small models answer with an empty line or in sentences, and the full model's F1 says little.
    """
    records = shuffled(read_records(places, {"context": TEXT, "question": TEXT, "answers": TEXTS}), seed)
    return [
        Item(name_of(record, number), solved_and(record), record["answers"])
        for number, record in enumerate(records)
        if record["answers"]
    ]


def solved_and(record: dict[str, Any]) -> str:
    """Return a record's prompt: the solved example, then its passage and question."""
    return f"{question(EXAMPLE)} {EXAMPLE['answer']}\n\n{question(record)}"


def question(record: dict[str, Any]) -> str:
    """Return a passage and the question about it."""
    asked = f"Question: {record['question']}\nAnswer:"
    return f"{record['context']}\n\nAnswer with a few words of the text above.\n{asked}"


def score(item: Item, text: str) -> Scores:
    """F1 and exact match of SQuAD's own script."""
    return {"f1": f1(text, item.answers), "exact_match": exact_match(text, item.answers)}


def f1(answer: str, accepted: Sequence[str]) -> float:
    """Return SQuAD's F1 of shared words, the best over the accepted answers."""
    return max(_f1(words_of(answer), words_of(other)) for other in accepted)


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """Return SQuAD's exact match, the best over the accepted answers."""
    return max(float(words_of(answer) == words_of(other)) for other in accepted)


def words_of(text: str) -> list[str]:
    """Return the words that SQuAD's own script compares: no case, punctuation or articles."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return ARTICLES.sub(" ", plain).split()


def _f1(words: list[str], others: list[str]) -> float:
    shared = sum((Counter(words) & Counter(others)).values())
    if not words or not others:
        return float(words == others)
    return 2 * shared / (len(words) + len(others))


ANSWER = Generation(score, stop=("\n",), max_tokens=32)


def run(data: list[str], max_tokens: int | None = None, limit: int | None = None, seed: int = 0) -> Run:
    """SQuAD, a passage and a question about it: F1 and exact match.

    Records have context, question and answers.
    """
    measure, options = measure_generation(ANSWER, max_tokens), {"data": hashes(data), "max_tokens": max_tokens}
    return Run("squad", lambda _: items(data, seed), measure, ANSWER.encode, limit, seed, options)


PLACE = Place("squad", {"data": "squad_dev_half.jsonl.gz"}, {"limit": 500}, dials=("kvp-0-0", "kvp-0-0.5"))
TASK = Task("squad", "F1", run, places=(PLACE,))
