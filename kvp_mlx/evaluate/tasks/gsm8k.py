"""GSM8K: word problems after solved examples."""

import re
from collections.abc import Sequence
from typing import Any

from ..generation import Generation, measure_generation
from ..records import TEXT, after_examples, hashes, read_records
from ..task import Item, Place, Run, Scores, Task

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def items(places: Sequence[str], shots: int, seed: int) -> list[Item]:
    """Return word problems after solved examples, as lm-evaluation-harness writes them."""
    examples, asked = after_examples(read_records(places, {"question": TEXT, "answer": TEXT}), shots, seed)
    solved = "".join(f"{question(record)} {record['answer']}\n\n" for record in examples)
    return [
        Item(str(number), solved + question(record), [record["answer"].split("####")[-1]])
        for number, record in enumerate(asked)
    ]


def question(record: dict[str, Any]) -> str:
    """Return a problem, with room for its solution."""
    return f"Question: {record['question']}\nAnswer:"


def score(item: Item, text: str) -> Scores:
    """Whether the number after the last ``####`` (or the last number there is) is the solution's."""
    return {"exact_match": float(last_number(text.rsplit("####", maxsplit=1)[-1]) == last_number(item.answers[0]))}


def last_number(text: str) -> float | None:
    """Return the last number in a text, thousands separators dropped."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


ANSWER = Generation(score, stop=("Question:", "</s>", "<|im_end|>"), max_tokens=256)


def run(data: list[str], shots: int = 5, max_tokens: int | None = None, limit: int | None = None, seed: int = 0) -> Run:
    """GSM8K, word problems after solved examples: the right last number.

    Records have question and answer.
    """
    options = {"data": hashes(data), "shots": shots, "max_tokens": max_tokens}
    measure = measure_generation(ANSWER, max_tokens)
    return Run("gsm8k", lambda _: items(data, shots, seed), measure, ANSWER.encode, limit, seed, options)


PLACE = Place("gsm8k", {"data": "gsm8k_test.jsonl.gz"}, {"shots": 1, "limit": 500}, is_matched=False)
TASK = Task("gsm8k", "right number", run, places=(PLACE,))
