"""Which text the maps were trained on, and how much of each source.

usage: texts.py BASE [--train-data FOLDER] [--stdlib FILE] [--qa FILE]

BASE is a base model's folder, of which tokenizer.json is read. Prints each source's tokens, their sum, how many
different ones occur, and the share of the text that the n most frequent leave out. Writes nothing.
"""

import argparse
import collections
import gzip
import json
import random
import re
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

PIECE = 20_000  # characters of a book that are read at a time


def records(path):
    """Yield the JSON object of each line of a .jsonl.gz."""
    with gzip.open(path, "rt") as lines:
        yield from map(json.loads, lines)


def texts(args):
    """Yield (source, text) of all that is trained on, the same at each call."""
    rng, folder = random.Random(1), args.train_data
    with gzip.open(folder / "wikitext2_valid_tokenised.txt.gz", "rt") as file:
        wiki = file.read()
    wiki = wiki.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".").replace("<unk>", "Marlow")
    wiki = re.sub(r"([(\[]) ", r"\1", re.sub(r" ([,.;:!?')\]])", r"\1", wiki))
    for article in re.split(r"\n (?== [^=]+ = \n)", wiki):
        yield "wiki", article
    for source, share in (("web", 1), ("openstax", 1), ("books", 0.16), ("peps", 0.25)):
        for record in records(folder / f"{source}.jsonl.gz"):
            text = record["text"]
            if source == "books":
                for _ in range(max(1, int(len(text) * share) // PIECE)):
                    start = rng.randrange(max(1, len(text) - PIECE))
                    yield source, text[start : start + PIECE]
            elif rng.random() < share:
                yield source, text
    for record in records(args.stdlib):
        if rng.random() < 0.55:
            yield "stdlib", record["text"]
    for record in records(args.qa):
        yield "qa", record["text"] if "text" in record else "\n".join(m["content"] for m in record["messages"])
    for record in records(folder / "dialogues_sgd.jsonl.gz"):
        if rng.random() < 0.08:
            yield "sgd", "\n".join(f"{m['role']}: {m['content']}" for m in record["messages"])
    for record in records(folder / "dolly_1k.jsonl.gz"):
        yield "dolly", "\n\n".join(m["content"] for m in record["messages"])


def parser_of(doc):
    """Return a parser of BASE and of the options that say where the text lies."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--train-data", type=Path, default="shared/data/train", help="the project's training data")
    parser.add_argument("--stdlib", default="stdlib.jsonl.gz", help="modules of Python's standard library, as `text`")
    parser.add_argument("--qa", default="qa.jsonl.gz", help="questions and answers, as `text` or `messages`")
    return parser


def main():
    """Count the tokens."""
    args = parser_of(__doc__).parse_args()
    tokenizer = Tokenizer.from_file(str(args.base / "tokenizer.json"))
    of_source, of_token = collections.Counter(), collections.Counter()
    begin = time.time()
    for source, text in texts(args):
        ids = tokenizer.encode(text).ids
        of_source[source] += len(ids)
        of_token.update(ids)
    total = sum(of_token.values())
    print(of_source, total, len(of_token), time.time() - begin)
    covered = np.cumsum(sorted(of_token.values(), reverse=True)) / total
    for n in (16384, 24576, 32768, 40960, 49152):
        if n < len(covered):
            print(n, 1 - covered[n])


if __name__ == "__main__":
    main()
