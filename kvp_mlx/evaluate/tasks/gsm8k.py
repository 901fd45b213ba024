"""GSM8K: word problems, after solved examples or in a chat."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..generation import Generation, measure_generation
from ..records import TEXT, Kind, after_examples, hashes, read_records
from ..task import Item, Place, Run, Scores, Task

NUMBER = re.compile(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?")
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
"""How models that were trained on sums mark the solution in a chat; braces of units may stand in it."""
SPACING = re.compile(r"\\[,!]|\{,\}|(?<=[A-Za-z}])\^(?:\{\d+\}|\d)")
"""LaTeX's, around separators of thousands; and the powers of units."""


SOLVED: Kind = ("a text with a number at its end", lambda value: isinstance(value, str) and ends_in_number(value))


def ends_in_number(text: str) -> bool:
    """Return whether a solution tells its number, after ``####`` where it has that."""
    return last_number(text.rsplit("####", maxsplit=1)[-1]) is not None


def items(places: Sequence[str], shots: int, seed: int) -> list[Item]:
    """Return word problems after solved examples, as lm-evaluation-harness writes them.

    Raises:
        InputError: records of another task.
    """
    examples, asked = after_examples(read_records(places, {"question": TEXT, "answer": SOLVED}), shots, seed)
    solved = "".join(f"{question(record)} {record['answer']}\n\n" for record in examples)
    return [
        Item(str(number), solved + question(record), [record["answer"].split("####")[-1]])
        for number, record in enumerate(asked)
    ]


def question(record: dict[str, Any]) -> str:
    """Return a problem, with room for its solution."""
    return f"Question: {record['question']}\nAnswer:"


def score(item: Item, text: str) -> Scores:
    """Whether the answer's solution is the problem's."""
    return {"exact_match": float(solution(text) == last_number(item.answers[0]))}


def solution(text: str) -> float | None:
    """Return the number that an answer gives: the last that is boxed, else the last after ``####`` or of all."""
    boxed = [number for box in BOXED.findall(text) if (number := last_number(SPACING.sub("", box))) is not None]
    return boxed[-1] if boxed else last_number(text.rsplit("####", maxsplit=1)[-1])


def last_number(text: str) -> float | None:
    """Return the last number in a text, thousands separators dropped."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


ANSWER = Generation(score, stop=("Question:", "</s>", "<|im_end|>"), max_tokens=256)
CHAT_MAX_TOKENS = 512
"""Of a solution in steps, as it is written unless solved examples show another form."""


def run(
    data: list[str],
    shots: int = 5,
    chat: bool = False,
    max_tokens: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Run:
    """GSM8K, word problems: the right number, in a box, after #### or the last.

    Records have question and answer.
    """
    answer = replace(ANSWER, chat=True, max_tokens=CHAT_MAX_TOKENS) if chat else ANSWER
    options = {"data": hashes(data), "shots": shots, "max_tokens": max_tokens} | ({"chat": True} if chat else {})
    measure = measure_generation(answer, max_tokens)
    return Run("gsm8k", lambda _: items(data, shots, seed), measure, answer.encode, limit, seed, options)


PLACE = Place("gsm8k", {"data": "gsm8k_test.jsonl.gz"}, {"shots": 0, "chat": True, "limit": 500}, is_matched=False)
TASK = Task("gsm8k", "right number", run, places=(PLACE,))
