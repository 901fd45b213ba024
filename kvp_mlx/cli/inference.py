"""``kvp generate`` and ``kvp demo``."""

import contextlib
import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import Annotated, Any, TextIO

import mlx.core as mx
import typer

from ..bundle.loading import KVPModel, load_any
from ..device.hosts import is_launched, launched_rank
from ..engine.context import Context
from ..engine.dial import FULL, Dial, dial_of
from ..engine.following import follow
from ..engine.prompt import check_size, check_text, encode, render
from ..engine.reply import Piece, reply
from ..engine.saved_caches import load_cache, load_head, save_head
from ..engine.speculative import DRAFT_TOKENS
from ..errors import InputError
from .options import (
    DEFAULT_EXACT_TAIL,
    DEFAULT_MODEL,
    DEMO_DOCUMENT,
    AllowMismatch,
    AnyModel,
    Cache,
    DraftOption,
    DraftTokens,
    ExactHead,
    ExactTail,
    Json,
    KVBits,
    MaxTokens,
    MinP,
    OtherBase,
    PrefillOption,
    Quality,
    Recompute,
    RefineTokens,
    RepetitionPenalty,
    Sampling,
    Seed,
    Stop,
    System,
    Temperature,
    TemplateArguments,
    TopK,
    TopP,
    check_predictor,
    drafting,
    open_model,
    parse_template_arguments,
    quantised_cache,
    say_reading,
)
from .output import (
    clean_stdout,
    plural,
    print_json,
    progress_bar,
    read_piped,
    read_text,
    say_outcome,
    show,
    show_answer,
)

DEMO_DIALS = {
    "full prefill": FULL,
    "kvp": Dial("kvp", 0, 0),
    f"kvp, exact tail {DEFAULT_EXACT_TAIL}": Dial("kvp", 0, DEFAULT_EXACT_TAIL),
}
DEMO_QUESTION = "Who designed the third tower?"
DEMO_COLUMNS = 80
WARM_UP_CHARACTERS = 1000

ShowPiece = Callable[[Piece], None]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; after --prompt-file, a question about it.")] = None,
    prompt_option: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt, as an option.")] = None,
    model: AnyModel = DEFAULT_MODEL,
    prompt_file: Annotated[
        list[str] | None,
        typer.Option("--prompt-file", help="Read the prompt from a file, - for stdin; several go by their names."),
    ] = None,
    system: System = None,
    template_arguments: TemplateArguments = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    kv_bits: KVBits = None,
    draft: DraftOption = "none",
    draft_tokens: DraftTokens = DRAFT_TOKENS,
    quality: Quality = "balanced",
    prefill: PrefillOption = None,
    exact_head: ExactHead = None,
    exact_tail: ExactTail = None,
    recompute: Recompute = None,
    refine_tokens: RefineTokens = None,
    cache: Cache = None,
    raw: Annotated[bool, typer.Option("--raw", help="Skip the chat template.")] = False,
    base: OtherBase = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
    json_stream: Annotated[
        bool, typer.Option("--json-stream", help="A JSON line for each piece; the last one tells what --json does.")
    ] = False,
) -> None:
    """Answer one prompt.

    What is piped in follows the prompt. Afterwards a line on stderr says which path it took and how soon the first
    token came.
    """
    if prompt is not None and prompt_option is not None:
        raise InputError("the prompt is given twice, as an argument and by --prompt; give it once.")
    if json and json_stream:
        raise InputError("--json and --json-stream both say what stdout holds; give one.")
    refuse_contradictions(raw=raw, cache=cache, system=system, arguments=template_arguments)
    dial = dial_of(quality, prefill, exact_head, exact_tail, recompute, refine_tokens)
    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed, stop or ())
    arguments = parse_template_arguments(template_arguments)
    text = "" if launched_rank() else prompt_text(prompt_file or [], prompt if prompt_option is None else prompt_option)
    keeps_head = exact_head is not None and dial.path != "full" and not is_launched()
    head_tokens = dial.exact_head if keeps_head else 0
    stdout = sys.stdout
    with clean_stdout(json or json_stream):
        loaded = open_model(model, load_any, base_name=base, allow_base_mismatch=allow_base_mismatch)
        check_predictor(loaded, model, dial)
        options = sampling.options(len(loaded.text_tokenizer)) | quantised_cache(loaded, kv_bits)
        options |= drafting(loaded, draft, draft_tokens, kv_bits)
        if loaded.hosts is not None and loaded.hosts.rank:
            follow(loaded, loaded.hosts)
            return
        if cache is None:
            ids = encode(loaded, text, raw=raw, system=system, template_arguments=arguments)
            context = with_saved_head(loaded, ids, head_tokens)
        else:
            context, ids = with_saved_cache(loaded, cache, text, arguments, is_exact=dial.path == "full")
        say_reading(loaded, model)
        dial = dial.at(loaded.config, len(ids))
        show_piece = print_line_of(dial, stdout) if json_stream else (ignore if json else echo)
        pieces = answer(context, ids, dial, show_piece=show_piece, max_tokens=max_tokens, **options)
        if pieces[-1].path == "kvp" and head_tokens > pieces[-1].cached_tokens:
            save_head(context, ids[:head_tokens])
    if json:
        print_json({"text": "".join(piece.text for piece in pieces), **report(pieces, dial)})
    elif not json_stream:
        show()
        say_outcome(pieces[-1], max_tokens)


def refuse_contradictions(*, raw: bool, cache: str | None, system: str | None, arguments: str | None) -> None:
    """Refuse options of which one makes another idle.

    Raises:
        InputError: there are such.
    """
    if raw and cache is not None:
        raise InputError("a saved cache was built for the chat template; leave out --raw or --cache.")
    if raw and (system is not None or arguments is not None):
        name = "--system" if system is not None else "--chat-template-args"
        raise InputError(f"--raw skips the chat template, which {name} is for; leave out one of the two.")
    if system is not None and cache is not None:
        raise InputError("--system and --cache both say how the conversation begins; give one.")


def prompt_text(files: list[str], prompt: str | None) -> str:
    """Return the whole prompt: files in their order (several by their names), the prompt, what is piped in.

    Raises:
        InputError: none of these, or one that cannot be read.
    """
    if files.count("-") > 1:
        raise InputError("--prompt-file - is given twice, and stdin can be read once; give it once.")
    texts = [read_text(file) for file in files]
    if len(files) > 1:
        names = ["stdin" if file == "-" else file for file in files]
        texts = [f"{name}:\n{text}" for name, text in zip(names, texts, strict=True)]
    piped = "" if "-" in files else read_piped()
    text = "\n\n".join(part for part in (*texts, prompt, piped if piped.strip() else None) if part)
    if not text.strip():
        raise InputError("there is no prompt; give one as an argument, with --prompt-file FILE or through a pipe.")
    return text


def with_saved_head(model: KVPModel, ids: list[int], head_tokens: int) -> Context:
    """Return a context with the saved entries of a prompt's first tokens, if there are any."""
    context = Context(model)
    if head_tokens:
        load_head(context, ids[:head_tokens])
    return context


def with_saved_cache(
    model: KVPModel, name: str, text: str, arguments: dict[str, Any], *, is_exact: bool
) -> tuple[Context, list[int]]:
    """Return a saved cache's context, and the prompt that goes on from it with ``text``.

    Raises:
        InputError: see ``load_cache``; with ``is_exact``, nothing of it may have been predicted.
    """
    check_text(text)
    check_size(model, text)
    saved, context = load_cache(model, name, exact=is_exact)
    return context, render(model.text_tokenizer, saved.messages_with(text), arguments=arguments)


def answer(context: Context, ids: list[int], dial: Dial, *, show_piece: ShowPiece, **options: Any) -> list[Piece]:
    """Answer a prompt, showing the pieces as they come."""
    mx.reset_peak_memory()
    with progress_bar("reading the prompt, tokens") as progress:
        stream = reply(context, ids, dial, progress=progress, **options)
        pieces = [next(stream)]
    show_piece(pieces[0])
    is_silent = show_piece is ignore
    with progress_bar("answering, tokens at most") if is_silent else contextlib.nullcontext(ignore) as progress:
        for piece in stream:
            pieces.append(piece)
            show_piece(piece)
            progress(len(pieces), options["max_tokens"])
    return pieces


def echo(piece: Piece) -> None:
    """Print a piece of an answer."""
    show_answer(piece.text)


def ignore(*_: Any) -> None:
    """Print nothing yet."""


def print_line_of(dial: Dial, stdout: TextIO) -> ShowPiece:
    """Return what prints a JSON line for each piece; the last one also has what is known of the whole answer."""
    pieces: list[Piece] = []

    def print_line(piece: Piece) -> None:
        pieces.append(piece)
        line: dict[str, Any] = {"text": piece.text, "token": piece.token, "finish_reason": piece.finish_reason}
        if piece.finish_reason:
            line |= report(pieces, dial)
        with contextlib.redirect_stdout(stdout):
            print_json(line, indent=None)

    return print_line


def report(pieces: list[Piece], dial: Dial) -> dict[str, Any]:
    """Return the JSON of ``kvp generate``, without the text."""
    last = pieces[-1]
    return {
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
        "new_tokens": last.new_tokens,
        "predicted_tokens": last.predicted_tokens,
        "exact_tokens": last.exact_tokens,
        "refine_tokens": dial.refine_tokens,
        "refined_tokens": last.refined_tokens,
        "draft": draft_counts(pieces),
    }


def draft_counts(pieces: list[Piece]) -> dict[str, Any] | None:
    """Return how many tokens the auxiliary proposed for an answer, and how many were right; None without."""
    tokens, accepted = pieces[-1].drafted_tokens, sum(piece.from_draft for piece in pieces)
    return {"tokens": tokens, "accepted": accepted, "acceptance": round(accepted / tokens, 3)} if tokens else None


def demo(max_tokens: MaxTokens = 96) -> None:
    """Show both paths side by side.

    The same question about a shipped document, answered after full prefill and from the predicted cache; whole
    answers, also where they go wrong.
    """
    model = open_model(DEFAULT_MODEL)
    document = DEMO_DOCUMENT.read_text(encoding="utf-8")
    warm_up, ids = encode(model, document[:WARM_UP_CHARACTERS]), encode(model, f"{document}\n\n{DEMO_QUESTION}")
    for path in ("full prefill", "kvp"):
        answer(Context(model), warm_up, DEMO_DIALS[path], show_piece=ignore, max_tokens=2)
    show(f"{DEMO_QUESTION}  ({len(ids):,} prompt tokens)")
    full_ms = None
    for name, dial in DEMO_DIALS.items():
        pieces = answer(Context(model), ids, dial, show_piece=ignore, max_tokens=max_tokens)
        full_ms = full_ms or pieces[-1].ttft_ms
        show_block(name, pieces, full_ms)


def show_block(name: str, pieces: list[Piece], full_ms: float) -> None:
    """Print one path's times and its whole answer, in lines that a terminal has."""
    last, text = pieces[-1], "".join(piece.text for piece in pieces).strip()
    cut = f" [cut off after {plural(last.generation_tokens, 'token')}]" if last.finish_reason == "length" else ""
    sooner = f", {full_ms / last.ttft_ms:.2f}x as soon" if last.path == "kvp" else ""
    show(f"\n{name}: first token after {last.ttft_ms / 1e3:.2f} s{sooner}, then {last.generation_tps:.1f} tokens/s")
    columns = max(20, min(DEMO_COLUMNS, shutil.get_terminal_size().columns))
    for paragraph in f"{text}{cut}".split("\n\n"):
        show(textwrap.fill(" ".join(paragraph.split()), columns, initial_indent="  ", subsequent_indent="  "))
