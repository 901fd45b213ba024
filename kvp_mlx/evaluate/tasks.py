"""The tasks: what is asked, and how an answer is scored. The loop over items and arms is in ``loop``.

Each ``*_items`` function turns data into items. Each item's ``prompt`` is text, given as it stands (``chat`` False)
or as a user's message through the chat template.
"""

import difflib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import InputError
from ..train.text import data_files, token_windows
from .records import NUMBER, TEXT, TEXTS, read_records, shuffled
from .scores import exact_match, last_number, squad_exact, squad_f1

Scores = dict[str, float]
SENTENCE = re.compile(r"(?<=[.!?])\s+")
CITIES = ("Aberdeen", "Bergen", "Cadiz", "Dakar", "Esbjerg", "Faro", "Genoa", "Havana", "Izmir", "Jeddah")
SQUAD_EXAMPLE = {
    "context": "The lighthouse at Skerryvore was built by Alan Stevenson between 1838 and 1844.",
    "question": "Who built the lighthouse?",
    "answer": "Alan Stevenson",
}
MARKED_WORDS = (6, 20)
PASSAGE_TRIES = 50
TEMPLATE_TOKENS = 60
"""Room for the question and the chat template around a passage of a given length."""


@dataclass
class Item:
    """One question.

    Attributes:
        id: names it in the log.
        prompt: what the model reads.
        answers: what is accepted, or a task's own reference.
        extra: what the task needs besides.
    """

    id: str
    prompt: str
    answers: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """How answers of a task are generated and scored; the first score is the task's."""

    score: Callable[[Item, str], Scores]
    stop: tuple[str, ...]
    max_tokens: int
    chat: bool


def triviaqa_items(places: Sequence[str], shots: int, seed: int) -> list[Item]:
    """Return the paper's TriviaQA, after solved examples that are the first of the shuffled data."""
    records = read_records(places, {"question": TEXT, "answers": TEXTS})
    records = _after_shots([record for record in records if record["answers"]], shots, seed)
    solved = "".join(f"{trivia_question(record)} {record['answers'][0]}\n" for record in records[:shots])
    return [
        Item(str(number), solved + trivia_question(record), record["answers"])
        for number, record in enumerate(records[shots:])
    ]


def trivia_question(record: dict[str, Any]) -> str:
    """Return a question in the paper's template (arXiv 2410.08391)."""
    return f"Question: {record['question']}\nAnswer:"


def _after_shots(records: list[Any], shots: int, seed: int) -> list[Any]:
    if len(records) <= shots:
        raise InputError(f"{len(records)} records are no more than the {shots} examples; give more --data.")
    return shuffled(records, seed)


def score_triviaqa(item: Item, text: str) -> Scores:
    """Exact match with any alias, case and punctuation aside."""
    return {"exact_match": exact_match(text, item.answers)}


def squad_items(places: Sequence[str], seed: int) -> list[Item]:
    """Return questions about a passage that stands before them, after one solved example of our own.

    Without it small models answer with an empty line or in sentences, and the full model's F1 says little.
    """
    records = shuffled(read_records(places, {"context": TEXT, "question": TEXT, "answers": TEXTS}), seed)
    solved = f"{squad_question(SQUAD_EXAMPLE)} {SQUAD_EXAMPLE['answer']}\n\n"
    return [
        Item(
            str(record.get("id", number)),
            f"{solved}{squad_question(record)}",
            record["answers"],
        )
        for number, record in enumerate(records)
        if record["answers"]
    ]


def squad_question(record: dict[str, Any]) -> str:
    """Return a passage and the question about it."""
    return f"{record['context']}\n\nAnswer with a few words of the text above.\n{trivia_question(record)}"


def score_squad(item: Item, text: str) -> Scores:
    """F1 and exact match of SQuAD's own script."""
    return {"f1": squad_f1(text, item.answers), "exact_match": squad_exact(text, item.answers)}


def gsm8k_items(places: Sequence[str], shots: int, seed: int) -> list[Item]:
    """Return word problems after solved examples, as lm-evaluation-harness writes them."""
    records = _after_shots(read_records(places, {"question": TEXT, "answer": TEXT}), shots, seed)
    solved = "".join(f"Question: {record['question']}\nAnswer: {record['answer']}\n\n" for record in records[:shots])
    return [
        Item(str(number), f"{solved}Question: {record['question']}\nAnswer:", [record["answer"].split("####")[-1]])
        for number, record in enumerate(records[shots:])
    ]


def score_gsm8k(item: Item, text: str) -> Scores:
    """Whether the number after the last ``####`` (or the last number there is) is the solution's."""
    return {"exact_match": float(last_number(text.rsplit("####", maxsplit=1)[-1]) == last_number(item.answers[0]))}


def choice_items(places: Sequence[str], seed: int) -> list[Item]:
    """Return multiple-choice questions: ``query``, ``choices``, ``gold``; ARC and PIQA.

    Raises:
        InputError: a ``gold`` that is the place of no choice.
    """
    records = shuffled(read_records(places, {"query": TEXT, "choices": TEXTS, "gold": NUMBER}), seed)
    if wrong := [record for record in records if not 0 <= record["gold"] < len(record["choices"])]:
        raise InputError(
            f"'gold' is {wrong[0]['gold']} where there are {len(wrong[0]['choices'])} choices; check --data."
        )
    return [
        Item(
            str(number),
            f"{record['query'].strip()}\nAnswer:",
            [f" {choice}" for choice in record["choices"]],
            {"gold": record["gold"]},
        )
        for number, record in enumerate(records)
    ]


def chat_items(places: Sequence[str], seed: int) -> list[Item]:
    """Return user messages: the first of ``turns``, ``messages``, or ``question``."""
    items = []
    for number, record in enumerate(shuffled(read_records(places, {}), seed)):
        messages = [record["question"]] if "question" in record else record.get("turns", record.get("messages"))
        first = messages[0] if isinstance(messages, list) and messages else None
        text = first.get("content") if isinstance(first, dict) else first
        if not isinstance(text, str):
            raise InputError("a record needs 'turns', 'messages' or 'question'; check --data.")
        items.append(Item(str(number), text))
    return items


def needle_items(
    texts: Sequence[str],
    tokenizer: TokenizerWrapper,
    lengths: Sequence[int],
    depths: Sequence[float],
    seed: int,
    count: int,
) -> list[Item]:
    """Return ``count`` passages with a number hidden in them, cycling through the grid of lengths and depths."""
    items, cells = [], [(length, depth) for length in lengths for depth in depths]
    for number in range(count):
        (length, depth), rng = cells[number % len(cells)], random.Random(f"{seed} {number}")
        city, secret = rng.choice(CITIES), str(rng.randrange(10_000, 100_000))
        hidden = f"The secret number of {city} is {secret}."
        passage = _passage(texts, tokenizer, length - TEMPLATE_TOKENS, rng)
        passage.insert(round(depth * len(passage)), hidden)
        prompt = f"{' '.join(passage)}\n\nWhat is the secret number of {city}? Answer with the number."
        items.append(Item(str(number), prompt, [secret], {"length": length, "depth": depth}))
    return items


def score_needle(item: Item, text: str) -> Scores:
    """Whether the hidden number appears."""
    return {"found": float(item.answers[0] in text)}


def quote_items(
    texts: Sequence[str],
    tokenizer: TokenizerWrapper,
    lengths: Sequence[int],
    depths: Sequence[float],
    seed: int,
    count: int,
) -> list[Item]:
    """Return ``count`` passages with a marked sentence to be repeated, cycling through lengths and depths."""
    items, cells = [], [(length, depth) for length in lengths for depth in depths]
    for number in range(count):
        (length, depth), rng = cells[number % len(cells)], random.Random(f"{seed} {number}")
        passage = _passage(texts, tokenizer, length - TEMPLATE_TOKENS, rng, quotable)
        fitting = [i for i, sentence in enumerate(passage) if quotable(sentence)]
        marked = min(fitting, key=lambda i: abs(i - depth * (len(passage) - 1)))
        sentence, passage[marked] = passage[marked], f"[[ {passage[marked]} ]]"
        prompt = f"{' '.join(passage)}\n\nRepeat the sentence between [[ and ]] word for word."
        items.append(Item(str(number), prompt, [sentence], {"length": length, "depth": depth}))
    return items


def score_quote(item: Item, text: str) -> Scores:
    """Whether the sentence appears letter by letter, and how alike the closest reading is (0 to 1)."""
    said, wanted = " ".join(text.split()), item.answers[0]
    similar = difflib.SequenceMatcher(None, wanted, said[: len(wanted) + 40], autojunk=False).ratio()
    return {"verbatim": float(wanted in said), "similarity": similar}


def quotable(sentence: str) -> bool:
    """Return whether a sentence is neither too short nor too long to be asked for."""
    return MARKED_WORDS[0] <= len(sentence.split()) <= MARKED_WORDS[1]


def _passage(
    texts: Sequence[str],
    tokenizer: TokenizerWrapper,
    tokens: int,
    rng: random.Random,
    wanted: Callable[[str], bool] = bool,
) -> list[str]:
    """Return consecutive sentences of up to ``tokens`` tokens in all, one ``wanted``, from a random place.

    Raises:
        InputError: many random places held no such passage.
    """
    if tokens < 1:
        raise InputError(f"prompts of {tokens + TEMPLATE_TOKENS} tokens leave no room; more than {TEMPLATE_TOKENS}.")
    long_enough = [text for text in texts if len(text) > 6 * tokens] or [max(texts, key=len)]
    for _ in range(PASSAGE_TRIES):
        text = rng.choice(long_enough)
        start = rng.randrange(max(1, len(text) - 6 * tokens))
        sentences, used = [], 0
        for sentence in SENTENCE.split(" ".join(text[start : start + 8 * tokens].split()))[1:]:
            used += len(tokenizer.encode(f" {sentence}", add_special_tokens=False))
            if used > tokens:
                break
            sentences.append(sentence)
        if any(map(wanted, sentences)):
            return sentences
    raise InputError(f"the data holds no passage of {tokens} tokens in sentences fit for this; give other --data.")


GENERATIONS = {
    "triviaqa": Generation(score_triviaqa, ("\n", ".", ","), 32, chat=False),
    "squad": Generation(score_squad, ("\n",), 32, chat=False),
    "gsm8k": Generation(score_gsm8k, ("Question:", "</s>", "<|im_end|>"), 256, chat=False),
    "needle": Generation(score_needle, (), 24, chat=True),
    "quote": Generation(score_quote, (), 48, chat=True),
}
HUMANEVAL_STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ")
HUMANEVAL_MAX_TOKENS = 256


def humaneval_items(places: Sequence[str]) -> list[Item]:
    """Return the problems, in their own order."""
    fields = dict.fromkeys(("task_id", "prompt", "test", "entry_point"), TEXT)
    return [
        Item(record["task_id"], record["prompt"], extra={name: record[name] for name in fields})
        for record in read_records(places, fields)
    ]


def humaneval_program(item: Item, completion: str) -> str:
    """Return the program that fails unless the completion is right."""
    return f"{item.prompt}{completion}\n{item.extra['test']}\ncheck({item.extra['entry_point']})\n"


def window_items(
    places: Sequence[str], tokenizer: TokenizerWrapper, prompt: int, rest: int, seed: int, count: int | None
) -> list[Item]:
    """Return stretches of text as token ids: ``prompt`` tokens to read, ``rest`` tokens to score after them."""
    windows = token_windows(data_files(places), tokenizer, prompt + rest, seed)
    full = (window for window in windows if len(window) == prompt + rest)
    return [
        Item(str(number), "", extra={"prompt": window[:prompt], "rest": window[prompt:]})
        for number, window in enumerate(islice(full, count))
    ]
