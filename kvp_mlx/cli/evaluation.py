"""``kvp eval``: its tasks (see ``tasks``), and what is measured and written beside them."""

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..bundle.loading import KVPModel
from ..device.machine import describe_machine
from ..engine.dial import Dial
from ..errors import InputError
from ..evaluate.diagnose import diagnose as examine
from ..evaluate.diagnose import short_needles
from ..evaluate.dial_map import dial_points, is_of_dials
from ..evaluate.layers import measure_layers
from ..evaluate.likelihood import Scoring
from ..evaluate.pareto import draw, draw_dials, points, read_documents
from ..evaluate.records import SAMPLE
from ..evaluate.report import page, read_results
from ..evaluate.runs import answering_arms
from ..evaluate.suite import ARMS as SUITE_ARMS
from ..evaluate.suite import estimate, plan, run_suite
from ..evaluate.tasks import all_tasks
from ..evaluate.trade_off import Followed, dials, measure_dials, own_directory, questions_of, soonest, store_dials
from ..evaluate.turns import measure_sets, read_conversations, script_sets, yield_times_ms
from ..files import check_writable, write_json, write_text
from ..train.recovery import ARMS, RecoveryMeasurement
from ..train.text import data_files, token_windows
from .info import dial_rows
from .options import (
    DEFAULT_MODEL,
    TEXT_HELP,
    AllowCode,
    AllowMismatch,
    ContinuationTokens,
    DataSeed,
    Documents,
    Json,
    Limit,
    Model,
    ModelArgument,
    OtherBase,
    OutFile,
    Plot,
    PromptLengths,
    PromptTokens,
    Recompute,
    TextData,
    TextOrSample,
    open_model,
    parse_numbers,
)
from .output import clean_stdout, print_json, progress_bar, progress_lines, say, say_written, show, show_table
from .tasks import AnsweringArms, ScoringOption, parse_shares, task_command

app = typer.Typer(help="Measure what a sooner first token costs.", rich_markup_mode=None)
for task in all_tasks().values():
    app.command(task.name)(task_command(task))


@app.callback()
def group() -> None:
    """Measure what a sooner first token costs."""


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


def hand_out(result: dict[str, Any], out: Path | None, json: bool) -> bool:
    """Write and print a result as JSON where that is wanted; returns whether it is still to be shown to people."""
    if out is not None:
        write_json(out, result)
        say_written(out)
    if json:
        print_json(result)
    return not json


@app.command()
def context(
    data: TextData,
    model: ModelArgument = DEFAULT_MODEL,
    arms: Annotated[str, typer.Option(help="What to measure; full and no_context always are.")] = ",".join(ARMS),
    prompt_tokens: PromptTokens = 384,
    continuation_tokens: ContinuationTokens = 128,
    exact_tail: Annotated[int, typer.Option(min=0, help="Prompt tokens before the last that the base reads.")] = 0,
    recompute: Recompute = None,
    limit: Documents = 24,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Also compare the caches layer by layer.")] = False,
    seed: DataSeed = 0,
    base: OtherBase = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Measure context recovery.

    How much of what a prompt tells the full model still reaches it through the predicted cache.
    """
    data_files(data)  # refused before a model is loaded
    with clean_stdout(json):
        loaded = open_model(model, base_name=base, allow_base_mismatch=allow_base_mismatch)
    with clean_stdout(json), progress_bar("documents") as progress:
        share = Dial("kvp", 0, exact_tail, recompute).share(loaded.config)
        documents = documents_of(loaded, data, prompt_tokens + continuation_tokens, seed, limit)
        how: dict[str, Any] = {"exact_tail": exact_tail, "recompute": share, "arms": arms.split(",")}
        result = RecoveryMeasurement(loaded, documents, continuation_tokens, **how).measure(progress)
    if per_layer:
        with clean_stdout(json), progress_lines("comparing caches layer by layer"):
            result["layers"] = measure_layers(loaded, documents, continuation_tokens, recompute=share)
    if hand_out(result, None, json):
        print_recovery(result)


def print_recovery(result: dict[str, Any]) -> None:
    """Print context recovery for people."""
    for arm, row in result["arms"].items():
        show(f"{arm:20} nll {row['nll']:.3f}   recovery {row['recovery']:+.3f}")
    for row in result.get("layers", []):
        errors = "key error {key_error:.3f}   value error {value_error:.3f}".format(**row)
        show(f"layer {row['layer']:3}   {errors}   attention cosine {row['attention_cosine']:.3f}")
    if result["separation"] is not None:
        show(f"separation {result['separation']:.3f} over {result['documents']} documents")


@app.command()
def dial(
    model: ModelArgument = DEFAULT_MODEL,
    data: Annotated[list[str] | None, typer.Option("--data", help=TEXT_HELP)] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option(
            help="In place of --data, questions about documents; full prefill's own answers to them are scored: JSONL "
            "(also .gz) with title, context, question and answers; repeatable."
        ),
    ] = None,
    prompt_tokens: PromptLengths = "384",
    continuation_tokens: ContinuationTokens = 64,
    heads: Annotated[str, typer.Option(help="Exact heads to try, comma-separated.")] = "0,4,32",
    tails: Annotated[str, typer.Option(help="Exact tails to try, comma-separated.")] = "0,8,16,32,64,128",
    recompute: Annotated[
        str | None, typer.Option(help="Shares of tokens to recompute, comma-separated.  [default: the bundle's]")
    ] = None,
    balanced: Annotated[float, typer.Option(min=0, max=1, help="Recovery that balanced promises.")] = 0.97,
    fast: Annotated[float, typer.Option(min=0, max=1, help="Recovery that fast promises.")] = 0.9,
    write: Annotated[bool, typer.Option("--write", help="Keep what was found in the bundle's kvp.json.")] = False,
    limit: Documents = 12,
    seed: DataSeed = 0,
    base: OtherBase = None,
    allow_base_mismatch: AllowMismatch = False,
    out: OutFile = None,
    json: Json = False,
) -> None:
    """Measure what exact heads, tails and recomputed shares cost and give.

    Time to the first token and context recovery (1: all that the prompt tells the full model) of each combination, on
    text or on the answers to questions; those that nothing beats are marked. Then, by prompt length, what reaches each
    quality soonest: with --write, --quality means that from then on.
    """
    check_writable(out)
    directory = own_directory(model) if write else None
    lengths = sorted(set(parse_numbers(prompt_tokens, "--prompt-tokens")))
    shares = [None] if recompute is None else parse_shares(recompute, "--recompute")
    choices = dials(parse_numbers(heads, "--heads"), parse_numbers(tails, "--tails"), shares)
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
        return [(window[:length], window[length:]) for window in windows]

    with clean_stdout(json), progress_bar("documents") as progress:
        sets = [documents(length) for length in lengths]
        if min(map(len, sets)) < 2:
            raise InputError("two documents of every length are the least; give more data, or other --prompt-tokens.")
        rows: list[dict[str, Any]] = []
        for found in sets:
            rows += measure_dials(loaded, found, choices, progress)
    measured = soonest(rows, {"fast": fast, "balanced": balanced})
    result: dict[str, Any] = {
        "model": model,
        "machine": describe_machine(),
        "documents": min(map(len, sets)),
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
        show(
            f"{row['prompt_tokens']:5} {row['path']:5} head {row['exact_head']:4} tail {row['exact_tail']:4} "
            f"recompute {row['recompute']:.2f}   {row['ttft_ms']:7.0f} ms   "
            f"{row['sooner']:5.2f}x   recovery {row['recovery']:+.3f}{'   *' if row['is_best'] else ''}"
        )
    for quality, setting in dial_rows(result["dials"]):
        show(f"{quality:9} {setting}")


@app.command()
def turns(
    model: ModelArgument = DEFAULT_MODEL,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Conversations (.jsonl, also .gz) with 'messages', or 'turns' of the user; repeatable."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Conversations of each set at most.")] = 8,
    exact_tail: Annotated[int, typer.Option(min=0, help="New tokens before the last that the base reads.")] = 8,
    seed: DataSeed = 0,
    base: OtherBase = None,
    allow_base_mismatch: AllowMismatch = False,
    out: OutFile = None,
    json: Json = False,
) -> None:
    """Measure what happens over several turns.

    Full prefill, prediction, and prediction with refinement between turns: agreement, divergence and recall by turn,
    on made-up conversations of ten turns and on the files named.
    """
    check_writable(out)
    records = {path: read_conversations(path) for path in data or []}
    with clean_stdout(json):
        loaded = open_model(model, base_name=base, allow_base_mismatch=allow_base_mismatch)
    with clean_stdout(json), progress_bar("conversations") as progress:
        sets = script_sets(records, limit, seed)
        result: dict[str, Any] = {
            "model": model,
            "machine": describe_machine(),
            "exact_tail": exact_tail,
            "refine_step_ms": yield_times_ms(loaded),
            "sets": measure_sets(loaded, sets, exact_tail=exact_tail, progress=progress),
        }
    if hand_out(result, out, json):
        print_turns(result)


def print_turns(result: dict[str, Any]) -> None:
    """Print a table per set."""
    arms = ("kvp", "kvp+refine")
    for name, measured in result["sets"].items():
        table = Table(title=Text(f"{name}, {measured['conversations']} conversations"))
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
        show_table(table, 120)
    step = result["refine_step_ms"]
    show(f"refinement can be left every {step['median']:.1f} ms (largest {step['largest']:.1f})")


@app.command()
def diagnose(
    data: TextOrSample = None,
    model: ModelArgument = DEFAULT_MODEL,
    prompt_tokens: PromptTokens = 384,
    continuation_tokens: ContinuationTokens = 64,
    limit: Documents = 4,
    seed: DataSeed = 0,
    base: OtherBase = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Say what is wrong with a bundle and what to do about it.

    Layers that hurt most, facts that are lost, an auxiliary that does not fit, a gain in time that does not show.
    """
    with clean_stdout(json):
        loaded = open_model(model, base_name=base, allow_base_mismatch=allow_base_mismatch)
    with clean_stdout(json), progress_bar("examining") as progress:
        documents = documents_of(loaded, data or [str(SAMPLE)], prompt_tokens + continuation_tokens, seed, limit)
        needles = short_needles(loaded.text_tokenizer, seed)
        result = examine(loaded, documents, continuation_tokens, progress, needles=needles)
    if hand_out(result, None, json):
        print_findings(result)


def print_findings(result: dict[str, Any]) -> None:
    """Print what was found wrong with a bundle."""
    line = "layer {layer:3}   gain of exact entries {gain:+.3f}   attention cosine {attention_cosine:.3f}"
    for row in result["layers"]:
        show(line.format(**row))
    show(
        "TTFT {full_ms:.0f} ms full, {kvp_ms:.0f} ms kvp: {speedup:.2f}x of {flops_ratio:.2f}x".format(**result["ttft"])
    )
    show("needles found: full {full}, kvp {kvp}, kvp-64 {kvp-64} of {of}".format(**result["needles"]))
    for found in result["findings"]:
        show("{problem}: {evidence}. To do: {remedy}.".format(**found))
    if not result["findings"]:
        show("nothing stands out")


@app.command()
def suite(
    data: Annotated[Path, typer.Argument(help="Folder with the tasks' files (docs/evaluating.md names them).")],
    model: Model = DEFAULT_MODEL,
    results: Annotated[Path, typer.Option(help="Folder for a JSON document per task.")] = Path("docs/results"),
    records: Annotated[Path | None, typer.Option(help="Folder for the rows (default: RESULTS/records).")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these of the plan, comma-separated.")] = None,
    arms: AnsweringArms = SUITE_ARMS,
    limit: Limit = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Time three items a task and print the plan.")] = False,
    allow_code_execution: AllowCode = False,
    base: OtherBase = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Measure all tasks, beside token pruning at equal TTFT.

    Goes on where it stopped. Several processes on one folder share the work; OPENBLAS_NUM_THREADS=1 gives each a core.
    """
    chosen = answering_arms(arms)
    entries = plan(data, limit, None if tasks is None else [name.strip() for name in tasks.split(",")])
    for name in (entry.name for entry in entries if entry.task.runs_code and not allow_code_execution):
        say(f"{name} is left out: it runs programs that a model wrote (--allow-code-execution).")
    entries = [entry for entry in entries if allow_code_execution or not entry.task.runs_code]
    places, rows = (results, records or results / "records"), []
    done: list[str] = []
    with clean_stdout(json):
        loaded = open_model(model, base_name=base, allow_base_mismatch=allow_base_mismatch)
    with clean_stdout(json), progress_bar("rows") as progress:
        if dry_run:
            for row in estimate(entries, loaded, model, places[1], chosen):
                rows.append(row)
                if not json:
                    print_estimate(row, sum(row["hours"] for row in rows))
        else:
            done = run_suite(entries, loaded, model, *places, arms=chosen, progress=progress, say=say)
    hand_out({"plan": rows, "done": done}, None, json)


def print_estimate(row: dict[str, Any], hours: float) -> None:
    """Print one task of the plan for people, with the hours up to its end."""
    item = f"{row['name']:12} n {row['n']:4}   {row['prompt_tokens']:4} prompt tokens"
    show(f"{item}   {row['hours']:5.2f} h   {hours:5.2f} h in all")
    show("    " + "   ".join(f"{arm} {seconds:.2f} s" for arm, seconds in row["seconds_per_item"].items()))


@app.command()
def lm_eval(
    tasks: Annotated[str, typer.Option(help="Its tasks, or ours (kvp_triviaqa, kvp_humaneval), comma-separated.")],
    model: ModelArgument = DEFAULT_MODEL,
    arms: AnsweringArms = "full,kvp",
    limit: Limit = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Solved examples (default: the task's).")] = None,
    data: Annotated[list[str] | None, typer.Option(help="JSONL in place of the tasks' own data.")] = None,
    scoring: ScoringOption = Scoring.continuation,
    allow_code_execution: AllowCode = False,
    out: OutFile = None,
    base: OtherBase = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Run lm-evaluation-harness's tasks under any arms (pip install 'kvp-mlx[eval]').

    JSON: its own results, per arm and task.
    """
    from ..evaluate.harness import KVPLM, run_harness  # an optional package

    check_writable(out)
    chosen, names = answering_arms(arms), [name.strip() for name in tasks.split(",")]
    how: dict[str, Any] = {"limit": limit, "shots": shots, "data": data or []}
    how["allow_code_execution"] = allow_code_execution
    with clean_stdout(True):
        loaded = open_model(model, base_name=base, allow_base_mismatch=allow_base_mismatch)
    with clean_stdout(True), progress_lines(f"running {tasks}"):
        results = {arm.name: run_harness(KVPLM(loaded, arm, scoring), names, **how)["results"] for arm in chosen}
    if hand_out({"model": model, "scoring": scoring.value, "arms": results}, out, json):
        for arm_name, of_arm in results.items():
            for name, scores in of_arm.items():
                shown = {key.split(",")[0]: value for key, value in scores.items() if isinstance(value, float)}
                numbers = "   ".join(f"{key} {value:.3f}" for key, value in shown.items())
                show(f"{arm_name:16} {name:20} {numbers}")


@app.command()
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
    documents = read_documents(results)
    if all(map(is_of_dials, documents)):
        show_dial_map(dial_points(documents), plot, out, json)
        return
    rows = points(documents)
    document = {"task": documents[0]["task"], "points": rows}
    if plot is not None:
        draw(rows, documents[0]["task"], plot)
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


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Hold what 'kvp eval TASK --out' wrote, of one bundle each, and no other JSON.")
    ],
    out: Annotated[Path, typer.Option(help="Markdown file to write.")],
) -> None:
    """Write the page of results from their JSON documents."""
    check_writable(out)
    write_text(out, page([read_results(folder) for folder in folders]))
    say_written(out)
