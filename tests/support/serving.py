"""A real server on a real port, in a thread of this process."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from kvp_mlx.bundle.loading import load_any
from kvp_mlx.engine.speculative import NO_DRAFTS, Drafting
from kvp_mlx.serve.scheduler import Scheduler
from kvp_mlx.serve.server import Server, listen, url_of
from kvp_mlx.serve.service import ServeOptions, Service


@contextlib.contextmanager
def serving(
    model: Path, *, max_batch: int = 4, queue_limit: int = 64, drafting: Drafting = NO_DRAFTS, **options: object
) -> Iterator[tuple[str, Service]]:
    """Serve a model under the name ``tiny``; yields the server's URL and its service.

    Args:
        model: directory.
        max_batch: see ``Scheduler``.
        queue_limit: see ``Scheduler``.
        drafting: see ``Scheduler``.
        options: of ``ServeOptions``.
    """
    loaded = load_any(str(model))
    scheduler = Scheduler(loaded, max_batch=max_batch, queue_limit=queue_limit, drafting=drafting)
    service = Service(loaded, scheduler, ServeOptions(**options), "tiny")
    ready = threading.Event()
    server = Server(service, ready.set)
    with listen("127.0.0.1", 0) as listening:
        url = url_of(listening)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        assert ready.wait(30)
        try:
            yield url, service
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()
