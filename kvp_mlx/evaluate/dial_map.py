"""The map of the trade: what dials of one or several bundles recover, over their time to the first token."""

from collections.abc import Sequence
from typing import Any

Point = dict[str, Any]


def is_of_dials(document: Any) -> bool:
    """Return whether a JSON document is one of ``kvp eval dial``, not of a task."""
    return isinstance(document, dict) and "rows" in document and "arms" not in document


def dial_points(documents: Sequence[dict[str, Any]]) -> list[Point]:
    """Return one point per prompt length, bundle and setting, the shortest prompts and the best recovery first.

    A setting's time is a share of full prefill's in the same run, so that runs of several bundles can be compared.

    Args:
        documents: of ``kvp eval dial --out``, measured on the same prompts.

    Returns:
        Points of prompt_tokens, documents, label, model (None for full prefill, one point for all), exact_head,
        exact_tail, recompute, recovery, ttft_ratio, and ``fastest_so_good``: none that is faster recovers as much.
    """
    found: dict[tuple[int, str], Point] = {}
    for document in documents:
        for row in document["rows"]:
            is_full = row["path"] == "full"
            label = "full" if is_full else f"{document['model']}: {setting(row)}"
            kept = {key: row[key] for key in ("exact_head", "exact_tail", "recompute", "recovery")}
            point = {"prompt_tokens": row["prompt_tokens"], "documents": document["documents"], "label": label, **kept}
            point |= {"model": None if is_full else document["model"], "ttft_ratio": 1 / row["sooner"]}
            found.setdefault((row["prompt_tokens"], label), point)
    points = sorted(found.values(), key=lambda point: (point["prompt_tokens"], -point["recovery"]))
    for point in points:
        point["fastest_so_good"] = not any(
            other["prompt_tokens"] == point["prompt_tokens"]
            and other["ttft_ratio"] < point["ttft_ratio"]
            and other["recovery"] >= point["recovery"]
            for other in points
        )
    return points


def setting(row: dict[str, Any]) -> str:
    """Return the short name of a dial: its head if it has one, its tail, and the share that is recomputed."""
    head = f"{row['exact_head']}+" if row["exact_head"] else ""
    return f"{head}{row['exact_tail']}-{row['recompute']:g}"
