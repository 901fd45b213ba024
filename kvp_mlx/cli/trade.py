"""``kvp eval dial``, ``pareto`` and ``report``: the trade of time for quality, and its pictures and pages."""

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundle.loading import KVPModel
from ..device.machine import describe_machine
from ..engine.dial import PREDICT
from ..errors import InputError
from ..evaluate.dial_map import dial_points, is_of_dials
from ..evaluate.pareto import draw, draw_dials, points, read_documents
from ..evaluate.records import hashes
from ..evaluate.report import page, read_results, title
from ..evaluate.runs import setting
from ..evaluate.trade_off import (
    Followed,
    dials,
    measure_dials,
    own_directory,
    questions_of,
    setting_of,
    soonest,
    store_dials,
)
from ..files import check_writable, write_json, write_text
from ..files.figures import check_picture
from ..train.text import data_files, token_windows
from .info import dial_rows
from .options import (
    DEFAULT_MODEL,
    TEXT_HELP,
    AllowMismatch,
    ContinuationTokens,
    DataSeed,
    Documents,
    Json,
    ModelArgument,
    OtherBase,
    OutFile,
    Plot,
    PromptLengths,
    RefineTokens,
    open_model,
    parse_numbers,
)
from .output import clean_stdout, print_json, progress_bar, say_written, show
from .tasks import Log, parse_shares


def hand_out(result: dict[str, Any], out: Path | None, json: bool) -> bool:
    """Write and print a result as JSON where that is wanted; returns whether it is still to be shown to people."""
    if out is not None:
        write_json(out, result)
        say_written(out)
    if json:
        print_json(result)
    return not json


def documents_of(model: KVPModel, data: list[str], tokens: int, seed: int, limit: int) -> list[list[int]]:
    """Return documents of exactly ``tokens`` token ids, at most ``limit``.

    Raises:
        InputError: unusable data, or more tokens than the context window holds.
    """
    if model.context_length is not None and tokens > model.context_length:
        raise InputError(
            f"--prompt-tokens and --continuation-tokens make {tokens}, more than the model's context window of "
            f"{model.context_length}, whatever --data holds; choose fewer."
        )
    windows = token_windows(data_files(data), model.text_tokenizer, tokens, seed)
    return list(islice((window for window in windows if len(window) == tokens), limit))


def dial(
    model: ModelArgument = DEFAULT_MODEL,
    data: Annotated[list[str] | None, typer.Option("--data", help=TEXT_HELP)] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option(
            help="In place of --data, questions about documents: each setting's own answers are scored, and how likely "
            "it finds full prefill's. JSONL (also .gz) with title, context, question and answers; repeatable."
        ),
    ] = None,
    prompt_tokens: PromptLengths = "384",
    continuation_tokens: ContinuationTokens = 64,
    heads: Annotated[str, typer.Option(help="Exact heads to try, comma-separated.")] = "0,4,32",
    tails: Annotated[str, typer.Option(help="Exact tails to try, comma-separated.")] = "0,8,16,32,64,128",
    recompute: Annotated[
        str | None, typer.Option(help="Shares of tokens to recompute, comma-separated.  [default: the bundle's]")
    ] = None,
    refine_tokens: RefineTokens = None,
    balanced: Annotated[float, typer.Option(min=0, max=1, help="Recovery that balanced promises.")] = 0.97,
    fast: Annotated[float, typer.Option(min=0, max=1, help="Recovery that fast promises.")] = 0.9,
    write: Annotated[bool, typer.Option("--write", help="Keep what was found in the bundle's kvp.json.")] = False,
    limit: Documents = 12,
    seed: DataSeed = 0,
    log: Log = None,
    base: OtherBase = None,
    allow_base_mismatch: AllowMismatch = False,
    out: OutFile = None,
    json: Json = False,
) -> None:
    """Measure what exact heads, tails and recomputed shares cost and give.

    Time to the first token and context recovery (1: all that the prompt tells the full model) of each combination, on
    text or on the answers to questions, with --questions also the answers' F1 and between what shares of full
    prefill's it lies; those that nothing beats are marked. Then, by prompt length, what recovers as much as each
    quality promises soonest, unless F1 says otherwise: with --write, --quality means that from then on.
    """
    check_writable(out, log)
    directory = own_directory(model) if write else None
    lengths = sorted(set(parse_numbers(prompt_tokens, "--prompt-tokens")))
    shares = [None] if recompute is None else parse_shares(recompute, "--recompute")
    choices = dials(parse_numbers(heads, "--heads"), parse_numbers(tails, "--tails"), shares, refine_tokens or 0)
    if max(choice.exact_head + choice.exact_tail for choice in choices) > lengths[0] - 2:
        raise InputError("the largest head and tail leave nothing to predict; try smaller ones or longer prompts.")
    if bool(data) == bool(questions):
        raise InputError("give text to go on from with --data, or questions about documents with --questions.")
    data_files(data or questions or [])  # refused before a model is loaded
    with clean_stdout(json):
        loaded = open_model(model, base_name=base, allow_base_mismatch=allow_base_mismatch)

    def documents(length: int) -> list[Followed]:
        if questions:
            return questions_of(loaded, questions, length, seed, limit)
        windows = documents_of(loaded, data or [], length + continuation_tokens, seed, limit)
        return [Followed(window[:length], window[length:]) for window in windows]

    with clean_stdout(json), progress_bar("documents") as progress:
        sets = {length: documents(length) for length in lengths}
        if min(map(len, sets.values())) < 2:
            raise InputError("two documents of every length are the least; give more data, or other --prompt-tokens.")
        recipe = {
            "task": "dial",
            **setting(loaded, model, PREDICT),
            "data": hashes(data or questions or []),
            "continuation_tokens": None if questions else continuation_tokens,
            "dials": [setting_of(choice) for choice in choices],
            "seed": seed,
        }
        rows = measure_dials(loaded, sets, choices, recipe=recipe, log=log, progress=progress)
    measured = soonest(rows, {"fast": fast, "balanced": balanced})
    result: dict[str, Any] = {
        "model": model,
        "machine": describe_machine(),
        "documents": min(map(len, sets.values())),
        "prompt_tokens": lengths[0] if len(lengths) == 1 else lengths,
        "continuation_tokens": None if questions else continuation_tokens,
        "rows": rows,
        "promises": {"fast": fast, "balanced": balanced},
        "dials": [each.model_dump(mode="json") for each in measured],
    }
    if directory is not None:
        store_dials(directory, measured)
        say_written(directory / "kvp.json")
    if hand_out(result, out, json):
        print_dials(result)


def print_dials(result: dict[str, Any]) -> None:
    """Print the trade-off for people, and what it makes of the qualities."""
    for row in result["rows"]:
        kept = f"   F1 {row['score']:.3f}" if "score" in row else ""
        if "retention" in row:
            low, high = row["retention"]["interval"]
            kept += f" ({low:.0%} to {high:.0%})"
        show(
            f"{row['prompt_tokens']:5} {row['path']:5} head {row['exact_head']:4} tail {row['exact_tail']:4} "
            f"recompute {row['recompute']:.2f}   {row['ttft_ms']:7.0f} ms   "
            f"{row['sooner']:5.2f}x   recovery {row['recovery']:+.3f}{kept}{'   *' if row['is_best'] else ''}"
        )
    for quality, meaning in dial_rows(result["dials"]):
        show(f"{quality:9} {meaning}")


def pareto(
    results: Annotated[
        list[Path], typer.Argument(help="What 'kvp eval TASK --out' wrote, all of one task, or 'kvp eval dial --out'.")
    ],
    plot: Plot = None,
    out: OutFile = None,
    json: Json = False,
) -> None:
    """Score against time to first token and against prefill work, over arms, dials and bundles."""
    check_writable(plot, out)
    check_picture(plot)
    documents = read_documents(results)
    if all(map(is_of_dials, documents)):
        show_dial_map(dial_points(documents), plot, out, json)
        return
    rows = points(documents)
    document = {"task": documents[0]["task"], "points": rows}
    if plot is not None:
        draw({documents[0]["task"]: rows}, plot)
        say_written(plot)
    if not hand_out(document, out, json):
        return
    show(f"{document['task']}, n = {rows[0]['n']} (* none is both faster and as good, + none cheaper and as good)")
    for row in rows:
        mark = ("*" if row["fastest_so_good"] else " ") + ("+" if row["cheapest_so_good"] else " ")
        low, high = row["interval"]
        show(
            f"{mark} {row['label']:24} {row['score']:.3f} [{low:.3f}, {high:.3f}]   TTFT {row['ttft_ms']:.0f} ms   "
            f"work {1 / row['flops_ratio']:.2f} of full"
        )


def show_dial_map(rows: list[dict[str, Any]], plot: Path | None, out: Path | None, json: bool) -> None:
    """Draw, write and print the map of dials."""
    if plot is not None:
        draw_dials(rows, plot)
        say_written(plot)
    if not hand_out({"task": "dial", "points": rows}, out, json):
        return
    show("recovery (* none is both faster and as good)")
    for row in rows:
        mark = "*" if row["fastest_so_good"] else " "
        place = f"{row['prompt_tokens']:5} tokens, n {row['documents']:3}   {row['label']:32}"
        show(f"{mark} {place} {row['recovery']:+.3f}   TTFT {row['ttft_ratio']:.2f} of full")


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Hold what 'kvp eval TASK --out' wrote, of one bundle each, and no other JSON.")
    ],
    out: Annotated[Path, typer.Option(help="Markdown file to write.")],
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the first folder's results here (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """Write the page of results from their JSON documents, and the picture: a row for each task."""
    check_writable(out, plot)
    check_picture(plot)
    parts = [read_results(folder) for folder in folders]
    if plot is not None:
        draw({title(document): points([document]) for document in parts[0]}, plot)
        say_written(plot)
    write_text(out, page(parts))
    say_written(out)
