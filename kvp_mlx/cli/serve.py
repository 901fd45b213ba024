"""``kvp serve``."""

import logging
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..bundle.loading import KVPModel, load_any
from ..device.hosts import Hosts, joined
from ..engine.speculative import DRAFT_TOKENS, Drafting
from ..errors import InputError
from ..files import expanded
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
from .output import say, show

try:
    from ..serve.hosts import Follower, LeadingScheduler
    from ..serve.scheduler import Scheduler
    from ..serve.security import is_loopback
    from ..serve.server import Server, listen, url_of
    from ..serve.service import ServeOptions, Service
except ImportError as error:
    raise InputError(f"'kvp serve' lacks a package ({error}); pip install 'kvp-mlx[serve]'.") from error

REQUESTS, CLIENTS = "Many requests", "Who may ask"
"""Headings of the help."""
GIB, MIB = 2**30, 2**20
OWN_SIGNAL_SECONDS = 0.5
"""In which a signal that another host heard arrives here by itself, as Ctrl-C does."""


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
        api_key=api_key and api_key.strip(),  # as that of a request is
        allowed_hosts=tuple(allow_host or ()),
        cors=tuple(cors or ()),
        max_body_bytes=int(max_body_mib * MIB),
    )
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(format="kvp: %(message)s", level=level, stream=sys.stderr, force=True)
    hosts, cache_bytes = joined(), int(cache_gib * GIB)
    if hosts is not None and cache_dir is not None:
        raise InputError("--cache-dir keeps whole caches, of which each of several hosts has a part; leave it out.")

    def opened() -> KVPModel:
        return open_model(model, load_any, base_name=base, allow_base_mismatch=allow_base_mismatch)

    if hosts is not None and hosts.rank:
        follower = Follower(opened(), hosts, max_batch=max_batch, cache_bytes=cache_bytes)
        pass_on_signals(hosts)
        follower.follow()
        return
    with listen(host, port) as listening:
        loaded = opened()
        say_reading(loaded, model)
        scheduler = scheduler_for(
            loaded,
            max_batch=max_batch,
            queue_limit=queue,
            slice_ms=prefill_slice_ms,
            cache_bytes=cache_bytes,
            cache_dir=cache_dir,
            drafting=Drafting(draft, draft_tokens),
        )
        service = Service(loaded, scheduler, options, served_name(model))

        def say_ready() -> None:
            show(f"serving {service.name} at {url_of(listening)}")
            sys.stdout.flush()

        server = Server(service, say_ready, is_verbose=verbose)
        if hosts is not None:
            end_with(hosts, lambda: server.should_exit)
        server.run(sockets=[listening])
        if hosts is not None and hosts.has_lost:
            raise SystemExit(1)  # it was said which one


def scheduler_for(model: KVPModel, **how: Any) -> Scheduler:
    """Return what runs a model, on one host or as the first of several."""
    if model.hosts is None:
        return Scheduler(model, **how)
    say(f"{model.hosts.size} hosts answer: without drafts, and predicted context stays as it is between requests.")
    return LeadingScheduler(model, model.hosts, **how)


def pass_on_signals(hosts: Hosts) -> None:
    """Let the first host end all in its own way where this one is to end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: hosts.ask_to_end())


def end_with(hosts: Hosts, is_ending: Callable[[], bool]) -> None:
    """End as after SIGTERM where another host is to end, or where ``mlx.launch`` is gone, which holds stdin open."""

    def wait_for_hosts() -> None:
        while hosts.hear() is not None:
            end()

    def wait_for_launcher() -> None:
        while os.read(0, 4096):
            continue
        end()

    def end() -> None:
        time.sleep(OWN_SIGNAL_SECONDS)
        if not is_ending():
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_for_hosts, daemon=True).start()
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=wait_for_launcher, daemon=True).start()


def served_name(model: str) -> str:
    """Return what clients call a model: its name or Hub id, of a path only the last part."""
    place = expanded(model)
    return place.resolve().name if place.is_dir() else model
