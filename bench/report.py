"""Results as tables: columns once, for the terminal, Markdown and CSV."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..files import write_json, write_text

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]


def number(key: str, form: str = ".0f", scale: float = 1.0, unit: str = "") -> Callable[[Row], str]:
    """Return a cell that formats one number of a row; empty where it is None."""
    return lambda row: "" if row[key] is None else f"{row[key] * scale:{form}}{unit}"


def tokens_cell(row: Row) -> str:
    """Return the prompt length, with the batch size where there is one."""
    return f"{row['batch_size']}x{row['prompt_tokens']}" if row["batch_size"] > 1 else str(row["prompt_tokens"])


def _quartiles(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: f"({row[key]['q1']:{form}}-{row[key]['q3']:{form}})"


def _median(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: "" if row[key] is None else f"{row[key]['median']:{form}}"


def _if_predicted(key: str) -> Callable[[Row], str]:
    return lambda row: "" if row["first_step_ms"] is None else f"{row[key]:.0f}"


TTFT: Columns = {
    "tokens": tokens_cell,
    "arm": lambda row: row["arm"],
    "TTFT ms": lambda row: f"{row['ttft_ms']['median']:.0f}",
    "(q1-q3)": _quartiles("ttft_ms", ".0f"),
    "aux": _if_predicted("auxiliary_prefill_ms"),
    "predict": _if_predicted("predict_ms"),
    "recompute": _if_predicted("recompute_ms"),
    "step": _if_predicted("first_step_ms"),
    "floor": number("floor_ms"),
    "of floor": number("share_of_floor", ".0%"),
    "sooner": number("speedup", ".2f", unit="x"),
    "FLOPs": number("flops_ratio", ".2f", unit="x"),
    "realised": number("realised", ".2f"),
}
DECODE: Columns = {
    "tokens": lambda row: str(row["prompt_tokens"]),
    "arm": lambda row: row["arm"],
    "tokens/s": lambda row: f"{row['tps']['median']:.1f}",
    "(q1-q3)": _quartiles("tps", ".1f"),
    "of full": number("ratio", ".2f"),
}
DRAFTS: Columns = {
    "task": lambda row: row["task"],
    "tokens": number("prompt_tokens"),
    "arm": lambda row: row["arm"],
    "draft": lambda row: row["draft"],
    "tokens/s": _median("tps", ".1f"),
    "of none": number("ratio", ".2f"),
    "accepted, by position": lambda row: " ".join(f"{share:.2f}" for share in row["acceptance"] or ()) or "-",
}
SERVE: Columns = {
    "tokens": number("prompt_tokens"),
    "clients": number("clients"),
    "arm": lambda row: row["arm"],
    "path": lambda row: " ".join(row["paths"]) or "-",
    "TTFT ms": lambda row: f"{row['ttft_ms']['median']:.0f}",
    "(q1-q3)": _quartiles("ttft_ms", ".0f"),
    "engine": _median("engine_ms", ".0f"),
    "HTTP adds": _median("http_ms", ".1f"),
    "sooner": number("speedup", ".2f", unit="x"),
    "tokens/s": _median("tps", ".1f"),
}
MEMORY: Columns = {
    "tokens": tokens_cell,
    "arm": lambda row: row["arm"],
    "weights MiB": number("weight_bytes", ".0f", 2**-20),
    "caches": number("cache_bytes", ".0f", 2**-20),
    "above weights": number("above_weights_bytes", ".0f", 2**-20),
    "peak": number("total_bytes", ".0f", 2**-20),
    "bound": number("bound_bytes", ".0f", 2**-20),
}
FLOPS: Columns = {
    "preset": lambda row: row["preset"],
    "base M": number("base_parameters", ".1f", 1e-6),
    "aux M": number("auxiliary_parameters", ".1f", 1e-6),
    "maps M": number("predictor_parameters", ".2f", 1e-6),
    "full GFLOP": number("full_gflops"),
    "kvp": number("kvp_gflops"),
    "paper": number("paper_ratio", ".2f"),
    "parameters": number("parameter_ratio", ".2f"),
    "true": number("flops_ratio", ".2f"),
}
HOSTS: Columns = {
    "arm": lambda row: row["arm"],
    "hosts": number("hosts"),
    "TFLOP": number("tflop", ".1f"),
    "KB/token": number("summed_bytes_per_token", ".0f", 1e-3),
    "compute s": number("compute_s", ".2f"),
    "exchange": number("exchange_s", ".2f"),
    "total": number("total_s", ".2f"),
    "sooner": number("speedup", ".2f", unit="x"),
}
COMPARE: Columns = {
    "tokens": tokens_cell,
    "arm": lambda row: row["arm"],
    "ratio": number("ratio", ".3f"),
    "95 % interval": lambda row: f"{row['interval'][0]:.3f}-{row['interval'][1]:.3f}",
    "": lambda row: "slower" if row["failed"] else "",
}
CALIBRATION: Columns = {
    "predicted tokens": number("predicted_tokens"),
    "full ms": number("full_ms", ".1f"),
    "kvp ms": number("kvp_ms", ".1f"),
}


def table_of(title: str, columns: Columns, rows: list[Row]) -> tuple[Table, int]:
    """Return a table for a terminal, and the width below which its cells would break."""
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    table = Table(title=Text(title), box=SIMPLE_HEAD, padding=(0, 1))
    for column in columns:
        table.add_column(column, justify="left" if column in ("arm", "preset") else "right", no_wrap=True)
    for line in cells:
        table.add_row(*map(Text, line))
    return table, sum(max(map(len, column)) + 3 for column in zip(columns, *cells, strict=True)) + 2


def markdown(columns: Columns, rows: list[Row]) -> str:
    """Return a Markdown table; columns that are empty throughout are left out."""
    lines = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    kept = [i for i in range(len(columns)) if any(line[i] for line in lines[1:])]
    head, *body = ["| " + " | ".join(line[i] for i in kept) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(kept), *body]) + "\n"


def csv_text(rows: list[Row]) -> str:
    """Return all numbers of all rows as CSV; nested ones as ``ttft_ms.median``, samples separated by spaces."""
    flat = [_flat(row) for row in rows]
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in flat for key in row)))
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()


def _flat(row: Row) -> Row:
    out: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out |= {f"{key}.{inner}": deeper for inner, deeper in _flat(value).items()}
        else:
            out[key] = " ".join(map(str, value)) if isinstance(value, list) else value
    return out


def write_result(path: Path, result: dict[str, Any], columns: Columns) -> None:
    """Write a result as its name asks: ``.csv``, ``.md``, anything else JSON."""
    match path.suffix:
        case ".csv":
            write_text(path, csv_text(result["rows"]))
        case ".md":
            write_text(path, markdown(columns, result["rows"]))
        case _:
            write_json(path, result)
