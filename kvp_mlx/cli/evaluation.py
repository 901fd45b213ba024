"""``kvp eval``: its tasks (see ``tasks``), and what is measured and written beside them."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..arms.kinds import split_names
from ..device.machine import describe_machine
from ..engine.dial import Dial
from ..evaluate.diagnose import diagnose as examine
from ..evaluate.diagnose import short_needles
from ..evaluate.layers import measure_layers
from ..evaluate.likelihood import Scoring
from ..evaluate.records import SAMPLE
from ..evaluate.runs import answering_arms
from ..evaluate.suite import ARMS as SUITE_ARMS
from ..evaluate.suite import estimate, plan, run_suite
from ..evaluate.tasks import all_tasks
from ..evaluate.turns import measure_sets, read_conversations, script_sets, yield_times_ms
from ..files import check_writable
from ..train.recovery import ARMS, RecoveryMeasurement
from ..train.text import data_files
from .options import (
    DEFAULT_MODEL,
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
    PromptTokens,
    Recompute,
    TextData,
    TextOrSample,
    open_model,
)
from .output import clean_stdout, progress_bar, progress_lines, say, show, show_table
from .tasks import AnsweringArms, ScoringOption, task_command
from .trade import dial, documents_of, hand_out, pareto, report

app = typer.Typer(help="Measure what a sooner first token costs.", rich_markup_mode=None)
for task in all_tasks().values():
    app.command(task.name)(task_command(task))


@app.callback()
def group() -> None:
    """Measure what a sooner first token costs."""


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
        how: dict[str, Any] = {"exact_tail": exact_tail, "recompute": share, "arms": split_names(arms)}
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
    if result["divergence"] is not None:
        show(f"divergence {result['divergence']:.3f} nats a token from full prefill")


app.command()(dial)


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


app.command()(pareto)
app.command()(report)
