"""Text files as token windows: ``.txt``, ``.md`` and ``.jsonl``, plain or gzipped, one file or a folder of them."""

import glob
import gzip
import json
import random
import zlib
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..engine.prompt import render_text
from ..errors import InputError

HUB = "hub:"
SUFFIXES = (".txt", ".md", ".txt.gz", ".md.gz", ".jsonl", ".jsonl.gz")
PIECE_CHARACTERS_PER_TOKEN = 6  # generous, so that most pieces fill a window
MIN_WINDOW_TOKENS = 32
BUCKET_BATCHES = 16


def data_files(places: Iterable[str | Path]) -> list[Path]:
    """Expand files, folders, globs and Hub datasets into the data files they hold.

    Args:
        places: each a file, a folder, a pattern such as ``texts/*.txt``, or ``hub:owner/name``, a dataset whose
            text files are downloaded. A place that is named twice counts twice.

    Raises:
        InputError: nothing there, or a file of another type.
    """
    files = []
    for place in map(str, places):
        folder = _hub_dataset(place.removeprefix(HUB)) if place.startswith(HUB) else Path(place).expanduser()
        if folder.is_dir():
            found = sorted(path for path in folder.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())
        elif folder.exists():
            found = [folder]
        else:
            found = [Path(name) for name in sorted(glob.glob(str(folder), recursive=True))]
            if not found:
                raise InputError(f"data file {place} does not exist.")
        if not found:
            raise InputError(f"no {', '.join(SUFFIXES)} files in {place}.")
        files += found
    for path in files:
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"data file {path} is none of {', '.join(SUFFIXES)}.")
    return files


def _hub_dataset(name: str) -> Path:
    try:
        patterns = [f"*{suffix}" for suffix in SUFFIXES]
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"dataset {name} cannot be had ({type(error).__name__}); check name and network.") from error


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
            return render_text(tokenizer, record["messages"])
        except Exception as error:  # whatever the model's own template makes of it
            raise InputError(f"{where}: the chat template does not take these messages ({error}).") from error
    raise InputError(f"{where}: a record needs 'text' (a string) or 'messages' (a list).")


def token_windows(
    files: list[Path],
    tokenizer: TokenizerWrapper,
    length: int,
    seed: int,
    *,
    packed: bool = False,
    without: Collection[str] = (),
) -> Iterator[list[int]]:
    """Yield windows of up to ``length`` tokens, taking files in turn and pieces of a file in shuffled order.

    Every file weighs the same until it runs out, so that a library of books does not drown a few dialogues.

    Args:
        files: what ``data_files`` returned.
        tokenizer: the base's tokeniser.
        length: tokens per window; shorter pieces are kept from 32 tokens on.
        seed: of the shuffle.
        packed: fill every window, with the next piece of the same file after an end-of-text token.
        without: pieces of text to leave out, see ``full_pieces``.

    Raises:
        InputError: see ``read_documents``; also when no file holds a single window.
    """
    cut = pack if packed else cut_up
    streams = []
    for place, path in enumerate(files):
        pieces = _pieces(path, tokenizer, length, random.Random(f"{seed} {place}"))
        streams.append(cut((piece for piece in pieces if piece not in without), tokenizer, length))
    found = False
    while streams:
        for stream in list(streams):
            window = next(stream, None)
            if window is None:
                streams.remove(stream)
            else:
                found = True
                yield window
    if not found:
        raise InputError(f"the data holds no text of {MIN_WINDOW_TOKENS} tokens or more; give more with --data.")


def full_pieces(
    files: list[Path], tokenizer: TokenizerWrapper, length: int, seed: int
) -> Iterator[tuple[str, list[int]]]:
    """Yield pieces of text that fill a window, with the window, taking files in turn as ``token_windows`` does."""
    streams = [_pieces(path, tokenizer, length, random.Random(f"{seed} {place}")) for place, path in enumerate(files)]
    while streams:
        for stream in list(streams):
            full = ((piece, ids) for piece in stream if len(ids := tokenizer.encode(piece)) >= length)
            if (found := next(full, None)) is None:
                streams.remove(stream)
            else:
                yield found[0], found[1][:length]


def cut_up(pieces: Iterator[str], tokenizer: TokenizerWrapper, length: int) -> Iterator[list[int]]:
    """Yield each piece's tokens in windows of ``length``, the last one shorter (but not below 32 tokens)."""
    for piece in pieces:
        ids = tokenizer.encode(piece)
        for start in range(0, len(ids) - MIN_WINDOW_TOKENS + 1, length):
            yield ids[start : start + length]


def pack(pieces: Iterator[str], tokenizer: TokenizerWrapper, length: int) -> Iterator[list[int]]:
    """Yield windows of exactly ``length`` tokens, pieces one after another with an end-of-text token between."""
    ids: list[int] = []
    for piece in pieces:
        ids += [*tokenizer.encode(piece), tokenizer.eos_token_id]
        while len(ids) >= length:
            yield ids[:length]
            ids = ids[length:]


def bucketed(windows: Iterator[list[int]], batch_size: int, seed: int) -> Iterator[list[list[int]]]:
    """Group windows into batches of about the same length, so that little is padded; a single one needs none."""
    if batch_size == 1:
        yield from ([window] for window in windows)
        return
    rng = random.Random(seed)
    while pool := list(islice(windows, batch_size * BUCKET_BATCHES)):
        pool.sort(key=len)
        batches = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        rng.shuffle(batches)
        yield from batches


def _pieces(path: Path, tokenizer: TokenizerWrapper, length: int, rng: random.Random) -> Iterator[str]:
    size = length * PIECE_CHARACTERS_PER_TOKEN
    documents = list(read_documents(path, tokenizer))
    places = [(i, start) for i, document in enumerate(documents) for start in range(0, len(document), size)]
    rng.shuffle(places)
    for i, start in places:
        yield documents[i][start : start + size]
