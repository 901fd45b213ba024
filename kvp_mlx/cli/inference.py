"""``kvp generate`` and ``kvp demo``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .options import (
    DEFAULT_EXACT_TAIL,
    DEFAULT_MODEL,
    AllowMismatch,
    ExactHead,
    ExactTail,
    Json,
    MaxTokens,
    Model,
    PrefillOption,
    Quality,
    QualityChoice,
    Recompute,
    Seed,
    Temperature,
    TopP,
    make_dial,
    make_sampler,
)
from .output import clean_stdout, print_json, progress_bar, read_text, say

if TYPE_CHECKING:
    from ..bundle.loading import KVPModel
    from ..engine.context import Context
    from ..engine.reply import Response

DEMO_ARMS = {
    "full prefill": ("full", 0),
    "kvp": ("kvp", 0),
    f"kvp, exact tail {DEFAULT_EXACT_TAIL}": ("kvp", DEFAULT_EXACT_TAIL),
}
DEMO_DOCUMENT = Path(__file__).parents[1] / "data" / "demo.md"
WARM_UP_CHARACTERS = 1000
DEMO_QUESTION = "Who designed the third tower?"


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; after --prompt-file, a question about it.")] = None,
    model: Model = DEFAULT_MODEL,
    prompt_file: Annotated[str | None, typer.Option(help="Read the prompt from a file, - for stdin.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    quality: Quality = QualityChoice.balanced,
    prefill: PrefillOption = None,
    exact_head: ExactHead = None,
    exact_tail: ExactTail = None,
    recompute: Recompute = None,
    cache: Annotated[str | None, typer.Option("--cache", help="Begin with a saved cache ('kvp cache build').")] = None,
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
    from ..bundle.loading import load
    from ..engine.saved_caches import save_head

    if raw and cache is not None:
        raise InputError("a saved cache was built for the chat template; leave out --raw or --cache.")
    dial = make_dial(quality.value, prefill and prefill.value, exact_head, exact_tail)
    with clean_stdout(json):
        loaded = load(model, recompute=recompute, allow_base_mismatch=allow_base_mismatch)
        keep_head = exact_head is not None and dial.prefill != "full"
        options = vars(dial) | {"max_tokens": max_tokens, "sampler": make_sampler(temperature, top_p, seed)}
        if cache is None and not keep_head:
            held, result = 0, answer(loaded, text, echo=not json, raw=raw, **options)
        else:
            head = dial.exact_head if keep_head else 0
            ids, context = prepared(loaded, text, raw=raw, cache=cache, exact=dial.prefill == "full", saved_head=head)
            held, result = len(context.tokens), answer(loaded, ids, echo=not json, cache=context.cache, **options)
            if result["prefill"] == "kvp" and head > held:
                context.grown_to(ids[:head])
                save_head(context, ids[:head])
    result |= {"exact_head": dial.exact_head, "cached_tokens": held}
    if json:
        print_json(result)
    else:
        say(summary(result))


def prepared(
    loaded: "KVPModel", text: str, *, raw: bool, cache: str | None, exact: bool, saved_head: int
) -> tuple[list[int], "Context"]:
    """Return a prompt's token ids, and the context that holds what is saved of its beginning.

    Args:
        loaded: the bundle.
        text: the prompt, or what is asked of the saved cache.
        raw: skip the chat template.
        cache: name of a saved cache.
        exact: refuse it if it was predicted.
        saved_head: without one, look for the saved entries of this many first tokens.
    """
    from mlx_lm.utils import common_prefix_len

    from ..engine.context import Context
    from ..engine.prompt import check_context, encode
    from ..engine.saved_caches import load_cache, load_head

    if cache is None:
        ids, context = encode(loaded, text, raw=raw), Context(loaded)
        if saved_head:
            load_head(context, ids[:saved_head])
    else:
        saved, context = load_cache(loaded, cache, exact=exact)
        ids = loaded.text_tokenizer.apply_chat_template(saved.messages_with(text), add_generation_prompt=True)
        check_context(loaded, len(ids))
    context.keep(common_prefix_len(context.tokens, ids[:-1]))
    return ids, context


def answer(loaded: "KVPModel", text: str | list[int], *, echo: bool, **options: Any) -> dict[str, Any]:
    """Generate an answer, printing it as it comes if ``echo``, and return the JSON of ``kvp generate``."""
    import mlx.core as mx

    from ..engine.reply import stream_generate

    mx.reset_peak_memory()
    pieces: list[Response] = []
    with progress_bar("reading the prompt") as progress:
        stream = stream_generate(loaded, text, progress=progress, **options)
        pieces.append(next(stream))
    if echo:
        print(pieces[0].text, end="", flush=True)
    for piece in stream:
        pieces.append(piece)
        if echo:
            print(piece.text, end="", flush=True)
    if echo:
        print()
    last = pieces[-1]
    return {
        "text": "".join(piece.text for piece in pieces),
        "tokens": [piece.token for piece in pieces],
        "prompt_tokens": last.prompt_tokens,
        "prefill": last.prefill,
        "exact_tail": last.exact_tail,
        "ttft_ms": round(last.ttft_ms, 2),
        "auxiliary_prefill_ms": round(last.times.auxiliary_prefill_ms, 2),
        "predict_ms": round(last.times.predict_ms, 2),
        "recompute_ms": round(last.times.recompute_ms, 2),
        "recomputed_tokens": last.times.recomputed_tokens,
        "base_prefill_ms": round(last.times.base_prefill_ms, 2),
        "first_step_ms": round(last.first_step_ms, 2),
        "generation_tps": round(last.generation_tps, 2),
        "peak_memory_bytes": mx.get_peak_memory(),
        "finish_reason": last.finish_reason,
    }


def summary(result: dict[str, Any]) -> str:
    """Return the line that follows an answer: path, prompt length, time to first token, decoding speed."""
    path = "predicted cache (kvp)" if result["prefill"] == "kvp" else "full prefill"
    return (
        f"{path}, {result['prompt_tokens']} prompt tokens, first token after {result['ttft_ms'] / 1e3:.2f} s, "
        f"then {result['generation_tps']:.1f} tokens/s"
    )


def demo(max_tokens: MaxTokens = 48) -> None:
    """Show both paths side by side.

    The same question about a shipped document, answered after full prefill and from the predicted cache.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..bundle.loading import load

    loaded = load()
    document = DEMO_DOCUMENT.read_text(encoding="utf-8")
    text = f"{document}\n\n{DEMO_QUESTION}"
    for path in ("full", "kvp"):
        answer(loaded, document[:WARM_UP_CHARACTERS], echo=False, prefill=path, max_tokens=2)
    results = {}
    for name, (path, tail) in DEMO_ARMS.items():
        say(f"Asking: {name} ...")
        results[name] = answer(loaded, text, echo=False, prefill=path, exact_tail=tail, max_tokens=max_tokens)
    full = results["full prefill"]
    table = Table(title=f"{DEMO_QUESTION}  ({full['prompt_tokens']} prompt tokens)")
    for column in ("path", "first token after", "sooner", "tokens/s", "answer"):
        table.add_column(column)
    for name, result in results.items():
        seconds, sooner = result["ttft_ms"] / 1e3, full["ttft_ms"] / result["ttft_ms"]
        speed = f"{result['generation_tps']:.1f}"
        table.add_row(name, f"{seconds:.2f} s", f"{sooner:.2f}x", speed, Text(result["text"].strip()))
    Console().print(table)
