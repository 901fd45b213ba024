"""Data files of the tasks: JSON lines, plain or gzipped, from local places or the Hub."""

import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import sha256_of
from ..train.text import data_files

SAMPLE = Path(__file__).parents[1] / "data" / "sample" / "test.jsonl.gz"
Kind = tuple[str, Callable[[Any], bool]]
"""What a field holds, in words, and whether a value is that."""
TEXT: Kind = ("a text", lambda value: isinstance(value, str))
TEXTS: Kind = ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value))
NUMBER: Kind = ("a whole number", lambda value: isinstance(value, int))


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
        try:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        records.append(checked(json.loads(line), fields, f"{path}, line {number}"))
        except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
            raise InputError(f"{path} is not readable JSON lines ({error}); check --data.") from error
    if not records:
        raise InputError(f"{', '.join(places)} holds no record; check --data.")
    return records


def checked(record: Any, fields: Mapping[str, Kind], place: str) -> dict[str, Any]:
    """Return a record that has its fields.

    Raises:
        InputError: it has not.
    """
    if not isinstance(record, dict):
        raise InputError(f"{place}: no JSON object; is it this task's data?")
    for name, (kind, is_right) in fields.items():
        if name not in record:
            raise InputError(f"{place}: the record lacks '{name}'; is it this task's?")
        if not is_right(record[name]):
            raise InputError(f"{place}: '{name}' is not {kind}; is it this task's?")
    return record


def read_texts(places: Iterable[str]) -> list[str]:
    """Return whole texts: of text files, or the ``text`` of JSONL records (without places: our own sample)."""
    texts = []
    for path in data_files(list(places) or [str(SAMPLE)]):
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            texts += [record["text"] for record in read_records([str(path)], {"text": TEXT})]
            continue
        try:
            data = path.read_bytes()
            texts.append((gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8"))
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise InputError(f"{path} is not readable text ({error}); check --data.") from error
    return texts


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
    """Return the data files' names and SHA-256, for the recipe."""
    return {path.name: sha256_of(path) for path in data_files(list(places))}


def hash_of(text: str) -> int:
    """Return a number that is the same in every process."""
    return zlib.crc32(text.encode())
