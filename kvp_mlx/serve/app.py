"""The application: its routes, what stands around them, and its end."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from .. import __version__
from . import anthropic, openai_chat, openai_completions, page, responses
from .dials import model_names, quality_of
from .errors import as_api_error, error_response
from .json_body import JSONAnswer
from .security import Guard
from .service import Service

PROTOCOLS: tuple[Callable[[Service], Sequence[BaseRoute]], ...] = (
    openai_chat.routes,
    openai_completions.routes,
    responses.routes,
    anthropic.routes,
    page.routes,
)
"""What gives each API's routes, and the page's."""


def create_app(service: Service) -> Starlette:
    """Return the server's application; when it ends, so does the scheduler."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.scheduler.close)

    cors = Middleware(
        CORSMiddleware, allow_origins=service.options.cors, allow_methods=["GET", "POST"], allow_headers=["*"]
    )
    app = Starlette(
        routes=[route for routes in (plain_routes, *PROTOCOLS) for route in routes(service)],
        middleware=[*([cors] if service.options.cors else []), Middleware(Guard, service=service)],
        exception_handlers={HTTPException: _refused},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


async def _refused(request: Request, error: Exception) -> Response:
    """Return what is told of an unknown route or a wrong method."""
    is_anthropic, told = "anthropic-version" in request.headers, as_api_error(error)
    if told.status == 404:
        paths = [route.path for route in request.app.routes if route.path.startswith("/v1") and "{" not in route.path]
        told.message = f"there is no such route here; there are {', '.join(paths)}."
    elif told.status == 405:
        told.message = f"this route takes {told.headers['Allow']} and no other method."
    return error_response(told, request.url.path, is_anthropic=is_anthropic)


def plain_routes(service: Service) -> list[Route]:
    """Return the routes that are no conversation."""
    now = datetime.now(UTC).replace(microsecond=0)

    def described(name: str) -> dict[str, Any]:
        """Return a model as both APIs describe one."""
        openai = {"id": name, "object": "model", "created": int(now.timestamp()), "owned_by": "kvp-mlx"}
        anthropic = {"type": "model", "display_name": name, "created_at": now.isoformat()}
        return {**openai, **anthropic, "context_length": service.model.context_length}

    async def models(_: Request) -> Response:
        names = model_names(service)
        pages = {"first_id": names[0], "last_id": names[-1], "has_more": False}
        return JSONAnswer({"object": "list", "data": [described(name) for name in names], **pages})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        quality_of(service, name)
        return JSONAnswer(described(name))

    async def health(_: Request) -> Response:
        return JSONAnswer({"status": "ok", "model": service.name, "version": __version__})

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(service.scheduler.statistics()), media_type=CONTENT_TYPE_LATEST)

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
