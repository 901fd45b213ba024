"""Ways from a prompt to a first token, by name: what evaluation and the bench compare.

full          the base reads all of the prompt
kvp, kvp-N    the predicted cache; the base reads N more tokens itself, those before the last
kvp-N-R       as kvp-N, and the base reads the share R whose prediction would do most harm
auxiliary     the auxiliary answers alone (a prefix: its layers under the base's norm and head)
layers-R      the base with a share R of its layers answers alone (0.75, 0.5 or 0.25)
random-R      the base reads a random share R of the prompt
static-R      the base reads the share R that its first layers attend to most
lazy-A-B      LazyLLM: from 30 % to 90 % of depth the share that is read falls from A to B
spec-R        SpecPrefill: the base reads the share R that the auxiliary attends to most
"""

import re
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .baselines import auxiliary_alone, layer_pruned, lazy_prefill, random_prefill, spec_prefill, static_prefill
from .bundle import KVPModel, checked_recompute
from .errors import InputError
from .families import Cache
from .layer_map import retained_layers
from .pipeline import base_prefill, predict_base_cache

FORMS = "full, kvp, kvp-N, kvp-N-R, auxiliary, layers-R, random-R, static-R, lazy-A-B, spec-R"
NUMBERS = {"full": 0, "kvp": 0, "auxiliary": 0, "layers": 1, "random": 1, "static": 1, "lazy": 2, "spec": 1}


@dataclass(frozen=True)
class Arm:
    """One way, as ``parse_arm`` reads it: its name, the part before the numbers, the numbers."""

    name: str
    kind: str
    numbers: tuple[float, ...] = ()


def parse_arm(name: str) -> Arm:
    """Read an arm's name.

    Raises:
        InputError: no such arm, or a share outside 0 to 1 (for ``layers`` one of the three that are defined).
    """
    kind, *rest = name.split("-")
    if kind == "kvp" and rest and rest[0].isdecimal():
        ratio = parse_arm(f"random-{rest[1]}").numbers if len(rest) == 2 and rest[1] != "0" else (0.0,) * len(rest[1:])
        if len(rest) <= 2:
            return Arm(name, kind, (int(rest[0]), *ratio))
    if kind not in NUMBERS or len(rest) != NUMBERS[kind] or not all(re.fullmatch(r"\d*\.?\d+", part) for part in rest):
        raise InputError(f"unknown arm '{name}'; arms are {FORMS}.")
    numbers = tuple(map(float, rest))
    if bad := [number for number in numbers if not 0 < number <= 1]:
        raise InputError(f"arm '{name}': {bad[0]:g} is no share of the prompt; it lies above 0 and up to 1.")
    if kind == "layers":
        retained_layers(4, numbers[0])
    return Arm(name, kind, numbers)


def parse_arms(names: str) -> list[Arm]:
    """Read comma-separated names, each once."""
    return [parse_arm(name) for name in dict.fromkeys(part.strip() for part in names.split(","))]


def answering_model(model: KVPModel, arm: Arm) -> nn.Module:
    """Return the model that decodes on the cache of ``arm_prefill``."""
    if arm.kind == "auxiliary":
        return auxiliary_alone(model)
    return layer_pruned(model.base, *arm.numbers) if arm.kind == "layers" else model.base


def arm_prefill(
    model: KVPModel, arm: Arm, ids: mx.array, *, step_size: int | None = None, seed: int = 0
) -> tuple[nn.Module, Cache]:
    """Read a prompt as an arm does.

    Args:
        model: the bundle.
        arm: which way.
        ids: the whole prompt ``(B, N)``.
        step_size: tokens per chunk (default: ``default_step_size()``).
        seed: of the arm ``random``.

    Returns:
        The model that answers, and its evaluated cache for the first N-1 tokens, on which it reads the last.
    """
    answering, tokens = answering_model(model, arm), ids.shape[1] - 1
    if tokens == 0:
        return answering, make_prompt_cache(answering)
    match arm.kind:
        case "kvp":
            tail = int(arm.numbers[0]) if arm.numbers else 0
            cache = make_prompt_cache(model.base)
            if len(arm.numbers) > 1:
                model = replace(model, recompute=checked_recompute(model.config, arm.numbers[1]))
            if tail < tokens:
                predict_base_cache(model, ids[:, :-1], cache, exact_tail=tail, prefill_step_size=step_size)
            else:
                base_prefill(model, ids[:, :-1], cache, prefill_step_size=step_size)
        case "random":
            cache = random_prefill(model.base, ids, *arm.numbers, seed=seed, step_size=step_size)
        case "static":
            cache = static_prefill(model.base, ids, *arm.numbers, step_size=step_size)
        case "lazy":
            cache = lazy_prefill(model.base, ids, *arm.numbers, step_size=step_size)
        case "spec":
            cache = spec_prefill(model, ids, *arm.numbers, step_size=step_size)
        case _:
            cache = base_prefill(replace(model, base=answering), ids[:, :-1], prefill_step_size=step_size)
    return answering, cache
