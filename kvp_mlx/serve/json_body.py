"""JSON over HTTP: bodies in, checked by pydantic, and answers out."""

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

Body = TypeVar("Body", bound=BaseModel)

BODY_SECONDS = 60.0


class JSONAnswer(Response):
    """A JSON answer; numbers that JSON does not have become null."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: dict[str, str] | None = None):
        super().__init__(to_json(content, inf_nan_mode="null"), status_code, headers)


async def read_body(request: Request, model: type[Body]) -> Body:
    """Return a request's body.

    Raises:
        HTTPException: it does not arrive.
        pydantic.ValidationError: it is no JSON, or not of this form.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await request.body()
    except TimeoutError as error:
        raise HTTPException(408, "the body did not arrive in time.") from error
    return model.model_validate_json(body)
