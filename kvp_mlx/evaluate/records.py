"""Data files of the tasks: JSON lines, plain or gzipped, from local places or the Hub."""

import random
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import sha256_of
from ..train.reader import holds_records, read_json_lines, read_text_pieces
from ..train.text import data_files

SAMPLE = Path(__file__).parents[1] / "data" / "sample" / "test.jsonl.gz"
Kind = tuple[str, Callable[[Any], bool]]
"""What a field holds, in words, and whether a value is that."""
TEXT: Kind = ("a text", lambda value: isinstance(value, str))
TEXTS: Kind = ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value))
NUMBER: Kind = ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
MOST_RECORDS = 2_000_000
MOST_CHARACTERS = 2**28
"""Of texts that passages are taken from; what follows is left out."""


def read_records(places: Iterable[str], fields: Mapping[str, Kind]) -> list[dict[str, Any]]:
    """Return all records of JSONL files.

    Args:
        places: as ``data_files`` takes them: files, folders, patterns, ``hub:owner/name``.
        fields: what every record must have, and of which kind.

    Raises:
        InputError: no such file, not JSON lines of objects, or a field is missing or of another kind.
    """
    records, places = [], list(places)
    for path in data_files(places):
        for record, where in read_json_lines(path):
            records.append(checked(record, fields, where))
            if len(records) > MOST_RECORDS:
                raise InputError(f"{path} has more than {MOST_RECORDS:,} records; give a part of it.")
    if not records:
        raise InputError(f"{', '.join(places)} holds no record; check --data.")
    return records


def name_of(record: Mapping[str, Any], number: int) -> str:
    """Return what names a record in a log: its id, or its number where it has none."""
    return str(number if record.get("id") is None else record["id"])


def checked(record: dict[str, Any], fields: Mapping[str, Kind], place: str) -> dict[str, Any]:
    """Return a record that has its fields.

    Raises:
        InputError: it has not.
    """
    for name, (kind, is_right) in fields.items():
        if name not in record:
            raise InputError(f"{place}: the record lacks '{name}'; is it this task's?")
        if not is_right(record[name]):
            raise InputError(f"{place}: '{name}' is not {kind}; is it this task's?")
    return record


def read_texts(places: Iterable[str]) -> list[str]:
    """Return whole texts: of text files, or the ``text`` of JSONL records (without places: our own sample).

    Raises:
        InputError: unreadable, or nothing but white space.
    """
    texts: list[str] = []
    size = 0
    for text in _texts(data_files(list(places) or [str(SAMPLE)])):
        texts.append(text)
        size += len(text)
        if size > MOST_CHARACTERS:
            warnings.warn(f"only the first {size:,} characters of the data are used.", stacklevel=1)
            break
    if not any(text.strip() for text in texts):
        raise InputError("the data holds no text; give other --data.")
    return texts


def _texts(files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        if holds_records(path):
            yield from (checked(record, {"text": TEXT}, where)["text"] for record, where in read_json_lines(path))
        else:
            yield from read_text_pieces(path)


def shuffled(records: list[Any], seed: int) -> list[Any]:
    """Return the records in a seeded order, so that any ``--limit`` is a fair sample and a larger one extends it."""
    return random.Random(seed).sample(records, len(records))


def after_examples(records: list[Any], count: int, seed: int) -> tuple[list[Any], list[Any]]:
    """Return the first ``count`` of the shuffled records, which are shown solved, and those that are asked.

    Raises:
        InputError: there are no more than the examples.
    """
    if len(records) <= count:
        raise InputError(f"{len(records)} records are no more than the {count} examples; give more --data.")
    in_order = shuffled(records, seed)
    return in_order[:count], in_order[count:]


def hashes(places: Sequence[str]) -> dict[str, str]:
    """Return the data files' names and SHA-256, for the recipe, in order; further ones of a name are numbered."""
    found: dict[str, str] = {}
    for path in data_files(list(places)):
        again = sum(name.partition(" #")[0] == path.name for name in found)
        found[f"{path.name} #{again + 1}" if again else path.name] = sha256_of(path)
    return found


def hash_of(text: str) -> int:
    """Return a number that is the same in every process."""
    return zlib.crc32(text.encode())
