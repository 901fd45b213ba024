"""``kvp eval TASK``: a command for each task, made from its record."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..arms.kinds import KINDS
from ..errors import InputError
from ..evaluate.likelihood import Scoring
from ..evaluate.runs import answering_arms, carry_out
from ..evaluate.task import Run, Task
from ..files import check_writable, write_json
from .options import (
    DEFAULT_MODEL,
    AllowCode,
    AllowMismatch,
    ContinuationTokens,
    DataSeed,
    ItemData,
    Json,
    Limit,
    ModelArgument,
    OtherBase,
    OutFile,
    PromptLengths,
    PromptTokens,
    TextOrSample,
    open_model,
    parse_numbers,
)
from .output import clean_stdout, print_json, progress_bar, say_written, show

ANSWERING_FORMS = ", ".join(kind.form for kind in KINDS.values() if kind.read is not None)
AnsweringArms = Annotated[
    str,
    typer.Option(
        "--arms", help=f"Comma-separated: {ANSWERING_FORMS}; N is an exact tail, after kvp-N- R a recomputed share."
    ),
]
ScoringOption = Annotated[
    Scoring,
    typer.Option(
        "--scoring", help="continuation: the base goes on from the prompt; predicted: the paper's, all predicted."
    ),
]
PERMISSION = "allow_code_execution"
Log = Annotated[Path | None, typer.Option("--log", help="Rows as they come (JSONL); a begun one is gone on with.")]


def parse_shares(text: str, option: str = "--depths") -> list[float]:
    """Parse what an option says, numbers and commas.

    Raises:
        InputError: anything but numbers and commas.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} takes numbers and commas, not '{text}'.") from error


OPTIONS: dict[str, Any] = {
    "data": ItemData,
    "texts": TextOrSample,
    "sources": Annotated[
        list[str],
        typer.Option("--data", help="Python: .py files, folders of them, or JSONL with 'text' (also .gz); repeatable."),
    ],
    "shots": Annotated[int, typer.Option("--shots", min=0, help="Solved examples before each question.")],
    "max_tokens": Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Tokens to generate at most (default: the task's).")
    ],
    "scoring": ScoringOption,
    "lengths": PromptLengths,
    "depths": Annotated[str, typer.Option("--depths", help="Places in the passage, 0 its start, 1 its end.")],
    "prompt_tokens": PromptTokens,
    "continuation_tokens": ContinuationTokens,
    "samples": Annotated[
        int, typer.Option("--samples", min=1, help="Completions per problem: 1 is greedy; 10 gives pass@10.")
    ],
    "temperature": Annotated[float, typer.Option("--temperature", min=0.0, help="Of more than one.")],
    "chat": Annotated[bool, typer.Option("--chat", help="Ask through the chat template.")],
    "limit": Limit,
    "seed": DataSeed,
}
"""The options of all tasks, by the parameters of ``Task.run``."""
PARSERS: dict[str, Callable[[str], Any]] = {
    "lengths": lambda text: parse_numbers(text, "--prompt-tokens"),
    "depths": parse_shares,
}
"""What reads those that hold several numbers."""


def task_command(task: Task) -> Callable[..., None]:
    """Return a task's command: its own options, then those of ``measure_and_print``."""
    own = [option_of(parameter) for parameter in inspect.signature(task.run).parameters.values()]
    permission = [inspect.Parameter(PERMISSION, own[0].kind, default=False, annotation=AllowCode)]
    shared = list(inspect.signature(measure_and_print).parameters.values())[1:]

    def command(**given: Any) -> None:
        if task.runs_code and not given.pop(PERMISSION):
            raise InputError(f"{task.name} runs programs that a model wrote; allow it with --allow-code-execution.")
        values = {parameter.name: given.pop(parameter.name) for parameter in own}
        parsed = {name: PARSERS[name](value) if name in PARSERS else value for name, value in values.items()}
        measure_and_print(task.run(**parsed), **given)

    typed: Any = command
    typed.__name__, typed.__doc__ = task.name, task.run.__doc__
    typed.__signature__ = inspect.Signature([*own, *(permission if task.runs_code else []), *shared])
    return command


def option_of(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return a parameter of ``Task.run`` as typer takes it, several numbers as text."""
    default = parameter.default
    if parameter.name in PARSERS:
        default = ",".join(f"{number:g}" for number in default)
    return parameter.replace(annotation=OPTIONS[parameter.name], default=default)


def measure_and_print(
    run: Run,
    model: ModelArgument = DEFAULT_MODEL,
    arms: AnsweringArms = "full,kvp",
    log: Log = None,
    out: OutFile = None,
    base: OtherBase = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Load, measure, and print the task's table or JSON."""
    chosen = answering_arms(arms)
    check_writable(out, log)
    with clean_stdout(json):
        loaded = open_model(model, base_name=base, allow_base_mismatch=allow_base_mismatch)
    with clean_stdout(json), progress_bar(f"measuring {run.task}, rows") as progress:
        result = carry_out(run, loaded, model, chosen, log=log, progress=progress)
    if out is not None:
        write_json(out, result)
        say_written(out)
    if json:
        print_json(result)
        return
    print_result(result)


def print_result(result: dict[str, Any]) -> None:
    """Print a task's arms for people."""
    show(f"{result['task']}: {result['n']} items, {result['prompt_tokens']} prompt tokens (median)")
    for name, arm in result["arms"].items():
        low, high = arm["interval"]
        more = "".join(f"   {metric} {value:.3f}" for metric, value in arm["metrics"].items())
        show(f"{name:16} {arm['score']:.3f} [{low:.3f}, {high:.3f}]   TTFT {arm['ttft_ms']:.0f} ms{more}")
