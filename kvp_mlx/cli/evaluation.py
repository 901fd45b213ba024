"""``kvp eval``."""

from pathlib import Path
from typing import Annotated

import typer

from .common import DEFAULT_MODEL, AllowMismatch, Json, clean_stdout, print_json, progress_bar

app = typer.Typer(help="Measure what a sooner first token costs.", rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Measure what a sooner first token costs."""


@app.command()
def context(
    data: Annotated[list[Path], typer.Option(help="Text file (.txt, .md, .jsonl, also .gz) or folder; repeatable.")],
    model: Annotated[str, typer.Argument(help="Bundle directory, Hub id or alias.")] = DEFAULT_MODEL,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Prompt length.")] = 384,
    continuation_tokens: Annotated[int, typer.Option(min=1, help="Tokens scored after it.")] = 128,
    limit: Annotated[int, typer.Option(min=2, help="Documents at most.")] = 24,
    seed: Annotated[int, typer.Option(help="Chooses the passages.")] = 0,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Measure context recovery.

    How much of what a prompt tells the full model still reaches it through the predicted cache.
    """
    from itertools import islice

    from ..bundle import load
    from ..evaluate.context import measure_context
    from ..train.text import data_files, token_windows

    files = data_files(data)
    length = prompt_tokens + continuation_tokens
    with clean_stdout(json), progress_bar("documents") as progress:
        loaded = load(model, allow_base_mismatch=allow_base_mismatch)
        windows = token_windows(files, loaded.text_tokenizer, length, seed)
        documents = list(islice((window for window in windows if len(window) == length), limit))
        result = measure_context(loaded, documents, continuation_tokens, progress=progress)
    if json:
        print_json(result)
        return
    for arm, row in result["arms"].items():
        print(f"{arm:20} nll {row['nll']:.3f}   recovery {row['recovery']:+.3f}")
    print(f"separation {result['separation']:.3f} over {result['documents']} documents")
