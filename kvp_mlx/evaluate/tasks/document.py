"""Questions about long documents: SQuAD's articles, of which many paragraphs stand before the question."""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...bundle.loading import KVPModel
from ...engine.prompt import check_window
from ..generation import measure_generation
from ..records import TEXT, TEXTS, hashes, name_of, read_records, shuffled
from ..task import Item, Place, Run, Task
from .squad import ANSWER, solved_and

LENGTHS = (2000, 3000, 4000)
FIELDS = {"title": TEXT, "context": TEXT, "question": TEXT, "answers": TEXTS}


def items(places: Sequence[str], tokenizer: TokenizerWrapper, lengths: Sequence[int], seed: int) -> Iterator[Item]:
    """Yield questions about documents, cycling through prompt lengths; articles that cannot fill one are left out."""
    records = read_records(places, FIELDS)
    size = partial(tokens_of, tokenizer)
    articles: dict[str, dict[str, int]] = {}  # paragraphs in order, with their tokens
    for record in records:
        paragraphs = articles.setdefault(record["title"], {})
        if record["context"] not in paragraphs:
            paragraphs[record["context"]] = size(f"{record['context']}\n\n")
    for number, record in enumerate(shuffled(records, seed)):
        length, paragraphs = lengths[number % len(lengths)], articles[record["title"]]
        room = length - size(solved_and(record | {"context": ""}))
        if record["answers"] and paragraphs[record["context"]] <= room < sum(paragraphs.values()):
            document = document_around(record["context"], paragraphs, room, random.Random(f"{seed} {number}"))
            name = name_of(record, number)
            yield Item(name, solved_and(record | {"context": document}), record["answers"], {"length": length})


def tokens_of(tokenizer: TokenizerWrapper, text: str) -> int:
    """Return how many tokens a text takes inside another."""
    return len(tokenizer.encode(text, add_special_tokens=False))


def document_around(paragraph: str, paragraphs: dict[str, int], room: int, rng: random.Random) -> str:
    """Return consecutive paragraphs that fill ``room`` tokens, the given one anywhere among them.

    Args:
        paragraph: the one that is asked about; it fits.
        paragraphs: the article's, in order, each with its tokens.
        room: tokens at most.
        rng: draws how much of the room lies before.
    """
    texts, sizes = list(paragraphs), list(paragraphs.values())
    first = last = texts.index(paragraph)
    left = room - sizes[first]
    before = left - rng.randint(0, left)  # kept free for what follows
    while first > 0 and sizes[first - 1] <= left - before:
        first, left = first - 1, left - sizes[first - 1]
    while last + 1 < len(texts) and sizes[last + 1] <= left:
        last, left = last + 1, left - sizes[last + 1]
    while first > 0 and sizes[first - 1] <= left:
        first, left = first - 1, left - sizes[first - 1]
    return "\n\n".join(texts[first : last + 1])


def run(
    data: list[str],
    lengths: Sequence[int] = LENGTHS,
    max_tokens: int | None = None,
    limit: int | None = 100,
    seed: int = 0,
) -> Run:
    """SQuAD's articles, many paragraphs and a question about one: F1 and exact match.

    Records have title, context, question and answers. Contexts of one title are joined, as many as a prompt takes.
    """

    def found(model: KVPModel) -> list[Item]:
        check_window(model, max(lengths))
        return list(islice(items(data, model.text_tokenizer, lengths, seed), limit))

    options = {"data": hashes(data), "prompt_tokens": list(lengths), "max_tokens": max_tokens}
    return Run("document", found, measure_generation(ANSWER, max_tokens), ANSWER.encode, limit, seed, options)


PLACE = Place("document", {"data": "squad_dev_half.jsonl.gz"}, is_default=False)
TASK = Task("document", "F1", run, places=(PLACE,))
