"""Data files of the tasks: JSON lines, plain or gzipped, from local places or the Hub."""

import gzip
import json
import random
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..train.text import data_files

SAMPLE = Path(__file__).parents[1] / "data" / "sample" / "test.jsonl.gz"


def read_records(places: Iterable[str], fields: Iterable[str]) -> list[dict[str, Any]]:
    """Return all records of JSONL files.

    Args:
        places: as ``data_files`` takes them: files, folders, patterns, ``hub:owner/name``.
        fields: what every record must have.

    Raises:
        InputError: no such file, not JSON lines, or a field is missing.
    """
    records = []
    for path in data_files(places):
        try:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    record = json.loads(line)
                    if missing := [name for name in fields if name not in record]:
                        raise InputError(f"{path}, line {number}: the record lacks '{missing[0]}'; is it this task's?")
                    records.append(record)
        except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
            raise InputError(f"{path} is not readable JSON lines ({error}); check --data.") from error
    if not records:
        raise InputError("the data holds no record; check --data.")
    return records


def read_texts(places: Iterable[str]) -> list[str]:
    """Return whole texts: of text files, or the ``text`` of JSONL records (without places: our own sample)."""
    texts = []
    for path in data_files(list(places) or [str(SAMPLE)]):
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            texts += [record["text"] for record in read_records([str(path)], ["text"])]
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
