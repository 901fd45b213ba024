"""``kvp generate`` and ``kvp demo``."""

from typing import Annotated, Any

import mlx.core as mx
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..bundle.loading import KVPModel, load
from ..engine.context import Context
from ..engine.dial import Dial, dial_of
from ..engine.prompt import encode, render
from ..engine.reply import Piece, reply
from ..engine.saved_caches import load_cache, load_head, save_head
from ..errors import InputError
from .options import (
    DEFAULT_EXACT_TAIL,
    DEFAULT_MODEL,
    DEMO_DOCUMENT,
    AllowMismatch,
    Cache,
    ExactHead,
    ExactTail,
    Json,
    MaxTokens,
    Model,
    PrefillOption,
    Quality,
    Recompute,
    Seed,
    Temperature,
    TopP,
    make_sampler,
)
from .output import clean_stdout, print_json, progress_bar, read_text, say, summary

DEMO_DIALS = {
    "full prefill": Dial("full", 0, 0),
    "kvp": Dial("kvp", 0, 0),
    f"kvp, exact tail {DEFAULT_EXACT_TAIL}": Dial("kvp", 0, DEFAULT_EXACT_TAIL),
}
DEMO_QUESTION = "Who designed the third tower?"
WARM_UP_CHARACTERS = 1000


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; after --prompt-file, a question about it.")] = None,
    model: Model = DEFAULT_MODEL,
    prompt_file: Annotated[str | None, typer.Option(help="Read the prompt from a file, - for stdin.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    quality: Quality = "balanced",
    prefill: PrefillOption = None,
    exact_head: ExactHead = None,
    exact_tail: ExactTail = None,
    recompute: Recompute = None,
    cache: Cache = None,
    raw: Annotated[bool, typer.Option("--raw", help="Skip the chat template.")] = False,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Answer one prompt.

    Afterwards a line on stderr says which path it took and how soon the first token came.
    """
    text = "\n\n".join(part for part in (read_text(prompt_file) if prompt_file else None, prompt) if part)
    if not text.strip():
        raise InputError("there is no prompt; give one as an argument or with --prompt-file FILE.")
    if raw and cache is not None:
        raise InputError("a saved cache was built for the chat template; leave out --raw or --cache.")
    dial = dial_of(quality, path=prefill, exact_head=exact_head, exact_tail=exact_tail, recompute=recompute)
    head_tokens = dial.exact_head if exact_head is not None and dial.path != "full" else 0
    with clean_stdout(json):
        loaded = load(model, allow_base_mismatch=allow_base_mismatch)
        sampler = make_sampler(temperature, top_p, seed)
        if cache is None:
            context, ids = with_saved_head(loaded, encode(loaded, text, raw=raw), head_tokens)
        else:
            context, ids = with_saved_cache(loaded, cache, text, is_exact=dial.path == "full")
        pieces = answer(context, ids, dial, echo=not json, max_tokens=max_tokens, sampler=sampler)
        if pieces[-1].path == "kvp" and head_tokens > pieces[-1].cached_tokens:
            save_head(context, ids[:head_tokens])
    if json:
        print_json(report(pieces, dial))
    else:
        say(summary(pieces[-1]))


def with_saved_head(model: KVPModel, ids: list[int], head_tokens: int) -> tuple[Context, list[int]]:
    """Return a context with the saved entries of a prompt's first tokens, if there are any, and the prompt."""
    context = Context(model)
    if head_tokens:
        load_head(context, ids[:head_tokens])
    return context, ids


def with_saved_cache(model: KVPModel, name: str, text: str, *, is_exact: bool) -> tuple[Context, list[int]]:
    """Return a saved cache's context, and the prompt that goes on from it with ``text``.

    Raises:
        InputError: see ``load_cache``; with ``is_exact``, nothing of it may have been predicted.
    """
    saved, context = load_cache(model, name, exact=is_exact)
    return context, render(model.text_tokenizer, saved.messages_with(text))


def answer(context: Context, ids: list[int], dial: Dial, *, echo: bool, **options: Any) -> list[Piece]:
    """Answer a prompt, printing the pieces as they come if ``echo``."""
    mx.reset_peak_memory()
    with progress_bar("reading the prompt") as progress:
        stream = reply(context, ids, dial, progress=progress, **options)
        pieces = [next(stream)]
    if echo:
        print(pieces[0].text, end="", flush=True)
    for piece in stream:
        pieces.append(piece)
        if echo:
            print(piece.text, end="", flush=True)
    if echo:
        print(flush=True)
    return pieces


def report(pieces: list[Piece], dial: Dial) -> dict[str, Any]:
    """Return the JSON of ``kvp generate``."""
    last = pieces[-1]
    return {
        "text": "".join(piece.text for piece in pieces),
        "tokens": [piece.token for piece in pieces],
        "prompt_tokens": last.prompt_tokens,
        "prefill": last.path,
        "exact_tail": last.exact_tail,
        "ttft_ms": round(last.ttft_ms, 2),
        "auxiliary_prefill_ms": round(last.times.auxiliary_prefill_ms, 2),
        "predict_ms": round(last.times.predict_ms, 2),
        "recompute_ms": round(last.times.recompute_ms, 2),
        "recomputed_tokens": last.recomputed_tokens,
        "base_prefill_ms": round(last.times.base_prefill_ms, 2),
        "first_step_ms": round(last.first_step_ms, 2),
        "generation_tps": round(last.generation_tps, 2),
        "peak_memory_bytes": mx.get_peak_memory(),
        "finish_reason": last.finish_reason,
        "exact_head": dial.exact_head,
        "cached_tokens": last.cached_tokens,
    }


def demo(max_tokens: MaxTokens = 48) -> None:
    """Show both paths side by side.

    The same question about a shipped document, answered after full prefill and from the predicted cache.
    """
    model = load()
    document = DEMO_DOCUMENT.read_text(encoding="utf-8")
    warm_up, ids = encode(model, document[:WARM_UP_CHARACTERS]), encode(model, f"{document}\n\n{DEMO_QUESTION}")
    for path in ("full prefill", "kvp"):
        answer(Context(model), warm_up, DEMO_DIALS[path], echo=False, max_tokens=2)
    answers = {}
    for name, dial in DEMO_DIALS.items():
        say(f"Asking: {name} ...")
        answers[name] = answer(Context(model), ids, dial, echo=False, max_tokens=max_tokens)
    full = answers["full prefill"][-1]
    table = Table(title=f"{DEMO_QUESTION}  ({full.prompt_tokens} prompt tokens)")
    for column in ("path", "first token after", "sooner", "tokens/s", "answer"):
        table.add_column(column)
    for name, pieces in answers.items():
        last, text = pieces[-1], "".join(piece.text for piece in pieces).strip()
        seconds, sooner = f"{last.ttft_ms / 1e3:.2f} s", f"{full.ttft_ms / last.ttft_ms:.2f}x"
        table.add_row(name, seconds, sooner, f"{last.generation_tps:.1f}", Text(text))
    Console().print(table)
