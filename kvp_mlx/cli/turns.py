"""``kvp eval turns`` and ``kvp eval dial``."""

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from .options import DEFAULT_MODEL, AllowMismatch, Json, parse_numbers
from .output import clean_stdout, print_json, progress_bar
from .tasks import ModelArgument, Out

MAX_TURNS = 10


def turns(
    model: ModelArgument = DEFAULT_MODEL,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Conversations (.jsonl, also .gz) with 'messages', or 'turns' of the user; repeatable."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Conversations of each set at most.")] = 8,
    exact_tail: Annotated[int, typer.Option(min=0, help="New tokens before the last that the base reads.")] = 8,
    seed: Annotated[int, typer.Option(help="Makes the synthetic conversations.")] = 0,
    allow_base_mismatch: AllowMismatch = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """Measure what happens over several turns.

    Full prefill, prediction, and prediction with refinement between turns: agreement, divergence and recall by turn,
    on made-up conversations of ten turns and on the files named.
    """
    from ..bundle.loading import load
    from ..device.machine import describe_machine
    from ..evaluate.turns import measure_turns, message_scripts, synthetic_scripts, yield_times_ms
    from ..files import check_writable, write_json

    check_writable(out)
    records = {path: read_conversations(path) for path in data or []}
    with clean_stdout(json), progress_bar("conversations") as progress:
        loaded = load(model, allow_base_mismatch=allow_base_mismatch)
        scripts = {"synthetic": synthetic_scripts(limit, seed)}
        for path, lines in records.items():
            length = 2 if "turns" in lines[0] else MAX_TURNS
            name = path if Path(path).name in scripts else Path(path).name
            scripts[name] = message_scripts(lines, length, limit)
            if not scripts[name]:
                raise InputError(f"{path} has no conversation of {length} turns; name another file.")
        result: dict[str, Any] = {
            "model": model,
            "machine": describe_machine(),
            "exact_tail": exact_tail,
            "refine_step_ms": yield_times_ms(loaded),
            "sets": {
                name: {
                    "conversations": len(chosen),
                    "turns": measure_turns(loaded, chosen, exact_tail=exact_tail, progress=progress),
                }
                for name, chosen in scripts.items()
            },
        }
    if out is not None:
        write_json(out, result)
    if json:
        print_json(result)
    else:
        print_turns(result)


def read_conversations(path: str) -> list[dict[str, Any]]:
    """Read a file of conversations.

    Raises:
        InputError: unreadable, or something else.
    """
    from ..evaluate.records import read_records

    records = read_records([path], {})
    if not all("messages" in record or "turns" in record for record in records):
        raise InputError(f"{path} holds records without 'messages' or 'turns'; name another file.")
    return records


def print_turns(result: dict[str, Any]) -> None:
    """Print a table per set."""
    from rich.console import Console
    from rich.table import Table

    arms = ("kvp", "kvp+refine")
    for name, measured in result["sets"].items():
        table = Table(title=f"{name}, {measured['conversations']} conversations")
        columns = ["turn", "tokens", *(f"{n} {arm}" for n in ("agreement", "KL") for arm in arms), "recall full"]
        for column in (*columns, *(f"recall {arm}" for arm in arms), "fresh/turn TTFT"):
            table.add_column(column, justify="right")
        for row in measured["turns"]:
            cells = [row[arm][key] for key in ("agreement", "kl") for arm in arms]
            cells += [row[arm]["recall"] for arm in ("full", *arms)]
            fresh = row["fresh_ttft_ms"]
            sooner = f"{fresh / row['kvp+refine']['ttft_ms']:.1f}x" if fresh else ""
            shown = ["" if cell is None else f"{cell:.3f}" for cell in cells]
            table.add_row(str(row["turn"]), f"{row['context_tokens']:.0f}", *shown, sooner)
        Console(width=max(Console().width, 120)).print(table)
    step = result["refine_step_ms"]
    print(f"refinement can be left every {step['median']:.1f} ms (largest {step['largest']:.1f})")


def dial(
    data: Annotated[list[str], typer.Option(help="Text (.txt, .md, .jsonl, also .gz); repeatable.")],
    model: ModelArgument = DEFAULT_MODEL,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Prompt length.")] = 384,
    continuation_tokens: Annotated[int, typer.Option(min=1, help="Tokens scored after it.")] = 64,
    heads: Annotated[str, typer.Option(help="Exact heads to try, comma-separated.")] = "0,4,32",
    tails: Annotated[str, typer.Option(help="Exact tails to try, comma-separated.")] = "0,8,16,32,64,128",
    limit: Annotated[int, typer.Option(min=2, help="Documents at most.")] = 12,
    seed: Annotated[int, typer.Option(help="Chooses the passages.")] = 0,
    allow_base_mismatch: AllowMismatch = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """Measure what exact heads and tails cost and give.

    Time to the first token and context recovery of each combination; those that nothing beats are marked.
    """
    from ..bundle.loading import load
    from ..device.machine import describe_machine
    from ..evaluate.dial import measure_dial, settings
    from ..files import check_writable, write_json
    from ..train.text import data_files, token_windows

    check_writable(out)
    choices = settings(parse_numbers(heads, "--heads"), parse_numbers(tails, "--tails"))
    if max(choice.exact_head + choice.exact_tail for choice in choices) > prompt_tokens - 2:
        raise InputError("the largest head and tail leave nothing to predict; try smaller ones or longer prompts.")
    files, length = data_files(data), prompt_tokens + continuation_tokens
    with clean_stdout(json), progress_bar("documents") as progress:
        loaded = load(model, allow_base_mismatch=allow_base_mismatch)
        windows = token_windows(files, loaded.text_tokenizer, length, seed)
        documents = list(islice((window for window in windows if len(window) == length), limit))
        if len(documents) < 2:
            raise InputError("two documents are the least; give more --data.")
        rows = measure_dial(loaded, documents, continuation_tokens, choices, progress)
        result = {
            "model": model,
            "machine": describe_machine(),
            "documents": len(documents),
            "prompt_tokens": prompt_tokens,
            "continuation_tokens": continuation_tokens,
            "rows": rows,
        }
    if out is not None:
        write_json(out, result)
    if json:
        print_json(result)
        return
    for row in rows:
        print(
            f"{row['path']:5} head {row['exact_head']:4} tail {row['exact_tail']:4}   {row['ttft_ms']:7.0f} ms   "
            f"{row['sooner']:5.2f}x   recovery {row['recovery']:+.3f}{'   *' if row['is_best'] else ''}"
        )
