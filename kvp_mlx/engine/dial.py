"""The dial: how a request's prompt is read."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from ..bundle.config import BundleConfig
from ..errors import InputError

Path = Literal["kvp", "full", "auto"]
BESIDE_QUALITY = ("exact_head", "exact_tail", "recompute", "refine_tokens")
"""What a quality sets beside the path."""
NEW_PREDICTOR = "'kvp train MODEL --layers K --data TEXT --out DIR' makes a bundle that has one"


@dataclass(frozen=True)
class Dial:
    """How a prompt is read, chosen per request.

    Attributes:
        path: ``kvp`` predicts, with ``full`` the base reads everything, ``auto`` predicts where that pays.
        exact_head: predicting, the base itself reads this many of the first tokens.
        exact_tail: predicting, it reads this many before the last, on top of the prediction.
        recompute: predicting, the share of the prompt's tokens that the base reads itself, on average over the
            predicted layers; None: the bundle's own.
        refine_tokens: having predicted, the base itself reads this many more of the tokens beside each one that it
            generates, from the front. It does not say how a prompt is read: dials that differ in it alone are equal.
        quality: the quality that it stands for, which a bundle may have measured dials of (``at``).
        given: names of what was chosen beside the quality, so that no measured dial replaces it.

    Raises:
        InputError: an unknown path, a negative number of tokens, or a share outside 0 to 1.
    """

    path: Path = "auto"
    exact_head: int = 32
    exact_tail: int = 32
    recompute: float | None = None
    refine_tokens: int = field(default=0, compare=False)
    quality: str | None = field(default=None, compare=False)
    given: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        """Check the values."""
        if self.path not in get_args(Path):
            raise InputError(f"prefill is one of {', '.join(get_args(Path))}, not '{self.path}'.")
        for name in ("exact_head", "exact_tail", "refine_tokens"):
            if (tokens := getattr(self, name)) < 0:
                raise InputError(f"{name} counts tokens, so it cannot be {tokens}.")
        if self.recompute is not None and not (math.isfinite(self.recompute) and 0 <= self.recompute <= 1):
            raise InputError(f"the share of tokens to recompute lies between 0 and 1, not at {self.recompute}.")

    def at(self, config: BundleConfig, prompt_tokens: int) -> "Dial":
        """Return the dial that its quality means for one prompt: the bundle's measured one, or the constants.

        What was chosen beside the quality stays. The result stands for no quality any more: equal ones read alike.

        Args:
            config: the bundle's.
            prompt_tokens: length of the whole prompt, cached or not.
        """
        measured = [dial for dial in config.dials if dial.quality == self.quality and dial.from_tokens <= prompt_tokens]
        own = replace(self, quality=None, given=())
        if not measured:
            return own
        last = max(measured, key=lambda dial: dial.from_tokens)
        values = last.model_dump(include={"path", *BESIDE_QUALITY}, exclude_none=True)
        return replace(own, **{name: value for name, value in values.items() if name not in self.given})

    def without_refinement(self) -> "Dial":
        """Return the same dial that refines nothing while it decodes, whatever its quality says."""
        return replace(self, refine_tokens=0, given=(*self.given, "refine_tokens"))

    def share(self, config: BundleConfig) -> float:
        """Return the share of tokens that a bundle is to recompute.

        Raises:
            InputError: above 0 for a bundle that cannot tell which tokens, or anything but ``full`` and ``auto`` for a
                model without a predictor.
        """
        if not config.has_predictor and (self.path == "kvp" or self.recompute):
            raise InputError(f"this model has no predictor, so prompts are read in full; {NEW_PREDICTOR}.")
        if self.recompute is None:
            return config.recompute.share if config.recompute is not None else 0.0
        if self.recompute and config.recompute is None:
            raise InputError(
                "this bundle cannot tell which tokens to recompute; fit or train it again, or leave it at 0 (a base "
                "with recurrent or sliding layers never recomputes: an exact tail goes on from what was predicted)."
            )
        return self.recompute

    def settled(self, config: BundleConfig, prompt_tokens: int, cached_tokens: int, auto_min: int) -> "Dial":
        """Return the dial that one prompt is read with: ``auto`` decided, the bundle's share filled in.

        ``auto`` predicts only where at least ``auto_min`` tokens would be. A prompt with nothing left to predict (one
        new token, or no more than are read exactly) is read in full.

        Args:
            config: the bundle's.
            prompt_tokens: length of the prompt.
            cached_tokens: how many of these the caches hold already.
            auto_min: see above; ``calibration.auto_min_tokens``.

        Raises:
            InputError: see ``share``.
        """
        share = self.share(config)
        predictable = self.predicted_tokens(prompt_tokens, cached_tokens)
        pays = self.path == "kvp" or (config.has_predictor and predictable >= auto_min)
        if self.path != "full" and predictable > 0 and pays:
            return replace(self, path="kvp", recompute=share)
        return replace(self, path="full", exact_tail=0, recompute=share)

    def predicted_tokens(self, prompt_tokens: int, cached_tokens: int) -> int:
        """Return how many tokens are left to predict between what is cached or exact and the exact tail."""
        return prompt_tokens - 1 - self.exact_tail - max(cached_tokens, self.exact_head)


FULL = Dial("full", 0, 0)
"""Read all of it exactly."""
PREDICT = Dial("kvp", 0, 0)
"""Predict everything but what the bundle recomputes."""
QUALITIES = {
    "fast": Dial("auto", 0, 32, refine_tokens=32, quality="fast"),
    "balanced": Dial("auto", 32, 32, refine_tokens=32, quality="balanced"),
    "exact": Dial("full", 0, 0, quality="exact"),
}
"""Where a bundle has measured none: chosen from the trade-off between recovery and time of one base (docs/chat.md)."""


def dial_of(
    quality: str = "balanced",
    path: Path | None = None,
    exact_head: int | None = None,
    exact_tail: int | None = None,
    recompute: float | None = None,
    refine_tokens: int | None = None,
) -> Dial:
    """Return a named quality with what is given beside it; ``Dial.at`` says what that means for a prompt.

    Where prediction is asked for by name (path ``kvp``), nothing is refined unless that is asked for, too.

    Raises:
        InputError: no such quality, what a prompt that is read in full cannot follow, or see ``Dial``.
    """
    if quality not in QUALITIES:
        raise InputError(f"quality is one of {', '.join(QUALITIES)}, not '{quality}'.")
    if path == "kvp" and refine_tokens is None:
        refine_tokens = 0  # whoever wants prediction in any case is shown prediction
    given: dict[str, Any] = {"path": path, "exact_head": exact_head, "exact_tail": exact_tail, "recompute": recompute}
    given |= {"refine_tokens": refine_tokens}
    given = {name: value for name, value in given.items() if value is not None}
    dial = replace(QUALITIES[quality], **given, given=tuple(given))
    idle = [name for name in BESIDE_QUALITY if given.get(name)]
    if dial.path == "full" and idle:
        raise InputError(
            f"{idle[0].replace('_', ' ')} says how a prompt is predicted, and full prefill predicts nothing; leave out "
            "one of the two."
        )
    return dial
