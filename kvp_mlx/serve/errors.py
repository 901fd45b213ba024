"""What a client is told when something is wrong: one exception, and the shape that each API has for it."""

import logging
import re
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..errors import InputError, KVPError, PromptTooLongError
from .json_body import JSONAnswer
from .ticket import QueueFullError

log = logging.getLogger(__name__)

OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""By HTTP status; other 4xx are ``invalid_request_error`` in both APIs, other 5xx the server's."""
CHOICE = re.compile(r"[\[(]|^(str|int|float|bool|none|[A-Z]\w*)$")
"""What pydantic puts into a place beside field names and numbers: which of several types it tried."""


class APIError(Exception):
    """A request that gets an error for an answer.

    Attributes:
        status: HTTP's.
        message: for the client.
        param: the field of the body that is wrong (OpenAI).
        code: a word for programs (OpenAI).
        headers: to send beside it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}


def as_api_error(error: Exception) -> APIError:
    """Return what an exception means to the client; what nobody foresaw is logged, by its type alone."""
    match error:
        case APIError():
            return error
        case ValidationError():
            return _invalid(error)
        case HTTPException():
            return APIError(error.status_code, error.detail, headers=dict(error.headers or {}))
        case QueueFullError():
            seconds = str(error.retry_after_seconds)
            return APIError(429, str(error), code="rate_limit_exceeded", headers={"Retry-After": seconds})
        case KVPError():
            return _ours(error)
    log.error("a request failed: %s", type(error).__name__, exc_info=error if log.isEnabledFor(logging.INFO) else None)
    return APIError(500, f"the server failed at this request ({type(error).__name__}).", code="server_error")


def _ours(error: KVPError) -> APIError:
    if isinstance(error, PromptTooLongError):  # clients that shorten their conversation look for these words
        return APIError(400, f"prompt is too long: {error}", code="context_length_exceeded")
    return APIError(400 if isinstance(error, InputError) else 500, str(error))


def shutting_down() -> APIError:
    """Return what a request is told that the server's end cuts off."""
    return APIError(503, "the server is shutting down.", code="shutting_down", headers={"Connection": "close"})


def _invalid(error: ValidationError) -> APIError:
    """Return what is wrong with a body; of a union's choices the one that came furthest."""
    deepest = max(error.errors(include_url=False, include_context=False, include_input=False), key=_depth)
    place = ".".join(str(part)[:100] for part in deepest["loc"] if not CHOICE.search(str(part)))
    message = deepest["msg"].removeprefix("Value error, ")
    return APIError(400, f"{place}: {message}" if place else message, param=place or None)


def _depth(problem: Any) -> int:
    return len(problem["loc"])


def openai_error(error: APIError) -> dict[str, Any]:
    """Return an error as the OpenAI API tells it."""
    kind = OPENAI_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def anthropic_error(error: APIError) -> dict[str, Any]:
    """Return an error as the Anthropic API tells it."""
    kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def error_response(error: APIError, path: str, *, is_anthropic: bool = False) -> Response:
    """Return the answer, in the shape of the API that ``path`` belongs to (or of Anthropic's client elsewhere)."""
    shape = anthropic_error if is_anthropic or path.startswith("/v1/messages") else openai_error
    return JSONAnswer(shape(error), error.status, error.headers)
