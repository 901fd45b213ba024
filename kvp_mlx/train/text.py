"""Text files as token windows: ``.txt``, ``.md`` and ``.jsonl``, plain or gzipped, one file or a folder of them."""

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import InputError

SUFFIXES = (".txt", ".md", ".txt.gz", ".md.gz", ".jsonl", ".jsonl.gz")
PIECE_CHARACTERS_PER_TOKEN = 6  # generous, so that most pieces fill a window
MIN_WINDOW_TOKENS = 32


def data_files(places: list[Path]) -> list[Path]:
    """Expand files and folders into the data files they hold.

    Raises:
        InputError: nothing there, or a file of another type.
    """
    files = []
    for place in places:
        if place.is_dir():
            files += sorted(path for path in place.iterdir() if path.name.endswith(SUFFIXES))
        elif not place.exists():
            raise InputError(f"data file {place} does not exist.")
        elif not place.name.endswith(SUFFIXES):
            raise InputError(f"data file {place} is none of {', '.join(SUFFIXES)}.")
        else:
            files.append(place)
    if not files:
        raise InputError(f"no {', '.join(SUFFIXES)} files in {', '.join(map(str, places))}.")
    return files


def read_documents(path: Path, tokenizer: TokenizerWrapper) -> Iterator[str]:
    """Yield the documents of one file.

    A text file is one document. A line of a JSONL file is one, either its ``text`` or its ``messages``
    written out by the tokeniser's chat template.

    Raises:
        InputError: not UTF-8, not gzip, not JSON, or a line with neither field.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            if not path.name.removesuffix(".gz").endswith(".jsonl"):
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _document(json.loads(line), f"{path}, line {number}", tokenizer)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first.") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: not JSON ({error.msg}).") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error


def _document(record: Any, where: str, tokenizer: TokenizerWrapper) -> str:
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"]
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        try:
            return tokenizer.apply_chat_template(record["messages"], tokenize=False)
        except Exception as error:  # whatever the model's own template makes of it
            raise InputError(f"{where}: the chat template does not take these messages ({error}).") from error
    raise InputError(f"{where}: a record needs 'text' (a string) or 'messages' (a list).")


def token_windows(files: list[Path], tokenizer: TokenizerWrapper, length: int, seed: int) -> Iterator[list[int]]:
    """Yield windows of up to ``length`` tokens, taking files in turn and pieces of a file in shuffled order.

    Every file weighs the same until it runs out, so that a library of books does not drown a few dialogues.

    Args:
        files: what ``data_files`` returned.
        tokenizer: the base's tokeniser.
        length: tokens per window; shorter pieces are kept from 32 tokens on.
        seed: of the shuffle.

    Raises:
        InputError: see ``read_documents``; also when no file holds a single window.
    """
    streams = [_pieces(path, tokenizer, length, random.Random(seed)) for path in files]
    found = False
    while streams:
        for stream in list(streams):
            piece = next(stream, None)
            if piece is None:
                streams.remove(stream)
                continue
            tokens = tokenizer.encode(piece)
            for start in range(0, len(tokens) - MIN_WINDOW_TOKENS + 1, length):
                found = True
                yield tokens[start : start + length]
    if not found:
        raise InputError(f"the data holds no text of {MIN_WINDOW_TOKENS} tokens or more; give more with --data.")


def _pieces(path: Path, tokenizer: TokenizerWrapper, length: int, rng: random.Random) -> Iterator[str]:
    size = length * PIECE_CHARACTERS_PER_TOKEN
    documents = list(read_documents(path, tokenizer))
    places = [(i, start) for i, document in enumerate(documents) for start in range(0, len(document), size)]
    rng.shuffle(places)
    for i, start in places:
        yield documents[i][start : start + size]
