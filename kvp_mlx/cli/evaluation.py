"""``kvp eval``."""

from typing import Annotated

import typer

from . import results, tasks, turns
from .options import DEFAULT_MODEL, AllowMismatch, Json, Recompute
from .output import clean_stdout, print_json, progress_bar

CONTEXT_ARMS = ("full", "kvp", "auxiliary", "wrong_document", "wrong_document_full", "no_context")

app = typer.Typer(help="Measure what a sooner first token costs.", rich_markup_mode=None)
for task in (
    *(tasks.triviaqa, tasks.squad, tasks.gsm8k, tasks.mcq, tasks.humaneval),
    *(tasks.needle, tasks.quote, tasks.chat, tasks.perplexity),
):
    app.command()(tasks.task_command(task))
for command in (results.suite, results.lm_eval, results.pareto, results.diagnose, results.report):
    app.command()(command)
app.command("turns")(turns.turns)
app.command("dial")(turns.dial)


@app.callback()
def group() -> None:
    """Measure what a sooner first token costs."""


@app.command()
def context(
    data: Annotated[
        list[str], typer.Option(help="Text (.txt, .md, .jsonl, also .gz): file, folder, pattern, hub:NAME; repeatable.")
    ],
    model: Annotated[str, typer.Argument(help="Bundle directory, Hub id or alias.")] = DEFAULT_MODEL,
    arms: Annotated[str, typer.Option(help="What to measure; full and no_context always are.")] = ",".join(
        CONTEXT_ARMS
    ),
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Prompt length.")] = 384,
    continuation_tokens: Annotated[int, typer.Option(min=1, help="Tokens scored after it.")] = 128,
    exact_tail: Annotated[int, typer.Option(min=0, help="Prompt tokens before the last that the base reads.")] = 0,
    recompute: Recompute = None,
    limit: Annotated[int, typer.Option(min=2, help="Documents at most.")] = 24,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Also compare the caches layer by layer.")] = False,
    seed: Annotated[int, typer.Option(help="Chooses the passages.")] = 0,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Measure context recovery.

    How much of what a prompt tells the full model still reaches it through the predicted cache.
    """
    from itertools import islice

    from ..bundle.loading import load
    from ..evaluate.layers import measure_layers
    from ..train.recovery import ContextMeasurement
    from ..train.text import data_files, token_windows

    files = data_files(data)
    length = prompt_tokens + continuation_tokens
    with clean_stdout(json), progress_bar("documents") as progress:
        loaded = load(model, recompute=recompute, allow_base_mismatch=allow_base_mismatch)
        windows = token_windows(files, loaded.text_tokenizer, length, seed)
        documents = list(islice((window for window in windows if len(window) == length), limit))
        measurement = ContextMeasurement(
            loaded, documents, continuation_tokens, exact_tail=exact_tail, arms=arms.split(",")
        )
        result = measurement.measure(progress)
        if per_layer:
            result["layers"] = measure_layers(loaded, documents, continuation_tokens)
    if json:
        print_json(result)
        return
    for arm, row in result["arms"].items():
        print(f"{arm:20} nll {row['nll']:.3f}   recovery {row['recovery']:+.3f}")
    for row in result.get("layers", []):
        print("layer {layer:3}   key error {key_error:.3f}   value error {value_error:.3f}   ".format(**row), end="")
        print(f"attention cosine {row['attention_cosine']:.3f}")
    if result["separation"] is not None:
        print(f"separation {result['separation']:.3f} over {result['documents']} documents")
