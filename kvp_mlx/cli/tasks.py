"""``kvp eval TASK``: the tasks that score answers, under any arms.

Each command below says what its task takes and returns the run; ``task_command`` adds what all of them take.
"""

import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .options import DEFAULT_MODEL, AllowMismatch, Json, parse_numbers
from .output import clean_stdout, print_json, progress_bar

if TYPE_CHECKING:
    from ..evaluate.runs import Run

ModelArgument = Annotated[str, typer.Argument(help="Bundle directory, Hub id or alias.")]
Data = Annotated[list[str], typer.Option(help="JSONL (also .gz): file, folder, pattern, hub:NAME; repeatable.")]
Text = Annotated[list[str] | None, typer.Option("--data", help="Text as for 'eval context' (default: our sample).")]
Arms = Annotated[
    str,
    typer.Option(
        help="full, kvp, kvp-N (exact tail), kvp-N-R (recomputed share), auxiliary, layers-R, random-R, static-R, "
        "lazy-A-B, spec-R."
    ),
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


def task_command(make_run: Callable[..., "Run"]) -> Callable[..., None]:
    """Return a task's command: its options are those of ``make_run``, then those of ``measure_and_print``."""
    own = inspect.signature(make_run).parameters
    shared = dict(list(inspect.signature(measure_and_print).parameters.items())[1:])

    def command(**given: Any) -> None:
        measure_and_print(make_run(**{name: given.pop(name) for name in own}), **given)

    typed: Any = command
    typed.__name__, typed.__doc__ = make_run.__name__, make_run.__doc__
    typed.__signature__ = inspect.Signature([*own.values(), *shared.values()])
    return command


def measure_and_print(
    run: "Run",
    model: ModelArgument = DEFAULT_MODEL,
    arms: Arms = "full,kvp",
    log: Log = None,
    out: Out = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Load, measure, and print the task's table or JSON."""
    from ..arms.arm import parse_arms
    from ..bundle.loading import load
    from ..evaluate.runs import carry_out
    from ..files import check_writable, write_json

    chosen = parse_arms(arms)
    check_writable(out, log)
    with clean_stdout(json), progress_bar(run.task) as progress:
        loaded = load(model, allow_base_mismatch=allow_base_mismatch)
        result = carry_out(run, loaded, model, chosen, log=log, progress=progress)
    if out is not None:
        write_json(out, result)
    if json:
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


def triviaqa(data: Data, shots: Shots = 1, max_tokens: MaxTokens = None, limit: Limit = None, seed: Seed = 0) -> "Run":
    """TriviaQA without passages, in the paper's template: exact match.

    Records have question and answers.
    """
    from ..evaluate import runs

    return runs.triviaqa(data, shots, max_tokens, limit, seed)


def squad(data: Data, max_tokens: MaxTokens = None, limit: Limit = None, seed: Seed = 0) -> "Run":
    """SQuAD, a passage and a question about it: F1 and exact match.

    Records have context, question and answers.
    """
    from ..evaluate import runs

    return runs.squad(data, max_tokens, limit, seed)


def gsm8k(data: Data, shots: Shots = 5, max_tokens: MaxTokens = None, limit: Limit = None, seed: Seed = 0) -> "Run":
    """GSM8K, word problems after solved examples: the right last number.

    Records have question and answer.
    """
    from ..evaluate import runs

    return runs.gsm8k(data, shots, max_tokens, limit, seed)


def mcq(data: Data, scoring: ScoringOption = Scoring.continuation, limit: Limit = None, seed: Seed = 0) -> "Run":
    """Multiple choice (ARC, PIQA): the likeliest continuation.

    Records have query, choices and gold.
    """
    from ..evaluate import runs

    return runs.mcq(data, scoring.value, limit, seed)


def needle(
    data: Text = None,
    prompt_tokens: Lengths = "256,512,1024",
    depths: Depths = "0,0.25,0.5,0.75,1",
    limit: Limit = 60,
    seed: Seed = 0,
) -> "Run":
    """A number hidden in a long text: found or not, by length and depth."""
    from ..evaluate import runs

    return runs.needle(data, parse_numbers(prompt_tokens, "--prompt-tokens"), parse_shares(depths), limit, seed)


def quote(
    data: Text = None,
    prompt_tokens: Lengths = "256,512,1024",
    depths: Depths = "0,0.25,0.5,0.75,1",
    limit: Limit = 60,
    seed: Seed = 0,
) -> "Run":
    """A marked sentence of a long text, to be repeated word for word, by length and depth."""
    from ..evaluate import runs

    return runs.quote(data, parse_numbers(prompt_tokens, "--prompt-tokens"), parse_shares(depths), limit, seed)


def parse_shares(text: str) -> list[float]:
    """Parse the numbers of ``--depths``.

    Raises:
        InputError: anything but numbers and commas.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--depths takes numbers and commas, not '{text}'.") from error


def chat(data: Data, limit: Limit = None, seed: Seed = 0) -> "Run":
    """Agreement with the full model's greedy reply over its first 16 tokens.

    Also the first token alone, and KL per token. Records have turns, messages or question.
    """
    from ..evaluate import runs

    return runs.chat(data, limit, seed)


def perplexity(
    data: Text = None,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens that the arm reads.")] = 384,
    continuation_tokens: Annotated[int, typer.Option(min=1, help="Tokens scored after them.")] = 128,
    limit: Limit = 100,
    seed: Seed = 0,
) -> "Run":
    """Perplexity of text after a prompt that the arm has read."""
    from ..evaluate import runs

    return runs.perplexity(data, prompt_tokens, continuation_tokens, limit, seed)


def humaneval(
    data: Data,
    samples: Annotated[int, typer.Option(min=1, help="Completions per problem: 1 is greedy; 10 gives pass@10.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of more than one.")] = 0.6,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run what the model writes, fenced in; nothing runs without.")
    ] = False,
    limit: Limit = None,
    seed: Seed = 0,
) -> "Run":
    """HumanEval: programs that pass their tests, pass@1 and pass@10.

    They run in a process with limits on time, memory, processes, files and network: a fence, not a virtual machine.
    """
    if not allow_code_execution:
        raise InputError("humaneval runs programs that a model wrote; allow it with --allow-code-execution.")
    from ..evaluate import runs

    return runs.humaneval(data, samples, temperature, limit, seed)
