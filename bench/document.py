"""Results of the bench as JSON documents: today's format, and older ones as they are to be read."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt

from ..device.machine import describe_machine
from ..errors import InputError
from ..files import read_json

FORMAT = 2
"""Since 2, ``full`` is full prefill as this package runs it, and ``mlx-lm`` is mlx-lm's own."""
ARMS_OF_FORMAT_1 = {"full": "mlx-lm", "full-ours": "full"}


def heading(model: str, precision: str, **rates: float) -> dict[str, Any]:
    """Return what every measurement's document begins with: format, machine (with its ``rates``), what was measured."""
    return {"format": FORMAT, "machine": describe_machine() | rates, "model": model, "precision": precision}


def read_result(path: Path, command: str = "ttft") -> dict[str, Any]:
    """Return a result that ``kvp bench ttft``, ``decode`` or ``memory`` wrote, in today's format.

    Args:
        path: a JSON file.
        command: the one that is to have written it; named where something else did.

    Raises:
        InputError: not such a result, or one of a newer format.
    """
    try:
        document = read_json(path)
        written = document.get("format", 1)
        if written == 1:
            document = migrated(document)
        arms = [row["arm"] for row in document["rows"]]
    except (InputError, OSError, KeyError, TypeError, AttributeError) as error:
        raise other_file(path, command) from error
    if written not in (1, FORMAT):
        raise InputError(f"{path} has format {written}, this version reads up to {FORMAT}; update kvp-mlx.")
    if not all(isinstance(arm, str) for arm in arms):
        raise other_file(path, command)
    return dict(document)


Positive = Annotated[FiniteFloat, Field(gt=0)]
Part = FiniteFloat | None


class Quartiles(BaseModel):
    """Times in ms."""

    model_config = ConfigDict(strict=True)
    median: Positive
    q1: Positive
    q3: Positive
    samples: list[Positive] = Field(min_length=1)


class TimedRow(BaseModel):
    """A row of ``kvp bench ttft``, as far as it is compared and drawn."""

    model_config = ConfigDict(strict=True)
    arm: str
    prompt_tokens: PositiveInt
    batch_size: PositiveInt
    ttft_ms: Quartiles
    flops_ratio: Positive
    floor_ms: Positive
    speedup: Positive | None
    auxiliary_prefill_ms: Part = None
    predict_ms: Part = None
    recompute_ms: Part = None
    first_step_ms: Part = None


class TTFTResult(BaseModel):
    """A result of ``kvp bench ttft``, as far as it is drawn."""

    model_config = ConfigDict(strict=True)
    model: str
    precision: str
    machine: dict[str, Any]
    rows: list[TimedRow] = Field(min_length=1)


def other_file(path: Path, command: str = "ttft") -> InputError:
    """Return what is raised for a file of something else."""
    return InputError(f"{path} is not a result of 'kvp bench {command} --out FILE.json'.")


def migrated(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document of format 1 in today's: arms named for what ran, compared with today's ``full``.

    There, ``full`` was mlx-lm's own and ``full-ours`` ours, but for decoding, which was always after ours. What was
    measured stays; ``speedup`` and ``realised`` are None where ours was not.
    """
    rows = [dict(row) for row in document["rows"]]
    if not any("tps" in row for row in rows):
        for row in rows:
            row["arm"] = ARMS_OF_FORMAT_1.get(row["arm"], row["arm"])
        compare_with_full(rows)
    return {"format": FORMAT, **document, "rows": rows}


def compare_with_full(rows: list[dict[str, Any]]) -> None:
    """Set ``speedup`` and ``realised`` of the rows that have them against ``full`` at their length and batch size."""
    timed = [row for row in rows if "speedup" in row]
    full_ms = {_size(row): row["ttft_ms"]["median"] for row in timed if row["arm"] == "full"}
    for row in timed:
        full = full_ms.get(_size(row))
        row["speedup"] = full / row["ttft_ms"]["median"] if full else None
        is_counted = full and row["arm"] != "llama.cpp"  # whose work is not this arithmetic
        row["realised"] = row["speedup"] / row["flops_ratio"] if is_counted else None


def _size(row: dict[str, Any]) -> tuple[int, int]:
    return row["prompt_tokens"], row["batch_size"]
