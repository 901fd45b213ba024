"""The ``kvp`` field: which dial a request asks for, and what it is told of how its prompt was read."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..engine.dial import QUALITIES, Dial, Path, dial_of
from .errors import APIError
from .requests import Usage
from .service import Service

SUFFIXES = ("full", *QUALITIES)
"""What may follow a model's name: ``NAME:full``, for clients that can only choose a model."""
DEFAULT_NAME = "default"
"""A name that every server's model has beside its own."""


class KVPField(BaseModel):
    """A request's own dial; what it leaves out is as its quality says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    quality: Literal["fast", "balanced", "exact"] | None = None
    path: Path | None = None
    exact_head: int | None = Field(None, ge=0)
    exact_tail: int | None = Field(None, ge=0)
    recompute: float | None = Field(None, ge=0, le=1)
    refine_tokens: int | None = Field(None, ge=0)


def dial_for(service: Service, model: str | None, field: KVPField | None, *, has_tools: bool) -> Dial:
    """Return a request's dial: by its ``kvp`` field, the suffix of its model's name, what the server was told.

    Args:
        service: the server.
        model: what the request calls the model.
        field: its ``kvp``.
        has_tools: it brings tools or a JSON schema.

    Raises:
        APIError: no such model here.
        InputError: a dial that contradicts itself, or needs a predictor that the model does not have.
    """
    suffix = quality_of(service, model)
    asks = field.model_dump(exclude_none=True) if field else {}
    default = service.options.quality
    if has_tools and service.options.exact_for == "tools":
        default = "exact"
    quality = asks.pop("quality", None) or suffix or default
    if "path" in asks and asks["path"] != "full" and QUALITIES[quality].path == "full":
        quality = "balanced"  # NAME:full, which the request's own path overrules
    dial = dial_of(quality, **asks)
    dial.share(service.model.config)
    return dial


def quality_of(service: Service, model: str | None) -> str | None:
    """Return the quality that a model's name ends with.

    Raises:
        APIError: no such model here.
    """
    names = (service.name, DEFAULT_NAME, None)
    if model in names:
        return None
    name, _, suffix = str(model).rpartition(":")
    if name in names and suffix in SUFFIXES:
        return "exact" if suffix == "full" else suffix
    known = ", ".join(model_names(service))
    raise APIError(404, f"there is no such model here; there are {known}.", param="model", code="model_not_found")


def model_names(service: Service) -> list[str]:
    """Return what clients may call the model."""
    return [service.name, *(f"{service.name}:{suffix}" for suffix in SUFFIXES)]


def measured(usage: Usage) -> dict[str, Any]:
    """Return the ``kvp`` field of an answer's usage; ``draft`` is part of it where there were any."""
    drafted = {"draft": {"tokens": usage.drafted_tokens, "accepted": usage.accepted_tokens}}
    return {
        "path": usage.path,
        "predicted_tokens": usage.predicted_tokens,
        "recomputed_tokens": usage.recomputed_tokens,
        "exact_tokens": usage.exact_tokens,
        "queue_ms": round(usage.queue_ms, 2),
        "ttft_ms": round(usage.ttft_ms, 2),
        **(drafted if usage.drafted_tokens else {}),
    }
