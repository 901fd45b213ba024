"""``kvp serve``."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..bundle.loading import load_any
from ..engine.speculative import DRAFT_TOKENS, Drafting
from ..errors import InputError
from .options import (
    DEFAULT_MODEL,
    READING,
    AllowMismatch,
    AnyModel,
    DraftOption,
    DraftTokens,
    OtherBase,
    open_model,
    say_reading,
)
from .output import show

try:
    from ..serve.scheduler import Scheduler
    from ..serve.security import is_loopback
    from ..serve.server import Server, listen, url_of
    from ..serve.service import ServeOptions, Service
except ImportError as error:
    raise InputError(f"'kvp serve' lacks a package ({error}); pip install 'kvp-mlx[serve]'.") from error

REQUESTS, CLIENTS = "Many requests", "Who may ask"
"""Headings of the help."""
GIB, MIB = 2**30, 2**20


def serve(
    model: AnyModel = DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option("--host", help="Where to listen; beyond this machine needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8080,
    quality: Annotated[
        Literal["fast", "balanced", "exact"],
        typer.Option("--quality", help="Of requests that do not say.", rich_help_panel=READING),
    ] = "balanced",
    exact_for: Annotated[
        Literal["tools"] | None,
        typer.Option("--exact-for", help="tools: full prefill for tools and JSON schemas.", rich_help_panel=READING),
    ] = None,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Answers at once.", rich_help_panel=REQUESTS)
    ] = 8,
    queue: Annotated[
        int, typer.Option("--queue", min=1, help="Requests that may wait; more get 429.", rich_help_panel=REQUESTS)
    ] = 64,
    prefill_slice_ms: Annotated[
        float,
        typer.Option(
            "--prefill-slice-ms",
            min=1.0,
            help="How long reading a prompt may hold up other answers at a time.",
            rich_help_panel=REQUESTS,
        ),
    ] = 200.0,
    cache_gib: Annotated[
        float,
        typer.Option(
            "--cache-gib", min=0.0, help="Memory for what was read of conversations.", rich_help_panel=REQUESTS
        ),
    ] = 4.0,
    cache_dir: Annotated[
        Path | None,
        typer.Option("--cache-dir", help="Keep that here from one start to the next.", rich_help_panel=REQUESTS),
    ] = None,
    draft: DraftOption = "none",
    draft_tokens: DraftTokens = DRAFT_TOKENS,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="KVP_API_KEY", help="What clients must send.", rich_help_panel=CLIENTS),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="A name of this server (a proxy's); repeatable.", rich_help_panel=CLIENTS),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", help="An origin whose pages may call, or *; repeatable.", rich_help_panel=CLIENTS),
    ] = None,
    max_body_mib: Annotated[
        float, typer.Option("--max-body-mib", min=0.001, help="The largest request.", rich_help_panel=CLIENTS)
    ] = 64.0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every request's route and status.")] = False,
    base: OtherBase = None,
    allow_base_mismatch: AllowMismatch = False,
) -> None:
    """Serve the OpenAI and Anthropic APIs.

    A request chooses how its prompt is read by the model's name (NAME:full, NAME:fast, NAME:balanced, NAME:exact) or a
    field "kvp": {"quality": "fast"}. --draft is for answers that are decoded alone. Ctrl-C lets running answers end; a
    second one does not.
    """
    if api_key is None and not is_loopback(host):
        raise InputError(f"{host} is reached from other machines, so set a key: --api-key or KVP_API_KEY.")
    if api_key is not None and not api_key.strip():
        raise InputError("--api-key is empty; give it some text, or leave it out.")
    options = ServeOptions(
        quality=quality,
        exact_for=exact_for,
        host=host,
        api_key=api_key,
        allowed_hosts=tuple(allow_host or ()),
        cors=tuple(cors or ()),
        max_body_bytes=int(max_body_mib * MIB),
    )
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(format="kvp: %(message)s", level=level, stream=sys.stderr, force=True)
    with listen(host, port) as listening:
        loaded = open_model(model, load_any, base_name=base, allow_base_mismatch=allow_base_mismatch)
        say_reading(loaded, model)
        scheduler = Scheduler(
            loaded,
            max_batch=max_batch,
            queue_limit=queue,
            slice_ms=prefill_slice_ms,
            cache_bytes=int(cache_gib * GIB),
            cache_dir=cache_dir,
            drafting=Drafting(draft, draft_tokens),
        )
        service = Service(loaded, scheduler, options, served_name(model))

        def say_ready() -> None:
            show(f"serving {service.name} at {url_of(listening)}")
            sys.stdout.flush()

        Server(service, say_ready, is_verbose=verbose).run(sockets=[listening])


def served_name(model: str) -> str:
    """Return what clients call a model: its name or Hub id, of a path only the last part."""
    place = Path(model).expanduser()
    return place.resolve().name if place.is_dir() else model
