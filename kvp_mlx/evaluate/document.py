"""What the documents of ``kvp eval TASK --out`` hold, as far as pages and pictures are made of it."""

from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ..errors import InputError


def _rising(interval: list[float]) -> list[float]:
    if interval != sorted(interval):
        raise ValueError("the interval ends before it begins")
    return interval


Interval = Annotated[list[FiniteFloat], Field(min_length=2, max_length=2), AfterValidator(_rising)]
Positive = Annotated[FiniteFloat, Field(gt=0)]


class Part(BaseModel):
    """A part of a document; what else it holds is not looked at."""

    model_config = ConfigDict(strict=True)


class Mean(Part):
    """A mean over items with its interval."""

    mean: FiniteFloat
    interval: Interval


class ArmScore(Part):
    """One arm's outcome."""

    score: FiniteFloat
    interval: Interval
    ttft_ms: Positive
    flops_ratio: Positive
    difference: Mean | None = None
    retention: Mean | None = None


class EqualTTFT(Part):
    """An arm that is as fast as another one."""

    arm: str
    other: str
    ttft_ratio: FiniteFloat
    difference: Mean


class Matched(Part):
    """A share of the prompt that was matched to an arm's time."""

    kind: str
    target: str
    arm: str | None
    ttft_ratio: FiniteFloat


class Cell(Part):
    """A place of a grid."""

    arm: str
    prompt_tokens: int
    depth: FiniteFloat
    score: FiniteFloat


class Machine(Part):
    """What was measured on."""

    chip: str
    blas_threads: int | None
    mlx: str
    mlx_lm: str
    commit: str | None


class Recipe(Part):
    """What rows depend on."""

    base: str
    predictor: str
    data: dict[str, str]
    seed: int
    kvp_mlx: str = ""


class Points(Part):
    """What a picture is made of."""

    task: str
    n: PositiveInt
    model: str
    arms: dict[str, ArmScore] = Field(min_length=1)
    recipe: dict[str, Any] = {}


class DialRow(Part):
    """One setting of a dial, measured on prompts of one length."""

    path: str
    exact_head: int
    exact_tail: int
    recompute: FiniteFloat
    prompt_tokens: PositiveInt
    ttft_ms: Positive
    sooner: Positive
    recovery: FiniteFloat


class Dials(Part):
    """What a picture of ``kvp eval dial``'s results is made of."""

    model: str
    documents: PositiveInt
    rows: list[DialRow] = Field(min_length=1)


class Document(Points):
    """What a page is made of."""

    prompt_tokens: PositiveInt
    recipe: Recipe  # type: ignore[assignment] # more of it is asked for
    machine: Machine | None = None
    equal_ttft: list[EqualTTFT] = []
    matched: list[Matched] = []
    grid: list[Cell] = []
    dials: list[str] = []
    notes: list[str] = []

    @model_validator(mode="after")
    def check_arms(self) -> Self:
        """Refuse comparisons with arms that the document lacks, or that lack the full model's."""
        if not {name for row in self.equal_ttft for name in (row.arm, row.other)} <= self.arms.keys():
            raise ValueError("equal_ttft names an arm that the document lacks")
        if "full" in self.arms and not all(arm.difference for arm in self.arms.values()):
            raise ValueError("an arm lacks its difference from the full model")
        return self


def checked_document(document: Any, where: str, kind: type[Part] = Points) -> dict[str, Any]:
    """Return a document that is what it has to be.

    Args:
        document: what a JSON file holds.
        where: what an error calls it.
        kind: what it has to be.

    Raises:
        InputError: it is something else, or was changed.
    """
    try:
        kind.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{where} was not written by 'kvp eval TASK --out', or changed ({place}: {first['msg']})."
        ) from error
    found: dict[str, Any] = document
    return found
