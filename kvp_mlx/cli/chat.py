"""``kvp chat``: a conversation at the terminal or in a pipe."""

from typing import Annotated

import typer

from ..bundle.loading import load_any
from ..device.hosts import is_launched
from ..engine.conversation import Conversation
from ..engine.dial import dial_of
from ..engine.following import follow
from ..engine.speculative import DRAFT_TOKENS
from ..engine.worker import Worker
from ..errors import InputError
from .options import (
    DEFAULT_MODEL,
    READING,
    AllowMismatch,
    AnyModel,
    Cache,
    DraftOption,
    DraftTokens,
    ExactHead,
    ExactTail,
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
from .screen import leaving_on_ctrl_c
from .session import Session


def chat(
    model: AnyModel = DEFAULT_MODEL,
    system: System = None,
    template_arguments: TemplateArguments = None,
    cache: Cache = None,
    max_tokens: MaxTokens = 512,
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
    refine: Annotated[
        bool,
        typer.Option(
            "--refine/--no-refine",
            help="Recompute predicted context while the model writes, and while you read and type.",
            rich_help_panel=READING,
        ),
    ] = True,
    base: OtherBase = None,
    allow_base_mismatch: AllowMismatch = False,
) -> None:
    """Hold a conversation.

    Each turn reuses what the cache already holds; /help lists the commands. When the context window overflows, the
    oldest turns leave it until it is three quarters full, and a line says so.
    """
    if system is not None and cache is not None:
        raise InputError("--system and --cache both say how the conversation begins; give one.")
    dial = dial_of(quality, prefill, exact_head, exact_tail, recompute, refine_tokens)
    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed, stop or ())
    arguments = parse_template_arguments(template_arguments)
    session = Session(dial, refine and kv_bits is None and not is_launched(), max_tokens, sampling)
    session.keep_heads = exact_head is not None and not is_launched()

    def start() -> bool:
        loaded = open_model(model, load_any, base_name=base, allow_base_mismatch=allow_base_mismatch)
        check_predictor(loaded, model, dial)
        session.generation = quantised_cache(loaded, kv_bits) | drafting(loaded, draft, draft_tokens, kv_bits)
        if loaded.hosts is not None and loaded.hosts.rank:
            follow(loaded, loaded.hosts)
            return False
        session.open(Conversation(loaded, system, template_arguments=arguments), cache)
        return True

    session.worker = Worker(session.idle_work)
    try:
        with leaving_on_ctrl_c():
            if not session.worker.call(start):
                return
        say_reading(session.conversation.model, model)
        with leaving_on_ctrl_c() if is_launched() else session.handling_ctrl_c():
            session.run(model)
    finally:
        with leaving_on_ctrl_c():
            session.worker.close()
