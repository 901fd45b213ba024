"""``kvp eval TASK``: the tasks that score answers, under any arms."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .common import DEFAULT_MODEL, AllowMismatch, Json, clean_stdout, print_json, progress_bar

if TYPE_CHECKING:
    from ..bundle import KVPModel
    from ..evaluate.loop import Measure
    from ..evaluate.tasks import Item

ModelArgument = Annotated[str, typer.Argument(help="Bundle directory, Hub id or alias.")]
Data = Annotated[list[str], typer.Option(help="JSONL (also .gz): file, folder, pattern, hub:NAME; repeatable.")]
Text = Annotated[list[str] | None, typer.Option("--data", help="Text as for 'eval context' (default: our sample).")]
Arms = Annotated[
    str,
    typer.Option(help="full, kvp, kvp-N (exact tail), auxiliary, layers-R, random-R, static-R, lazy-A-B, spec-R."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Items at most; a larger limit extends a smaller one.")]
Seed = Annotated[int, typer.Option(help="Orders the items, and draws what is drawn.")]
Shots = Annotated[int, typer.Option(min=0, help="Solved examples before each question.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Tokens to generate at most (default: the task's).")]
Lengths = Annotated[str, typer.Option("--prompt-tokens", help="Prompt lengths, comma-separated.")]
Depths = Annotated[str, typer.Option(help="Places in the passage, 0 its start, 1 its end.")]
Log = Annotated[Path | None, typer.Option(help="Rows as they come (JSONL); a begun one is gone on with.")]
Out = Annotated[Path | None, typer.Option(help="Also write the JSON document here.")]


class Scoring(StrEnum):
    """How the arm kvp scores a given continuation."""

    continuation = "continuation"
    predicted = "predicted"


ScoringOption = Annotated[
    Scoring, typer.Option(help="continuation: the base goes on from the prompt; predicted: the paper's, all predicted.")
]


@dataclass(frozen=True)
class Common:
    """What every task takes."""

    model: str
    arms: str
    limit: int | None
    seed: int
    log: Path | None
    out: Path | None
    allow_base_mismatch: bool
    json: bool


def triviaqa(
    data: Data,
    model: ModelArgument = DEFAULT_MODEL,
    arms: Arms = "full,kvp",
    limit: Limit = None,
    shots: Shots = 1,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    log: Log = None,
    out: Out = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """TriviaQA without passages, in the paper's template: exact match.

    Records have question and answers.
    """
    from ..evaluate.measures import measure_generation
    from ..evaluate.tasks import triviaqa_items

    common = Common(model, arms, limit, seed, log, out, allow_base_mismatch, json)
    measure = measure_generation("triviaqa", max_tokens)
    options = {"data": hashes(data), "shots": shots, "max_tokens": max_tokens}
    run_task("triviaqa", common, lambda _: triviaqa_items(data, shots, seed), measure, options)


def squad(
    data: Data,
    model: ModelArgument = DEFAULT_MODEL,
    arms: Arms = "full,kvp",
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    log: Log = None,
    out: Out = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """SQuAD, a passage and a question about it: F1 and exact match.

    Records have context, question and answers.
    """
    from ..evaluate.measures import measure_generation
    from ..evaluate.tasks import squad_items

    common = Common(model, arms, limit, seed, log, out, allow_base_mismatch, json)
    measure = measure_generation("squad", max_tokens)
    run_task(
        "squad", common, lambda _: squad_items(data, seed), measure, {"data": hashes(data), "max_tokens": max_tokens}
    )


def gsm8k(
    data: Data,
    model: ModelArgument = DEFAULT_MODEL,
    arms: Arms = "full,kvp",
    limit: Limit = None,
    shots: Shots = 5,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    log: Log = None,
    out: Out = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """GSM8K, word problems after solved examples: the right last number.

    Records have question and answer.
    """
    from ..evaluate.measures import measure_generation
    from ..evaluate.tasks import gsm8k_items

    common = Common(model, arms, limit, seed, log, out, allow_base_mismatch, json)
    measure = measure_generation("gsm8k", max_tokens)
    options = {"data": hashes(data), "shots": shots, "max_tokens": max_tokens}
    run_task("gsm8k", common, lambda _: gsm8k_items(data, shots, seed), measure, options)


def mcq(
    data: Data,
    model: ModelArgument = DEFAULT_MODEL,
    arms: Arms = "full,kvp",
    limit: Limit = None,
    scoring: ScoringOption = Scoring.continuation,
    seed: Seed = 0,
    log: Log = None,
    out: Out = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Multiple choice (ARC, PIQA): the likeliest continuation.

    Records have query, choices and gold.
    """
    from ..evaluate.measures import measure_choice
    from ..evaluate.tasks import choice_items

    common = Common(model, arms, limit, seed, log, out, allow_base_mismatch, json)
    options = {"data": hashes(data), "scoring": scoring.value}
    run_task("mcq", common, lambda _: choice_items(data, seed), measure_choice(scoring.value), options)


def needle(
    data: Text = None,
    model: ModelArgument = DEFAULT_MODEL,
    arms: Arms = "full,kvp",
    limit: Limit = 60,
    prompt_tokens: Lengths = "256,512,1024",
    depths: Depths = "0,0.25,0.5,0.75,1",
    seed: Seed = 0,
    log: Log = None,
    out: Out = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """A number hidden in a long text: found or not, by length and depth."""
    from ..evaluate.measures import measure_generation
    from ..evaluate.tasks import needle_items

    common = Common(model, arms, limit, seed, log, out, allow_base_mismatch, json)
    run_grid("needle", common, needle_items, measure_generation("needle"), data or [], prompt_tokens, depths)


def quote(
    data: Text = None,
    model: ModelArgument = DEFAULT_MODEL,
    arms: Arms = "full,kvp",
    limit: Limit = 60,
    prompt_tokens: Lengths = "256,512,1024",
    depths: Depths = "0,0.25,0.5,0.75,1",
    seed: Seed = 0,
    log: Log = None,
    out: Out = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """A marked sentence of a long text, to be repeated word for word, by length and depth."""
    from ..evaluate.measures import measure_generation
    from ..evaluate.tasks import quote_items

    common = Common(model, arms, limit, seed, log, out, allow_base_mismatch, json)
    run_grid("quote", common, quote_items, measure_generation("quote"), data or [], prompt_tokens, depths)


def chat(
    data: Data,
    model: ModelArgument = DEFAULT_MODEL,
    arms: Arms = "full,kvp",
    limit: Limit = None,
    seed: Seed = 0,
    log: Log = None,
    out: Out = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Agreement with the full model's greedy reply over its first 16 tokens.

    Also the first token alone, and KL per token. Records have turns, messages or question.
    """
    from ..evaluate.measures import measure_chat
    from ..evaluate.tasks import chat_items

    common = Common(model, arms, limit, seed, log, out, allow_base_mismatch, json)
    run_task("chat", common, lambda _: chat_items(data, seed), measure_chat, {"data": hashes(data)})


def perplexity(
    data: Text = None,
    model: ModelArgument = DEFAULT_MODEL,
    arms: Arms = "full,kvp",
    limit: Limit = 100,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens that the arm reads.")] = 384,
    continuation_tokens: Annotated[int, typer.Option(min=1, help="Tokens scored after them.")] = 128,
    seed: Seed = 0,
    log: Log = None,
    out: Out = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Perplexity of text after a prompt that the arm has read."""
    from ..evaluate.measures import measure_perplexity
    from ..evaluate.measures import perplexity as of_losses
    from ..evaluate.records import SAMPLE
    from ..evaluate.tasks import window_items

    places = data or [str(SAMPLE)]
    common = Common(model, arms, limit, seed, log, out, allow_base_mismatch, json)
    options = {"data": hashes(places), "prompt_tokens": prompt_tokens, "continuation_tokens": continuation_tokens}

    def items(loaded: "KVPModel") -> "list[Item]":
        return window_items(places, loaded.text_tokenizer, prompt_tokens, continuation_tokens, seed, limit)

    run_task("perplexity", common, items, measure_perplexity, options, statistic=of_losses)


def humaneval(
    data: Data,
    model: ModelArgument = DEFAULT_MODEL,
    arms: Arms = "full,kvp",
    limit: Limit = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions per problem: 1 is greedy; 10 gives pass@10.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of more than one.")] = 0.6,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run what the model writes, fenced in; nothing runs without.")
    ] = False,
    seed: Seed = 0,
    log: Log = None,
    out: Out = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """HumanEval: programs that pass their tests, pass@1 and pass@10.

    They run in a process with limits on time, memory, processes, files and network: a fence, not a virtual machine.
    """
    if not allow_code_execution:
        raise InputError("humaneval runs programs that a model wrote; allow it with --allow-code-execution.")
    from ..evaluate.measures import measure_humaneval
    from ..evaluate.tasks import humaneval_items

    common = Common(model, arms, limit, seed, log, out, allow_base_mismatch, json)
    options = {"data": hashes(data), "samples": samples, "temperature": temperature}
    measure = measure_humaneval(samples, temperature, seed)
    run_task("humaneval", common, lambda _: humaneval_items(data), measure, options)


def hashes(places: list[str]) -> dict[str, str]:
    """Return the data files' names and SHA-256, for the recipe."""
    from ..files import sha256_of
    from ..train.text import data_files

    return {path.name: sha256_of(path) for path in data_files(places)}


def numbers(text: str, option: str) -> list[float]:
    """Parse comma-separated numbers.

    Raises:
        InputError: anything else.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} takes numbers and commas, not '{text}'.") from error


def run_grid(
    task: str,
    common: Common,
    make_items: "Callable[..., list[Item]]",
    measure: "Measure",
    data: list[str],
    prompt_tokens: str,
    depths: str,
) -> None:
    """Run a task whose items cycle through lengths and depths."""
    from ..evaluate.records import SAMPLE, read_texts

    places = data or [str(SAMPLE)]
    lengths, parts = [int(n) for n in numbers(prompt_tokens, "--prompt-tokens")], numbers(depths, "--depths")
    if bad := [part for part in parts if not 0 <= part <= 1]:
        raise InputError(f"--depths lie between 0 and 1, not at {bad[0]:g}.")
    options = {"data": hashes(places), "prompt_tokens": lengths, "depths": parts}

    def items(loaded: "KVPModel") -> "list[Item]":
        texts, count = read_texts(places), common.limit or len(lengths) * len(parts)
        return make_items(texts, loaded.text_tokenizer, lengths, parts, common.seed, count)

    run_task(task, common, items, measure, options, with_grid=True)


def run_task(
    task: str,
    common: Common,
    make_items: "Callable[[KVPModel], list[Item]]",
    measure: "Measure",
    options: dict[str, Any],
    *,
    with_grid: bool = False,
    **how: Any,
) -> None:
    """Load, measure, and print the task's table or JSON."""
    from ..arms import parse_arms
    from ..bundle import bundle_directory, load
    from ..evaluate.loop import grid, run_items, summarise
    from ..files import sha256_of, write_json

    arms = parse_arms(common.arms)
    for path in (common.out, common.log):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise InputError(f"{path} is a folder or lies in none; name a file.")
    with clean_stdout(common.json), progress_bar(task) as progress:
        loaded = load(common.model, allow_base_mismatch=common.allow_base_mismatch)
        items = make_items(loaded)[: common.limit]
        recipe = {
            "task": task,
            "base": loaded.config.base.fingerprint,
            "predictor": f"sha256:{sha256_of(bundle_directory(common.model) / 'predictor.safetensors')}",
            "seed": common.seed,
            **options,
        }
        rows = run_items(loaded, arms, items, measure, recipe=recipe, log=common.log, progress=progress)
    result = summarise(task, loaded, arms, rows, **how)
    if with_grid:
        result["grid"] = grid(items, rows)
    result |= {"model": common.model, "layers": loaded.config.auxiliary.layers, "recipe": recipe}
    if common.out is not None:
        write_json(common.out, result)
    if common.json:
        print_json(result)
        return
    print_result(result)


def print_result(result: dict[str, Any]) -> None:
    """Print a task's arms for people."""
    print(f"{result['task']}: {result['n']} items, {result['prompt_tokens']} prompt tokens (median)")
    for name, arm in result["arms"].items():
        low, high = arm["interval"]
        more = "".join(f"   {metric} {value:.3f}" for metric, value in arm["metrics"].items())
        print(f"{name:16} {arm['score']:.3f} [{low:.3f}, {high:.3f}]   TTFT {arm['ttft_ms']:.0f} ms{more}")


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
    from ..arms import parse_arms
    from ..bundle import load
    from ..evaluate.harness import KVPLM, run_harness
    from ..files import write_json

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
    from ..files import write_json

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

    Layers that hurt most, an auxiliary that does not fit, a gain in time that does not show.
    """
    from ..bundle import load
    from ..evaluate.diagnose import diagnose as examine
    from ..evaluate.records import SAMPLE
    from ..evaluate.tasks import window_items

    with clean_stdout(json), progress_bar("examining") as progress:
        loaded = load(model, allow_base_mismatch=allow_base_mismatch)
        places, tokenizer = data or [str(SAMPLE)], loaded.text_tokenizer
        items = window_items(places, tokenizer, prompt_tokens, continuation_tokens, seed, limit)
        windows = [item.extra["prompt"] + item.extra["rest"] for item in items]
        result = examine(loaded, windows, continuation_tokens, progress)
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
    for found in result["findings"]:
        print("{problem}: {evidence}. To do: {remedy}.".format(**found))
    if not result["findings"]:
        print("nothing stands out")


def report(
    folder: Annotated[Path, typer.Argument(help="Holds what 'kvp eval TASK --out' wrote, and no other JSON.")],
    out: Annotated[Path, typer.Option(help="Markdown file to write.")],
) -> None:
    """Write the page of results from their JSON documents."""
    from ..evaluate.report import page, read_results

    out.write_text(page(read_results(folder)), encoding="utf-8")
