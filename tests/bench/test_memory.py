"""``kvp bench memory``: the weights and caches of an arm are those of the networks that it runs, by hand."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import mlx.nn as nn
import pytest
from kvp_mlx.bench.capacity import activation_bytes, weight_bytes
from kvp_mlx.bench.memory import measure_memory
from kvp_mlx.bench.ttft import Sweep
from support.tiny import arrays, llama, paired, prefixed, pruned, small_llama

from kvp_mlx.arms.kinds import parse_arms
from kvp_mlx.bundle.adapter import adapted_prefix, adapter_weights
from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.errors import InputError

TOKENS, STEP_SIZE, BATCH = 40, 16, 2
ARMS = "mlx-lm,full,kvp,auxiliary,layers-0.5,layers-0.75,random-0.5,static-0.5,lazy-0.75-0.25,spec-0.5"
LAYER_MAP = [(0,), (0,), (1,), (1,)]


def of_kind_model() -> KVPModel:
    return paired(llama(), small_llama(), LAYER_MAP)[0]


def of_kind_pruned() -> KVPModel:
    base = llama()
    return paired(base, pruned(base, [0, 2]), LAYER_MAP, retained=[0, 2])[0]


def of_kind_prefix() -> KVPModel:
    return prefixed(llama(), 2)[0]


def of_kind_adapted_prefix() -> KVPModel:
    model = of_kind_prefix()
    auxiliary = model.config.auxiliary.model_copy(update={"adapter_rank": 4})
    config = model.config.model_copy(update={"auxiliary": auxiliary})
    return replace(model, auxiliary=adapted_prefix(model.base, 2, 4), config=config)


def rows_of(model: KVPModel, arms: str = ARMS) -> tuple[dict, dict]:
    sweep = Sweep([TOKENS], BATCH, parse_arms(arms), 1, STEP_SIZE)
    result = measure_memory(model, "m", list(range(3, 90)), sweep)
    return result, {row["arm"]: row for row in result["rows"]}


def bytes_of(model: nn.Module, layers: Iterable[int] | None = None) -> int:
    """Bytes of a model's fp32 weights, by their names; with ``layers`` only those of these and of no layer."""
    kept = None if layers is None else {f"model.layers.{layer}." for layer in layers}
    return sum(
        array.nbytes
        for name, array in arrays(model).items()
        if kept is None or not name.startswith("model.layers.") or name.startswith(tuple(kept))
    )


def caches_of(width: int, layers: int) -> int:
    """Bytes of keys and values, 256 positions that mlx-lm allocates at once, and of one layer more, which grows."""
    return 2 * BATCH * 256 * 4 * width * (layers + 1)


WIDTH, SMALL_WIDTH = 2 * 8, 4 * 12  # key/value heads times head_dim of llama() and small_llama()
ALWAYS = {
    **dict.fromkeys(("mlx-lm", "full", "random-0.5", "static-0.5", "lazy-0.75-0.25"), ((0, 1, 2, 3), WIDTH, 4)),
    "layers-0.5": ((0, 2), WIDTH, 2),
    "layers-0.75": ((0, 1, 2), WIDTH, 3),
}
BUNDLES = {
    "model": of_kind_model,
    "pruned": of_kind_pruned,
    "prefix": of_kind_prefix,
    "adapted prefix": of_kind_adapted_prefix,
}


@pytest.mark.parametrize("kind", BUNDLES)
def test_arms_of_the_base_need_the_layers_that_they_run(kind: str) -> None:
    model = BUNDLES[kind]()
    _, rows = rows_of(model)
    for arm, (layers, width, depth) in ALWAYS.items():
        assert rows[arm]["weight_bytes"] == bytes_of(model.base, layers), arm
        assert rows[arm]["cache_bytes"] == caches_of(width, depth), arm


@pytest.mark.parametrize(
    ("make", "width", "depth"),
    [(of_kind_model, SMALL_WIDTH, 3), (of_kind_pruned, WIDTH, 2)],
    ids=["model", "pruned"],
)
def test_an_auxiliary_of_its_own_has_weights_and_caches_of_its_own(
    make: Callable[[], KVPModel], width: int, depth: int
) -> None:
    model = make()
    result, rows = rows_of(model)
    base, auxiliary = bytes_of(model.base), bytes_of(model.auxiliary)
    maps = sum(array.nbytes for array in arrays(model.predictor).values())
    assert rows["auxiliary"]["weight_bytes"] == auxiliary
    assert rows["spec-0.5"]["weight_bytes"] == base + auxiliary
    assert rows["kvp"]["weight_bytes"] == base + auxiliary + maps
    assert result["predictor_and_auxiliary_bytes"] == auxiliary + maps
    assert rows["auxiliary"]["cache_bytes"] == caches_of(width, depth)
    for arm in ("spec-0.5", "kvp"):
        assert rows[arm]["cache_bytes"] == caches_of(width, depth) + caches_of(WIDTH, 4), arm


def test_a_prefix_shares_the_bases_weights() -> None:
    model = of_kind_prefix()
    result, rows = rows_of(model)
    maps = sum(array.nbytes for array in arrays(model.predictor).values())
    assert rows["auxiliary"]["weight_bytes"] == bytes_of(model.base, (0, 1))
    assert rows["spec-0.5"]["weight_bytes"] == bytes_of(model.base)
    assert rows["kvp"]["weight_bytes"] == bytes_of(model.base) + maps
    assert result["predictor_and_auxiliary_bytes"] == maps
    assert rows["auxiliary"]["cache_bytes"] == caches_of(WIDTH, 2)
    assert rows["kvp"]["cache_bytes"] == caches_of(WIDTH, 4)
    assert rows["spec-0.5"]["cache_bytes"] == caches_of(WIDTH, 3) + caches_of(WIDTH, 4)  # and the layer it listens to


def test_an_adapted_prefix_adds_its_updates() -> None:
    model = of_kind_adapted_prefix()
    _, rows = rows_of(model)
    maps = sum(array.nbytes for array in arrays(model.predictor).values())
    updates = sum(array.nbytes for array in adapter_weights(model.auxiliary).values())
    assert updates > 0
    assert rows["kvp"]["weight_bytes"] == bytes_of(model.base) + maps + updates
    assert rows["kvp"]["cache_bytes"] == caches_of(WIDTH, 4)
    assert rows["spec-0.5"]["weight_bytes"] == bytes_of(model.base) + updates


@pytest.mark.parametrize("kind", BUNDLES)
def test_the_bound_is_weights_caches_and_the_largest_chunk(kind: str) -> None:
    model = BUNDLES[kind]()
    _, rows = rows_of(model)
    base, auxiliary = (activation_bytes(part, STEP_SIZE, TOKENS, BATCH) for part in (model.base, model.auxiliary))
    chunks = dict.fromkeys(rows, base) | {"auxiliary": auxiliary} | dict.fromkeys(("kvp", "spec-0.5"), base)
    if kind == "model":
        assert auxiliary != base
        chunks |= dict.fromkeys(("kvp", "spec-0.5"), max(base, auxiliary))
    for arm, row in rows.items():
        assert row["bound_bytes"] == row["weight_bytes"] + row["cache_bytes"] + chunks[arm], arm
        assert row["total_bytes"] == row["weight_bytes"] + row["above_weights_bytes"]
        assert row["above_weights_bytes"] > 0


def test_shared_arrays_are_counted_once() -> None:
    model = of_kind_prefix()
    once = weight_bytes([model.base])
    assert weight_bytes([model.base, model.base]) == weight_bytes([model.auxiliary, model.base]) == once
    assert weight_bytes([model.base, llama()]) == 2 * once


def test_an_engine_beside_mlx_is_refused() -> None:
    with pytest.raises(InputError, match=r"llama\.cpp"):
        measure_memory(of_kind_prefix(), "m", [3, 4, 5], Sweep([TOKENS], 1, parse_arms("llama.cpp"), 1, STEP_SIZE))
