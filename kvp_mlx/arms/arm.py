"""An arm: one way from a prompt to its first token. ``kinds`` has the table of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..bundle.loading import KVPModel
from ..engine.clock import Ready
from ..engine.dial import PREDICT, Dial
from ..engine.prefill import PrefillTimes
from ..errors import InputError
from ..models.families import Cache, fixed_kinds
from .work import Work

Numbers = tuple[float, ...]
Engine = Callable[[KVPModel, mx.array, int], list[int]]
"""From the bundle, whole prompts ``(B, N)`` and tokens per chunk to the first token of each."""


@dataclass(frozen=True)
class Reading:
    """How a prompt is to be read, beside which arm.

    Attributes:
        dial: of the arms that predict.
        step_size: tokens per chunk (None: ``default_step_size()``).
        seed: of the arm ``random``.
        with_last: read the last token with the others where that saves a step (see ``engine.prefill.filling``).
        times: filled with what each part took.
    """

    dial: Dial = PREDICT
    step_size: int | None = None
    seed: int = 0
    with_last: bool = False
    times: PrefillTimes = field(default_factory=PrefillTimes)


@dataclass(frozen=True)
class Kind:
    """Everything that is known of one kind of arm; the row of ``kinds.KINDS`` is the only place.

    Attributes:
        form: how its names look.
        help: what it does, in a line.
        read: reads all of a prompt ``(B, N)`` but its last token; returns the model that decodes and its evaluated
            cache, or what else ``Ready`` has. None: an engine of its own does the whole prompt.
        work: FLOPs and weight bytes of the first token, given a prompt's length and a batch size.
        networks: the mlx-lm models whose caches it fills, the one that decodes last.
        numbers: how many follow the name, each a share of the prompt, above 0 and up to 1.
        parse: reads what follows the name, where that is anything else or there is more to check.
        refine_tokens: how many tokens of a prompt of so many the model then reads exactly beside each of its answer.
        prunes: it leaves tokens of the prompt out.
        predicts: it predicts entries, and holds the maps.
        is_of_bundle: it runs more than the base, so that it differs between bundles of one base.
        engine: opens its own engine, given the longest prompt.
        is_foreign: its engine does not run in MLX: one prompt at a time, on the default model's own file.
    """

    form: str
    help: str
    read: Callable[[KVPModel, Numbers, mx.array, Reading], tuple[nn.Module, Cache] | Ready] | None
    work: Callable[[KVPModel, Numbers, int, int], Work]
    networks: Callable[[KVPModel, Numbers], Sequence[nn.Module]]
    numbers: int = 0
    parse: Callable[[str, Sequence[str]], Numbers] | None = None
    refine_tokens: Callable[[KVPModel, Numbers, int], int] = lambda model, numbers, tokens: 0
    prunes: bool = False
    predicts: bool = False
    is_of_bundle: bool = False
    engine: Callable[[int], Engine] | None = None
    is_foreign: bool = False


@dataclass(frozen=True)
class Arm:
    """One way, as ``kinds.parse_arm`` reads it: its name, its kind, the numbers in the name."""

    name: str
    kind: Kind
    numbers: Numbers = ()

    def read(self, model: KVPModel, ids: mx.array, reading: Reading | None = None) -> tuple[nn.Module, Cache]:
        """Read a prompt but for its last token.

        Args:
            model: the bundle.
            ids: the whole prompt ``(B, N)``.
            reading: how.

        Returns:
            The model that decodes, and its evaluated cache for the first N-1 tokens, on which it reads the last.

        Raises:
            InputError: an arm that is an engine of its own, or see ``check``.
        """
        network, cache, _ = self.get_ready(model, ids, reading or Reading())
        return network, cache

    def get_ready(self, model: KVPModel, ids: mx.array, reading: Reading) -> Ready:
        """Do what ``read`` does, but for the last token as well if ``reading`` says so."""
        self.check(model)
        if self.kind.read is None:
            raise InputError(f"the arm {self.name} can only be timed ('kvp bench ttft'); leave it out here.")
        if ids.shape[1] == 1:  # nothing comes before the last token
            network = self.networks(model)[-1]
            return Ready(network, make_prompt_cache(network))
        return Ready(*self.kind.read(model, self.numbers, ids, reading))

    def check(self, model: KVPModel) -> None:
        """Refuse to leave tokens out where later ones build on all, or on those next to them.

        Raises:
            InputError: layers of such a kind.
        """
        if self.kind.prunes and (kinds := {kind for network in self.networks(model) for kind in fixed_kinds(network)}):
            raise InputError(
                f"{self.name} leaves tokens out, which layers of {' and '.join(sorted(kinds))} cannot do without; "
                "leave that arm out."
            )

    def work(self, model: KVPModel, prompt_tokens: int, batch: int = 1) -> Work:
        """Return the work of the first token: reading the prompt, and the first step."""
        return self.kind.work(model, self.numbers, prompt_tokens, batch)

    def refine_tokens(self, model: KVPModel, prompt_tokens: int) -> int:
        """Return how many tokens of the prompt the model reads exactly beside each one of its answer."""
        return self.kind.refine_tokens(model, self.numbers, prompt_tokens)

    def networks(self, model: KVPModel) -> Sequence[nn.Module]:
        """Return the mlx-lm models whose caches it fills, the one that decodes last."""
        return self.kind.networks(model, self.numbers)

    def weights(self, model: KVPModel) -> list[nn.Module]:
        """Return the modules whose weights it needs; they may share arrays."""
        return [*self.networks(model), *([model.auxiliary, model.predictor] if self.kind.predicts else [])]
