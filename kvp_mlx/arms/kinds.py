"""The table of arms: to add one, add a row (and its reading, where that is new, to ``baselines``)."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..bundle.loading import KVPModel
from ..engine.auxiliary import auxiliary_cache_for
from ..engine.calibration import auto_min_tokens
from ..engine.clock import Ready
from ..engine.dial import PREDICT, QUALITIES, Dial
from ..engine.prefill import base_prefill, fill
from ..errors import InputError
from ..models.families import Cache
from ..models.pruning import retained_layers
from ..models.sections import section
from . import baselines, llama_cpp, mlx_lm_engine
from .arm import Arm, Kind, Numbers, Reading
from .work import Work, alone_work, full_work, kept_work, kvp_work, lazy_work, prefill_work

KVP_NAME = re.compile(r"kvp(?:-(\d+)(?:-(\d*\.?\d+)(?:\+(\d+))?)?)?", re.ASCII)


def kvp_numbers(name: str, _: Sequence[str]) -> Numbers:
    """Read ``kvp``, ``kvp-N``, ``kvp-N-R`` and ``kvp-N-R+T``: an exact tail, a share to recompute, tokens to refine."""
    if (found := KVP_NAME.fullmatch(name)) is None:
        raise InputError(unknown(name))
    tail, share, refined = found.groups()
    numbers: list[float] = [] if tail is None else [int(tail)]
    if share is not None:
        numbers.append(0.0 if share == "0" else checked_share(name, float(share)))
    return (*numbers, int(refined)) if refined is not None else tuple(numbers)


def layers_number(name: str, rest: Sequence[str]) -> Numbers:
    """Read ``layers-R``: one of the shares that are defined."""
    numbers = shares(name, rest, 1)
    retained_layers(4, numbers[0])
    return numbers


def lazy_numbers(name: str, rest: Sequence[str]) -> Numbers:
    """Read ``lazy-A-B``: two shares, the second no larger, since what was left out does not come back."""
    first, last = numbers = shares(name, rest, 2)
    if last > first:
        raise InputError(f"arm '{name}': the share that is read falls with depth, so {last:g} cannot follow {first:g}.")
    return numbers


def kvp_dial(numbers: Numbers, dial: Dial = PREDICT) -> Dial:
    """Return the dial of an arm ``kvp-N-R+T``: what the name says wins over the given one."""
    tail = int(numbers[0]) if numbers else dial.exact_tail
    share = numbers[1] if len(numbers) > 1 else dial.recompute
    refine_tokens = int(numbers[2]) if len(numbers) > 2 else dial.refine_tokens
    return replace(dial, path="kvp", exact_tail=tail, recompute=share, refine_tokens=refine_tokens)


def with_dial(arm: Arm, dial: Dial) -> Arm:
    """Return an arm that predicts with the exact tail and share that its name leaves to a dial; others as they are."""
    if arm.kind is not KINDS["kvp"] or dial.recompute is None:
        return arm
    chosen = kvp_dial(arm.numbers, dial)
    share = dial.recompute if chosen.recompute is None else chosen.recompute
    return replace(arm, numbers=(chosen.exact_tail, share, *arm.numbers[2:]))


def read_kvp(model: KVPModel, numbers: Numbers, ids: mx.array, reading: Reading) -> Ready:
    """Predict, and let the base read what the dial leaves to it."""
    return read_with(kvp_dial(numbers, reading.dial).settled(model.config, ids.shape[1], 0, 0), model, ids, reading)


def read_with(dial: Dial, model: KVPModel, ids: mx.array, reading: Reading) -> Ready:
    """Read a prompt by a settled dial."""
    cache = make_prompt_cache(model.base)
    report: dict[str, Any] = {"prefill_step_size": reading.step_size, "times": reading.times}
    auxiliary_cache = auxiliary_cache_for(model, cache)
    filled = fill(model, ids, cache, auxiliary_cache, dial, with_last=reading.with_last, **report)
    return Ready(model.base, cache, filled.output)


def kvp_arm_work(model: KVPModel, numbers: Numbers, tokens: int, batch: int) -> Work:
    """Return what prediction takes, or full prefill where the exact tail leaves nothing to predict."""
    return work_with(kvp_dial(numbers).settled(model.config, tokens, 0, 0), model, tokens, batch)


def work_with(dial: Dial, model: KVPModel, tokens: int, batch: int) -> Work:
    """Return what a settled dial takes; where it leaves nothing to predict, full prefill."""
    if dial.path == "full":
        return full_work(model, tokens, batch)
    return kvp_work(model, tokens, batch, dial.recompute or 0.0, dial.exact_tail, dial.exact_head)


def kvp_refine_tokens(model: KVPModel, numbers: Numbers, tokens: int) -> int:
    """Return how many tokens are refined beside each of an answer; none where nothing was left to predict."""
    return refined_with(kvp_dial(numbers).settled(model.config, tokens, 0, 0))


def refined_with(dial: Dial) -> int:
    """Return how many predicted tokens a settled dial has the base read beside each one of an answer."""
    return dial.refine_tokens if dial.path == "kvp" else 0


def read_alone(network: nn.Module, model: KVPModel, ids: mx.array, reading: Reading) -> tuple[nn.Module, Cache]:
    """Let one model read the whole prompt."""
    alone = replace(model, base=network)
    cache = base_prefill(alone, ids[:, :-1], prefill_step_size=reading.step_size, times=reading.times)
    return network, cache


def kept(numbers: Numbers, tokens: int) -> int:
    """Return how many of a prompt's tokens but the last a share keeps."""
    return baselines.kept_count(tokens - 1, numbers[0])


def lazy_counts(model: KVPModel, numbers: Numbers, tokens: int) -> list[int]:
    """Return how many tokens each layer of LazyLLM reads."""
    depth = len(model.base.layers)
    retention = (baselines.lazy_retention(layer, depth, *numbers) for layer in range(depth))
    return [baselines.kept_count(tokens - 1, share) for share in retention]


def static_work(model: KVPModel, numbers: Numbers, tokens: int, batch: int) -> Work:
    """Return the work of choosing by the first layers, and of reading what is kept."""
    chooser = section(model.base, 0, baselines.static_layers(model.base))
    return prefill_work(chooser, tokens, batch) + kept_work(model.base, kept(numbers, tokens), batch)


def spec_work(model: KVPModel, numbers: Numbers, tokens: int, batch: int) -> Work:
    """Return the work of choosing by the auxiliary, and of reading what is kept."""
    return prefill_work(model.auxiliary, tokens, batch) + kept_work(model.base, kept(numbers, tokens), batch)


def kvp_networks(model: KVPModel, _: Numbers) -> Sequence[nn.Module]:
    """Return the base, after an auxiliary that has a cache of its own; a prefix fills the base's."""
    return [model.base] if model.is_prefix else [model.auxiliary, model.base]


def quality_kind(quality: str) -> Kind:
    """Return the row of a quality: what a request of it gets from this bundle, at each prompt's own length."""

    def settled(model: KVPModel, tokens: int) -> Dial:
        return QUALITIES[quality].at(model.config, tokens).settled(model.config, tokens, 0, auto_min_tokens(model))

    return Kind(
        form=quality,
        help=f"as a request with --quality {quality} is read: predicted as the bundle measured it for that length, or "
        "in full",
        read=lambda model, _, ids, reading: read_with(settled(model, ids.shape[1]), model, ids, reading),
        work=lambda model, _, tokens, batch: work_with(settled(model, tokens), model, tokens, batch),
        refine_tokens=lambda model, _, tokens: refined_with(settled(model, tokens)),
        networks=kvp_networks,
        predicts=True,
        is_of_bundle=True,
    )


KINDS: dict[str, Kind] = {
    "mlx-lm": Kind(
        form="mlx-lm",
        help="mlx-lm's own generate_step reads all of the prompt",
        read=None,
        engine=mlx_lm_engine.open_engine,
        work=lambda model, _, tokens, batch: full_work(model, tokens, batch),
        networks=lambda model, _: [model.base],
    ),
    "full": Kind(
        form="full",
        help="the base reads all of the prompt, as kvp runs it",
        read=lambda model, _, ids, reading: read_alone(model.base, model, ids, reading),
        work=lambda model, _, tokens, batch: full_work(model, tokens, batch),
        networks=lambda model, _: [model.base],
    ),
    "kvp": Kind(
        form="kvp, kvp-N, kvp-N-R, kvp-N-R+T",
        help="the predicted cache; the base reads N more tokens itself, those before the last, and the share R whose "
        "prediction would do most harm; then T beside each token of the answer, until all are exact",
        read=read_kvp,
        parse=kvp_numbers,
        work=kvp_arm_work,
        refine_tokens=kvp_refine_tokens,
        networks=kvp_networks,
        predicts=True,
        is_of_bundle=True,
    ),
    "balanced": quality_kind("balanced"),
    "fast": quality_kind("fast"),
    "auxiliary": Kind(
        form="auxiliary",
        help="the auxiliary answers alone (first layers: under the norm and head of their model)",
        read=lambda model, _, ids, reading: read_alone(baselines.auxiliary_alone(model), model, ids, reading),
        work=lambda model, _, tokens, batch: alone_work(baselines.auxiliary_alone(model), tokens, batch),
        networks=lambda model, _: [baselines.auxiliary_alone(model)],
        is_of_bundle=True,
    ),
    "layers": Kind(
        form="layers-R",
        help="the base with a share R of its layers answers alone (0.75, 0.5 or 0.25)",
        read=lambda model, numbers, ids, reading: read_alone(
            baselines.layer_pruned(model.base, numbers[0]), model, ids, reading
        ),
        parse=layers_number,
        work=lambda model, numbers, tokens, batch: alone_work(
            baselines.layer_pruned(model.base, numbers[0]), tokens, batch
        ),
        networks=lambda model, numbers: [baselines.layer_pruned(model.base, numbers[0])],
    ),
    "random": Kind(
        form="random-R",
        help="the base reads a random share R of the prompt",
        read=lambda model, numbers, ids, reading: (
            model.base,
            baselines.random_prefill(model.base, ids, numbers[0], seed=reading.seed, step_size=reading.step_size),
        ),
        numbers=1,
        work=lambda model, numbers, tokens, batch: kept_work(model.base, kept(numbers, tokens), batch),
        networks=lambda model, _: [model.base],
        prunes=True,
    ),
    "static": Kind(
        form="static-R",
        help="the base reads the share R that its first layers attend to most",
        read=lambda model, numbers, ids, reading: (
            model.base,
            baselines.static_prefill(model.base, ids, numbers[0], step_size=reading.step_size),
        ),
        numbers=1,
        work=static_work,
        networks=lambda model, _: [model.base],
        prunes=True,
    ),
    "lazy": Kind(
        form="lazy-A-B",
        help="LazyLLM: from 30 % to 90 % of depth the share that is read falls from A to B",
        read=lambda model, numbers, ids, reading: (
            model.base,
            baselines.lazy_prefill(model.base, ids, *numbers, step_size=reading.step_size),
        ),
        numbers=2,
        parse=lazy_numbers,
        work=lambda model, numbers, tokens, batch: lazy_work(model.base, lazy_counts(model, numbers, tokens), batch),
        networks=lambda model, _: [model.base],
        prunes=True,
    ),
    "spec": Kind(
        form="spec-R",
        help="SpecPrefill: the base reads the share R that the auxiliary attends to most",
        read=lambda model, numbers, ids, reading: (
            model.base,
            baselines.spec_prefill(model, ids, numbers[0], step_size=reading.step_size),
        ),
        numbers=1,
        work=spec_work,
        networks=lambda model, _: [model.auxiliary, model.base],
        prunes=True,
        is_of_bundle=True,
    ),
    "llama.cpp": Kind(
        form="llama.cpp",
        help="llama-cpp-python on the default model's own file (one prompt at a time)",
        read=None,
        engine=llama_cpp.open_engine,
        is_foreign=True,
        work=lambda model, _, tokens, batch: full_work(model, tokens, batch),
        networks=lambda model, _: [model.base],
    ),
}


def parse_arm(name: str) -> Arm:
    """Read an arm's name.

    Raises:
        InputError: no such arm, or a share outside 0 to 1 (for ``layers`` one of the three that are defined).
    """
    key = max((key for key in KINDS if name == key or name.startswith(f"{key}-")), key=len, default=None)
    if key is None:
        raise InputError(unknown(name))
    kind, rest = KINDS[key], name[len(key) + 1 :].split("-") if name != key else []
    return Arm(name, kind, kind.parse(name, rest) if kind.parse else shares(name, rest, kind.numbers))


def parse_arms(names: str) -> list[Arm]:
    """Read comma-separated names, each once."""
    return [parse_arm(name) for name in split_names(names)]


def split_names(names: str) -> list[str]:
    """Return comma-separated names, each once."""
    return list(dict.fromkeys(part.strip() for part in names.split(",")))


def shares(name: str, rest: Sequence[str], count: int) -> Numbers:
    """Read ``count`` shares of the prompt.

    Raises:
        InputError: fewer, more, no numbers, or outside 0 to 1.
    """
    if len(rest) != count or not all(map(is_number, rest)):
        raise InputError(unknown(name))
    return tuple(checked_share(name, float(part)) for part in rest)


def checked_share(name: str, share: float) -> float:
    """Return a share of the prompt.

    Raises:
        InputError: it is none.
    """
    if not 0 < share <= 1:
        raise InputError(f"arm '{name}': {share:g} is no share of the prompt; it lies above 0 and up to 1.")
    return share


def is_number(text: str) -> bool:
    """Return whether a text is a plain decimal number."""
    return re.fullmatch(r"\d*\.?\d+", text) is not None


def unknown(name: str) -> str:
    """Return what is said of a name that is no arm's."""
    return f"unknown arm '{name}'; arms are {forms()}."


def forms() -> str:
    """Return how arms are named, comma-separated."""
    return ", ".join(kind.form for kind in KINDS.values())
