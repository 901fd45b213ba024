"""Text files as token windows: ``.txt``, ``.md`` and ``.jsonl``, plain or gzipped, one file or a folder of them."""

import glob
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..engine.controls import encode_apart
from ..engine.prompt import encode_text, render_text
from ..errors import InputError
from ..files import expanded
from ..models.hub import no_bars_off_terminal
from .reader import JSON_LINES, TEXTS, holds_records, read_json_lines, read_text_pieces

HUB = "hub:"
SUFFIXES = (*TEXTS, *JSON_LINES)
PIECE_CHARACTERS_PER_TOKEN = 6  # generous, so that most pieces fill a window
MIN_WINDOW_TOKENS = 32
BUCKET_BATCHES = 16
POOL_CHARACTERS = 2**26
"""Of a file's documents that are held and shuffled together; what follows makes the next pool."""


class Conversation(str):
    """Text that a chat template has written: its control tokens are tokens, and its own BOS is the only one."""


class Answered(str):
    """A prompt, and in ``completion`` what is to follow it."""

    completion: str

    def __new__(cls, prompt: str, completion: str) -> "Answered":
        """Join the two."""
        piece = super().__new__(cls, prompt)
        piece.completion = completion
        return piece


class PromptWindow(list[int]):
    """A window of a record that says where its prompt ends: after ``prompt_tokens``."""

    prompt_tokens: int


def data_files(places: Iterable[str | Path]) -> list[Path]:
    """Expand files, folders, globs and Hub datasets into the data files they hold.

    Args:
        places: each a file, a folder, a pattern such as ``texts/*.txt``, or ``hub:owner/name``, a dataset whose
            text files are downloaded. A place that is named twice counts twice.

    Raises:
        InputError: nothing there, a file of another type, or one whose name is no UTF-8.
    """
    files = []
    for place in map(str, places):
        if not place.strip():
            raise InputError("--data is empty; name a file, a folder or a pattern.")
        folder = _hub_dataset(place.removeprefix(HUB)) if place.startswith(HUB) else expanded(place)
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
        try:
            str(path.resolve()).encode()
        except UnicodeEncodeError as error:  # it would not go into kvp.json
            raise InputError(f"the name of data file {str(path)!a} is not UTF-8; rename it.") from error
    return files


def check_apart(out: Path, places: Sequence[str]) -> None:
    """Refuse to write into a folder that is read as data: what a run writes there would be read the next time.

    Raises:
        InputError: ``out`` lies in one of the places.
    """
    for place in (place for place in map(str, places) if not place.startswith(HUB)):
        if out.resolve().is_relative_to(expanded(place).resolve()):
            raise InputError(f"--out {out} lies in {place}, which is read as data; choose another --out.")


def _hub_dataset(name: str) -> Path:
    no_bars_off_terminal()
    try:
        patterns = [f"*{suffix}" for suffix in SUFFIXES]
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"dataset {name} cannot be had ({type(error).__name__}); check name and network.") from error


def read_documents(path: Path, tokenizer: TokenizerWrapper) -> Iterator[str]:
    """Yield the documents of one file.

    A text file is one document, a long one several. A line of a JSONL file is one: its ``text``, its ``messages``,
    written out by the tokeniser's chat template, or its ``prompt`` and ``completion``.

    Raises:
        InputError: see ``reader``; also a line with none of these, or messages that the chat template refuses.
    """
    if not holds_records(path):
        yield from read_text_pieces(path)
        return
    for record, where in read_json_lines(path):
        if isinstance(record.get("text"), str):
            yield record["text"]
        elif "messages" in record:
            yield _conversation(record["messages"], where, tokenizer)
        elif isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
            if not record["prompt"].strip() or not record["completion"].strip():
                raise InputError(f"{where}: 'prompt' or 'completion' is empty; leave the record out.")
            yield Answered(record["prompt"], record["completion"])
        else:
            raise InputError(
                f"{where}: a record needs 'text' (a string), 'messages' (a list), or both 'prompt' and 'completion' "
                "(strings)."
            )


def _conversation(messages: list[dict[str, str]], where: str, tokenizer: TokenizerWrapper) -> Conversation:
    if tokenizer.chat_template is None:
        raise InputError(f"{where}: this model has no chat template for 'messages'; give records with 'text'.")
    try:
        return Conversation(render_text(tokenizer, messages))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def ids_of(piece: str, tokenizer: TokenizerWrapper) -> list[int]:
    """Return the token ids of a document or a piece of one, as generation encodes them."""
    return encode_apart(tokenizer, piece) if isinstance(piece, Conversation) else encode_text(tokenizer, piece)


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
    """Yield pieces of text that fill a window, with the window, taking files in turn as ``token_windows`` does.

    A prompt and its completion need not fill one; a prompt of 32 tokens is enough.
    """
    streams = [_pieces(path, tokenizer, length, random.Random(f"{seed} {place}")) for place, path in enumerate(files)]
    while streams:
        for stream in list(streams):
            found = next((pair for piece in stream if (pair := _whole(piece, tokenizer, length))), None)
            if found is None:
                streams.remove(stream)
            else:
                yield found


def _whole(piece: str, tokenizer: TokenizerWrapper, length: int) -> tuple[str, list[int]] | None:
    if isinstance(piece, Answered):
        window = next(prompt_window(piece, tokenizer, length), None)
        return (piece, window) if window and window.prompt_tokens >= MIN_WINDOW_TOKENS else None
    ids = ids_of(piece, tokenizer)
    return (piece, ids[:length]) if len(ids) >= length else None


def is_answered(path: Path, tokenizer: TokenizerWrapper) -> bool:
    """Return whether a file holds prompts and completions, by its first record."""
    return isinstance(next(read_documents(path, tokenizer), None), Answered)


def prompt_window(piece: Answered, tokenizer: TokenizerWrapper, length: int) -> Iterator[PromptWindow]:
    """Yield a record's window, if it has 32 tokens: up to ``length``, of which a completion has up to half.

    The prompt loses its beginning where there is no room for all of it.
    """
    completion = tokenizer.encode(piece.completion, add_special_tokens=False)[: length // 2]
    prompt = encode_text(tokenizer, str(piece))[len(completion) - length :]
    window = PromptWindow([*prompt, *completion])
    window.prompt_tokens = len(prompt)
    if len(window) >= MIN_WINDOW_TOKENS:
        yield window


def cut_up(pieces: Iterator[str], tokenizer: TokenizerWrapper, length: int) -> Iterator[list[int]]:
    """Yield each piece's tokens in windows of ``length``, the last one shorter (but not below 32 tokens)."""
    for piece in pieces:
        if isinstance(piece, Answered):
            yield from prompt_window(piece, tokenizer, length)
            continue
        ids = ids_of(piece, tokenizer)
        for start in range(0, len(ids) - MIN_WINDOW_TOKENS + 1, length):
            yield ids[start : start + length]


def pack(pieces: Iterator[str], tokenizer: TokenizerWrapper, length: int) -> Iterator[list[int]]:
    """Yield windows of exactly ``length`` tokens, pieces one after another with an end-of-text token between.

    A tokeniser that has none leaves it out. A record's prompt and completion stay by themselves.
    """
    ids: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for piece in pieces:
        if isinstance(piece, Answered):
            yield from prompt_window(piece, tokenizer, length)
            continue
        ids += [*ids_of(piece, tokenizer), *end]
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
    """Yield the pieces of a file in shuffled order, pool by pool where it is long."""
    size = length * PIECE_CHARACTERS_PER_TOKEN
    for documents in _pools(read_documents(path, tokenizer)):
        pieces = [piece for document in documents for piece in _cut(document, size)]
        rng.shuffle(pieces)
        yield from pieces


def _cut(document: str, size: int) -> Iterator[str]:
    """Yield a document in pieces of ``size`` characters; a record's prompt and completion stay whole."""
    if isinstance(document, Answered):
        yield document
        return
    for start in range(0, len(document), size):
        yield type(document)(document[start : start + size])


def _pools(documents: Iterator[str]) -> Iterator[list[str]]:
    pool: list[str] = []
    size = 0
    for document in documents:
        pool.append(document)
        size += len(document) + 1
        if size >= POOL_CHARACTERS:
            yield pool
            pool, size = [], 0
    yield pool
