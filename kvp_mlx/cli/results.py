"""``kvp eval``'s commands beside the tasks: lm-evaluation-harness, pictures, pages, and what is wrong with a bundle."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from .options import DEFAULT_MODEL, AllowMismatch, Json
from .output import clean_stdout, print_json, progress_bar, say
from .tasks import Arms, Limit, ModelArgument, Out, Scoring, ScoringOption, Seed, Text


def lm_eval(
    tasks: Annotated[str, typer.Option(help="Its tasks, or ours (kvp_triviaqa, kvp_humaneval), comma-separated.")],
    model: ModelArgument = DEFAULT_MODEL,
    arms: Arms = "full,kvp",
    limit: Limit = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Solved examples (default: the task's).")] = None,
    data: Annotated[list[str] | None, typer.Option(help="JSONL in place of the tasks' own data.")] = None,
    scoring: ScoringOption = Scoring.continuation,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Let tasks run what the model writes.")
    ] = False,
    out: Out = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Run lm-evaluation-harness's tasks under any arms (pip install 'kvp-mlx[eval]').

    JSON: its own results, per arm and task.
    """
    from ..arms.arm import parse_arms
    from ..bundle.loading import load
    from ..evaluate.harness import KVPLM, run_harness
    from ..files import check_writable, write_json

    check_writable(out)
    chosen, names = parse_arms(arms), [name.strip() for name in tasks.split(",")]
    with clean_stdout(True):
        loaded = load(model, allow_base_mismatch=allow_base_mismatch)
        how: dict[str, Any] = {"limit": limit, "shots": shots, "data": data or []}
        results = {
            arm.name: run_harness(
                KVPLM(loaded, arm, scoring.value), names, allow_code_execution=allow_code_execution, **how
            )["results"]
            for arm in chosen
        }
    result = {"model": model, "scoring": scoring.value, "arms": results}
    if out is not None:
        write_json(out, result)
    if json:
        print_json(result)
        return
    for arm_name, of_arm in results.items():
        for task, scores in of_arm.items():
            shown = {key.split(",")[0]: value for key, value in scores.items() if isinstance(value, float)}
            print(f"{arm_name:16} {task:20}", "   ".join(f"{key} {value:.3f}" for key, value in shown.items()))


def pareto(
    results: Annotated[list[Path], typer.Argument(help="What 'kvp eval TASK --out' wrote, all of one task.")],
    plot: Annotated[Path | None, typer.Option(help="Draw it here (.png, .svg, .pdf).")] = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Score against time to first token and against prefill work, over arms, dials and bundles."""
    from json import loads

    from ..evaluate.pareto import draw, points
    from ..files import check_writable, write_json

    check_writable(out, plot)
    documents = []
    for path in results:
        try:
            documents.append(loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is no JSON document of 'kvp eval TASK --out' ({error}).") from error
    rows = points(documents)
    document = {"task": documents[0]["task"], "points": rows}
    if plot is not None:
        draw(rows, documents[0]["task"], plot)
    if out is not None:
        write_json(out, document)
    if json:
        print_json(document)
        return
    print(f"{document['task']}, n = {rows[0]['n']} (* none is both faster and as good, + none cheaper and as good)")
    for row in rows:
        mark = ("*" if row["fastest_so_good"] else " ") + ("+" if row["cheapest_so_good"] else " ")
        low, high = row["interval"]
        print(
            f"{mark} {row['label']:24} {row['score']:.3f} [{low:.3f}, {high:.3f}]   TTFT {row['ttft_ms']:.0f} ms   "
            f"work {1 / row['flops_ratio']:.2f} of full"
        )


def diagnose(
    data: Text = None,
    model: ModelArgument = DEFAULT_MODEL,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Prompt length.")] = 384,
    continuation_tokens: Annotated[int, typer.Option(min=1, help="Tokens scored after it.")] = 64,
    limit: Annotated[int, typer.Option(min=2, help="Documents.")] = 4,
    seed: Seed = 0,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Say what is wrong with a bundle and what to do about it.

    Layers that hurt most, facts that are lost, an auxiliary that does not fit, a gain in time that does not show.
    """
    from ..bundle.loading import load
    from ..evaluate.diagnose import NEEDLE_DEPTHS, NEEDLE_LENGTHS
    from ..evaluate.diagnose import diagnose as examine
    from ..evaluate.records import SAMPLE, read_texts
    from ..evaluate.tasks import needle_items, window_items

    with clean_stdout(json), progress_bar("examining") as progress:
        loaded = load(model, allow_base_mismatch=allow_base_mismatch)
        places, tokenizer = data or [str(SAMPLE)], loaded.text_tokenizer
        items = window_items(places, tokenizer, prompt_tokens, continuation_tokens, seed, limit)
        windows = [item.extra["prompt"] + item.extra["rest"] for item in items]
        cells = len(NEEDLE_LENGTHS) * len(NEEDLE_DEPTHS)
        needles = needle_items(read_texts([]), tokenizer, NEEDLE_LENGTHS, NEEDLE_DEPTHS, seed, cells)
        result = examine(loaded, windows, continuation_tokens, progress, needles=needles)
    if json:
        print_json(result)
        return
    for row in result["layers"]:
        print(
            "layer {layer:3}   gain of exact entries {gain:+.3f}   attention cosine {attention_cosine:.3f}".format(
                **row
            )
        )
    print(
        "TTFT {full_ms:.0f} ms full, {kvp_ms:.0f} ms kvp: {speedup:.2f}x of {flops_ratio:.2f}x".format(**result["ttft"])
    )
    print("needles found: full {full}, kvp {kvp}, kvp-64 {kvp-64} of {of}".format(**result["needles"]))
    for found in result["findings"]:
        print("{problem}: {evidence}. To do: {remedy}.".format(**found))
    if not result["findings"]:
        print("nothing stands out")


def suite(
    data: Annotated[Path, typer.Argument(help="Folder with the tasks' files (README, 'Evaluating').")],
    model: Annotated[str, typer.Option("--model", help="Bundle directory, Hub id or alias.")] = DEFAULT_MODEL,
    results: Annotated[Path, typer.Option(help="Folder for a JSON document per task.")] = Path("docs/results"),
    records: Annotated[Path | None, typer.Option(help="Folder for the rows (default: RESULTS/records).")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these of the plan, comma-separated.")] = None,
    limit: Limit = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Time three items a task and print the plan.")] = False,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="HumanEval too, which runs what the model writes.")
    ] = False,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Measure all tasks, beside token pruning at equal TTFT.

    Goes on where it stopped. Several processes on one folder share the work; OPENBLAS_NUM_THREADS=1 gives each a core.
    """
    from ..bundle.loading import load
    from ..evaluate.suite import estimate, plan, run_suite

    entries = plan(data, limit, None if tasks is None else [name.strip() for name in tasks.split(",")])
    if not allow_code_execution and any(entry.name == "humaneval" for entry in entries):
        say("humaneval is left out: it runs programs that a model wrote (--allow-code-execution).")
        entries = [entry for entry in entries if entry.name != "humaneval"]
    places = results, records or results / "records"
    with clean_stdout(json), progress_bar("rows") as progress:
        loaded = load(model, allow_base_mismatch=allow_base_mismatch)
        if dry_run:
            rows = []
            for row in estimate(entries, loaded, model, places[1]):
                rows.append(row)
                if not json:
                    print_estimate(row, sum(row["hours"] for row in rows))
            done: list[str] = []
        else:
            rows, done = [], run_suite(entries, loaded, model, *places, progress=progress, say=say)
    if json:
        print_json({"plan": rows, "done": done})


def print_estimate(row: dict[str, Any], hours: float) -> None:
    """Print one task of the plan for people, with the hours up to its end."""
    print(f"{row['name']:12} n {row['n']:4}   {row['prompt_tokens']:4} prompt tokens   {row['hours']:5.2f} h", end="")
    print(f"   {hours:5.2f} h in all")
    print("    " + "   ".join(f"{arm} {seconds:.2f} s" for arm, seconds in row["seconds_per_item"].items()))


def report(
    folder: Annotated[Path, typer.Argument(help="Holds what 'kvp eval TASK --out' wrote, and no other JSON.")],
    out: Annotated[Path, typer.Option(help="Markdown file to write.")],
) -> None:
    """Write the page of results from their JSON documents."""
    from ..evaluate.report import page, read_results
    from ..files import check_writable, write_text

    check_writable(out)
    write_text(out, page(read_results(folder)))
