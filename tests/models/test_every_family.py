"""Families whose layers are full attention and may be an auxiliary: identity maps and whole prefixes change nothing.

The oracle of llama and openelm is NumPy (tests/engine); here it is mlx-lm's own model of the family. Every row of the
table is tested in test_architectures.py.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support.architectures import CONFIGS as ARCHITECTURES
from support.families import CONFIGS, tiny_model
from support.tiny import llama

import kvp_mlx
from kvp_mlx.bundle.config import AuxiliaryConfig, BaseConfig, BundleConfig, PredictorConfig
from kvp_mlx.bundle.layer_map import prefix_layer_map, spread_layer_map
from kvp_mlx.bundle.loading import KVPModel, build_predictor
from kvp_mlx.models.families import FAMILIES
from kvp_mlx.models.sections import is_cut, only_layers, output_head, prefix_model, run_layers


def assembled(base: nn.Module, kind: str, layers: int) -> KVPModel:
    if kind == "prefix":
        auxiliary, predictor = prefix_model(base, layers), ("hidden_state", prefix_layer_map(4, layers))
    else:
        auxiliary, predictor = base, ("keys_values", spread_layer_map(4, 4))
    config = BundleConfig(
        base=BaseConfig(fingerprint="none", path="base"),
        auxiliary=AuxiliaryConfig(kind=kind, layers=layers),
        predictor=PredictorConfig(input=predictor[0], layer_map=predictor[1]),
    )
    maps = build_predictor(base, auxiliary, config)
    for linear in maps.maps.values():
        linear.weight, linear.bias = mx.eye(linear.weight.shape[0]), mx.zeros(linear.weight.shape[0])
    return KVPModel(base, auxiliary, maps, None, config, {})


def test_every_row_is_tested() -> None:
    wrapped = {config["text_config"]["model_type"] for config in ARCHITECTURES.values() if "text_config" in config}
    assert CONFIGS.keys() | ARCHITECTURES.keys() | wrapped == FAMILIES.keys()


@pytest.mark.parametrize("quantised", [False, True], ids=["fp32", "8-bit"])
@pytest.mark.parametrize(("kind", "layers"), [("model", 4), ("prefix", 3)])
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_changes(name: str, kind: str, layers: int, quantised: bool) -> None:
    base = tiny_model(name)
    if quantised:
        nn.quantize(
            base,
            group_size=32,
            bits=8,
            class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0,
        )
    model = assembled(base, kind, layers)
    ids = mx.array(np.random.default_rng(1).integers(0, 61, (2, 9)))
    own = make_prompt_cache(base)
    for part in (ids[:, :4], ids[:, 4:7]):
        base(part, cache=own)
    cache = kvp_mlx.predict_base_cache(model, ids[:, :7], prefill_step_size=4)
    for step in range(7, 9):
        expected = base(ids[:, step : step + 1], cache=own)
        found = base(ids[:, step : step + 1], cache=cache)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_output_head_makes_the_models_own_logits(name: str) -> None:
    base = tiny_model(name)
    ids = mx.array([[3, 1, 4, 1, 5]])
    hidden, _ = run_layers(base, ids, make_prompt_cache(base))
    np.testing.assert_allclose(output_head(base, hidden), base(ids), atol=1e-6)


def test_a_cut_reads_with_its_own_embedding() -> None:
    """Which may have been dequantised or trained since it was cut; the model stays as it is."""
    model, ids = llama(), mx.array([[5, 6, 7]])
    cut = only_layers(model, range(2))
    assert is_cut(cut) and not is_cut(model)
    whole, before = np.array(model(ids)), np.array(cut(ids))
    doubled = nn.Embedding(*model.model.embed_tokens.weight.shape)
    doubled.weight = 2 * model.model.embed_tokens.weight
    cut.model.embed_tokens = doubled
    x = doubled(ids)
    for layer in cut.layers:
        x = layer(x, "causal")
    np.testing.assert_allclose(cut.model(ids), model.model.norm(x), atol=1e-5)
    assert np.abs(np.array(cut(ids)) - before).max() > 1e-3
    np.testing.assert_array_equal(model(ids), whole)
