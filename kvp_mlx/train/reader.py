"""The one reader of data files, for training and evaluation: text and JSON lines, plain or gzipped, never held whole.

UTF-8 with or without a byte order mark, lines that end in any way. What is wrong is named with file and line.
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..errors import InputError
from ..files import parse_json

JSON_LINES = (".jsonl", ".jsonl.gz")
TEXTS = (".txt", ".md", ".txt.gz", ".md.gz")
PIECE_BYTES = 2**24
"""Of a text file that are read at once: a longer file comes in several documents."""
LINE_BYTES = 2**26


def holds_records(path: Path) -> bool:
    """Return whether a data file holds JSON lines, by its name."""
    return path.name.endswith(JSON_LINES)


def read_text_pieces(path: Path) -> Iterator[str]:
    """Yield a text file: whole, or in pieces of ``PIECE_BYTES`` if it is longer.

    Raises:
        InputError: it cannot be read, is not UTF-8, or no text.
    """
    with _opened(path) as binary:
        number = 0
        while piece := b"".join(_until(binary, PIECE_BYTES)):
            try:
                text = piece.decode("utf-8" if number else "utf-8-sig")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path} is not UTF-8 text (byte {number + error.start:,}); convert it first."
                ) from error
            if "\0" in text:
                raise InputError(f"{path} holds NUL characters, which text has none of; convert it to UTF-8 first.")
            number += len(piece)
            yield text.replace("\r\n", "\n").replace("\r", "\n")


def read_json_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the records of a JSON lines file, each with its place for error messages.

    The ``messages`` of a record come as ``checked_messages`` returns them.

    Raises:
        InputError: it cannot be read, or a line is no JSON object or no text.
    """
    with _opened(path) as binary:
        number = 0
        while line := binary.readline(LINE_BYTES + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > LINE_BYTES:
                raise InputError(f"{where} is longer than {LINE_BYTES / 2**20:.0f} MiB; is it JSON lines?")
            if not line.strip(b" \t\r\n\xef\xbb\xbf"):
                continue
            try:
                record = parse_json(line, where)
            except InputError as error:
                if holds_records(path):
                    raise
                raise InputError(f"{path} is no file of JSON lines, by name or content ({error})") from error
            if not isinstance(record, dict):
                raise InputError(f"{where}: no JSON object; every line needs one.")
            if "messages" in record:
                record["messages"] = checked_messages(record["messages"], where)
            yield record, where


def checked_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """Return a conversation as chat templates take it: every message with a role and a text.

    Content that comes in parts is joined; null is an empty text.

    Raises:
        InputError: another shape.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: 'messages' is a list of messages, not {_shape(messages)}.")
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        raise InputError(f"{where} needs 'role' and 'content'; convert the file to that form.")
    content = message["content"]
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    elif content is None:
        content = ""
    if not isinstance(content, str):
        raise InputError(f"{where}: 'content' is a text or a list of parts, not {_shape(content)}.")
    return message | {"content": content}


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else _shape(part)
    raise InputError(f"{where} has a part that is no text ({kind}); leave it out.")


def _shape(value: Any) -> str:
    names = {dict: "an object", list: "an empty list" if value == [] else "a list", str: "a text", type(None): "null"}
    return names.get(type(value), "a number")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, unzipped as it is read; what goes wrong on the way is one error."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield file  # type: ignore[misc] # gzip's is one
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); check --data.") from error


def _until(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield bytes up to ``size``, then on to the end of a character and of a line end."""
    yield file.read(size)
    for _ in range(8):
        byte = file.peek(1)[:1]  # type: ignore[attr-defined] # buffered readers have it
        if not byte or not (byte == b"\n" or 0x80 <= byte[0] < 0xC0):
            return
        yield file.read(1)
