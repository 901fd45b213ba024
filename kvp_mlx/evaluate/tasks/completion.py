"""Code completion inside a file: the next line of Python."""

import contextlib
import difflib
import hashlib
import io
import random
import tokenize
from collections.abc import Iterator, Sequence
from itertools import islice

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...bundle.loading import KVPModel
from ...engine.prompt import check_window, encode_text
from ...errors import InputError
from ...files import expanded
from ..generation import Generation, measure_generation
from ..records import read_texts, shuffled
from ..task import Item, Place, Run, Scores, Task

LENGTHS = (1000, 2000, 3000)
LEAST_CHARACTERS_PER_TOKEN = 2
"""Lines with fewer before them are not tried; code has about 3.5."""
LINES_PER_FILE = 10


def read_sources(places: Sequence[str]) -> list[str]:
    """Return whole files of code: ``.py`` files, folders of them, or the ``text`` of JSONL records.

    Raises:
        InputError: nothing there, or unreadable.
    """
    texts: list[str] = []
    for place in places:
        path = expanded(place)
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.suffix == ".py" else []
        try:
            texts += [file.read_text(encoding="utf-8", errors="replace") for file in files] or read_texts([place])
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read ({error.strerror}); check --data.") from error
    return texts


def items(texts: Sequence[str], tokenizer: TokenizerWrapper, lengths: Sequence[int], seed: int) -> Iterator[Item]:
    """Yield what stands before a line, and the line: file after file, at drawn prompt lengths.

    A prompt is the whole lines among the last tokens before it. Files without a line so far down are passed over.
    """
    order, asked = shuffled(list(range(len(texts))), seed), set()
    for number in range(LINES_PER_FILE * len(texts)):
        file, rng = order[number % len(order)], random.Random(f"{seed} {number}")
        length = rng.choice(lengths)
        text = texts[file]
        starts = [start for start in code_lines(text) if start >= LEAST_CHARACTERS_PER_TOKEN * length]
        start = rng.choice(starts or [0])
        ids = encode_text(tokenizer, text[:start])
        if len(ids) < length or (file, start) in asked:
            continue
        asked.add((file, start))
        characters = len(tokenizer.decode(ids[-length:]))
        prompt = text[start - min(start, characters) : start].partition("\n")[2]
        if prompt.strip():
            yield Item(str(number), prompt, [text[start:].partition("\n")[0]], {"length": length})


def code_lines(text: str) -> list[int]:
    """Return where the lines begin that are worth predicting: a name stands on them.

    So blank lines, comments, docstrings and closing brackets are none.
    """
    numbers = set()
    with contextlib.suppress(tokenize.TokenError, SyntaxError):  # what comes before is code all the same
        for token in tokenize.generate_tokens(io.StringIO(text, newline="\n").readline):
            if token.type == tokenize.NAME:
                numbers.add(token.start[0])
    starts, start = [], 0
    for number, line in enumerate(text.split("\n"), 1):
        if number in numbers:
            starts.append(start)
        start += len(line) + 1
    return starts


def score(item: Item, text: str) -> Scores:
    """Whether the first line that is not blank is the file's own, and how alike both are (0 to 1).

    Spaces around them do not count.
    """
    line, wanted = text.strip().partition("\n")[0].rstrip(), item.answers[0].strip()
    similarity = difflib.SequenceMatcher(None, wanted, line, autojunk=False).ratio()
    return {"exact_match": float(line == wanted), "edit_similarity": similarity}


ANSWER = Generation(score, stop=(), max_tokens=48)


def run(sources: list[str], lengths: Sequence[int] = LENGTHS, limit: int | None = 200, seed: int = 0) -> Run:
    """Code completion inside a file: the next line, exact match and edit similarity.

    Prompts are what stands before a line of a Python file, as many tokens of it as asked for.
    """
    texts = read_sources(sources)
    digest = hashlib.sha256("\0".join(texts).encode(errors="replace")).hexdigest()

    def found(model: KVPModel) -> list[Item]:
        check_window(model, max(lengths))
        return list(islice(items(texts, model.text_tokenizer, lengths, seed), limit))

    options = {"data": {"texts": digest}, "prompt_tokens": list(lengths)}
    return Run("completion", found, measure_generation(ANSWER), ANSWER.encode, limit, seed, options)


PLACE = Place("completion", {"sources": "python_library.jsonl.gz"}, is_default=False)
TASK = Task("completion", "exact match", run, places=(PLACE,))
