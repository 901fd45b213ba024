"""The page at ``/``: chat, dial and race, in plain HTML, CSS and JavaScript modules that the package brings."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from .service import Service

FOLDER = Path(__file__).with_name("static")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes(_: Service) -> list[BaseRoute]:
    """Return the routes of the page and its parts, which need no key; what the page asks for does."""

    async def page(_: Request) -> Response:
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    return [Route("/", page), Mount("/static", StaticFiles(directory=FOLDER))]
