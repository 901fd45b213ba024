"""The predictor: one wide map per source, the published sizes, the layout of predictor.safetensors."""

import io
import re

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from support.tiny import FAMILIES, llama, paired, prefixed, token_ids

from kvp_mlx.bundle.layer_map import pruned_layer_map, spread_layer_map
from kvp_mlx.bundle.predictor import Predictor, plan_blocks
from kvp_mlx.engine.auxiliary import auxiliary_prefill
from kvp_mlx.models.kinds import Target
from kvp_mlx.models.pruning import retained_layers
from kvp_mlx.models.sections import RawLayer

# K/V widths by layer of the published OpenELM models (method.md section 4), and their head_dim
OPENELM = {
    "270M": ([192] * 5 + [256] * 7 + [320] * 4, 64),
    "450M": ([192] * 3 + [256] * 7 + [320] * 6 + [384] * 4, 64),
    "1.1B": ([256] * 3 + [320] * 7 + [384] * 8 + [448] * 6 + [512] * 4, 64),
    "3B": ([384] * 4 + [512] * 14 + [640] * 12 + [768] * 6, 128),
}


def targets(width):
    """Return what feeds the cache of an attention layer."""
    return Target("keys", "k_proj", width), Target("values", "v_proj", width)


def shapes(size):
    """Return the K/V shapes of a published model."""
    widths, _ = OPENELM[size]
    return [targets(width) for width in widths]


def parameters(layer_map, auxiliary, base):
    """Count a predictor's parameters without allocating them."""
    blocks = plan_blocks(layer_map, "keys_values", auxiliary, 0, base)
    return sum((block.in_width + 1) * block.out_width for block in blocks)


def matmuls(*outputs):
    """Count the matrix products in the graph that leads to some unevaluated arrays."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *outputs)
    return len(re.findall(r'label ?= ?"(?:Matmul|AddMM)"', graph.getvalue()))


def evaluated_inputs(model, ids):
    """Return the predictor's inputs for ids, evaluated, so that only the predictor is left in the graph."""
    inputs, _ = auxiliary_prefill(model, mx.array(ids), make_prompt_cache(model.auxiliary))
    mx.eval(inputs)
    return inputs


def outputs(predicted):
    return [array for _, array in tree_flatten(predicted)]


@pytest.mark.parametrize(
    ("base", "auxiliary", "count"),
    [
        ("1.1B", "270M", 5_436_544),
        ("1.1B", "450M", 6_206_592),
        ("3B", "270M", 10_691_584),
        ("3B", "450M", 12_264_448),
        ("3B", "1.1B", 16_032_768),
    ],
)
def test_maps_from_a_smaller_model_have_the_published_size(base, auxiliary, count):
    layer_map = spread_layer_map(len(shapes(base)), len(shapes(auxiliary)))
    assert parameters(layer_map, shapes(auxiliary), shapes(base)) == count


@pytest.mark.parametrize(
    ("base", "fraction", "count"),
    [
        ("1.1B", 0.25, 8_459_392),
        ("1.1B", 0.5, 8_672_384),
        ("1.1B", 0.75, 8_672_384),
        ("3B", 0.25, 24_749_056),
        ("3B", 0.5, 25_469_952),
        ("3B", 0.75, 25_469_952),
    ],
)
def test_maps_from_a_pruned_copy_have_the_published_size(base, fraction, count):
    retained = retained_layers(len(shapes(base)), fraction)
    auxiliary = [shapes(base)[layer] for layer in retained]
    assert parameters(pruned_layer_map(len(shapes(base)), retained), auxiliary, shapes(base)) == count


WIDTHS = [8, 4, 12, 8]
BASE = [targets(width) for width in WIDTHS]
AUXILIARY = [targets(6), targets(12)]


def test_base_layers_of_one_source_share_a_map_for_keys_and_one_for_values():
    predictor = Predictor(plan_blocks(((0,), (0,), (1,), (0, 1)), "keys_values", AUXILIARY, 5, BASE))
    assert {name: array.shape for name, array in tree_flatten(predictor.parameters())} == {
        **{"maps.keys_0.weight": (12, 6), "maps.keys_0.bias": (12,)},
        **{"maps.values_0.weight": (12, 6), "maps.values_0.bias": (12,)},
        **{"maps.keys_1.weight": (12, 12), "maps.keys_1.bias": (12,)},
        **{"maps.values_1.weight": (12, 12), "maps.values_1.bias": (12,)},
        **{"maps.keys_0_1.weight": (8, 18), "maps.keys_0_1.bias": (8,)},
        **{"maps.values_0_1.weight": (8, 18), "maps.values_0_1.bias": (8,)},
    }
    assert predictor.sources == [0, 1]


def test_base_layers_of_one_hidden_state_share_a_single_map():
    predictor = Predictor(plan_blocks((None, None, (1,), (1,)), "hidden_state", AUXILIARY, 5, BASE))
    assert {name: array.shape for name, array in tree_flatten(predictor.parameters())} == {
        "maps.hidden_1.weight": (40, 5),  # 12 + 8 keys, then 12 + 8 values
        "maps.hidden_1.bias": (40,),
    }
    assert predictor.sources == [1]


def test_exact_layers_alone_need_no_map():
    predictor = Predictor(plan_blocks((None,) * 4, "hidden_state", AUXILIARY, 5, BASE))
    assert (predictor.sources, predictor.inputs({}), predictor({})) == ([], {}, {})


@pytest.mark.parametrize("reads", ["keys_values", "hidden_state"])
def test_every_target_gets_its_own_rows_of_the_wide_map(reads):
    rng = np.random.default_rng(0)
    widths = {"hidden": [5, 5], "keys": [6, 12], "values": [6, 12]}
    raw = {kind: [rng.normal(size=(2, 3, w)).astype(np.float32) for w in widths[kind]] for kind in widths}
    captured = {
        j: RawLayer(mx.array(raw["hidden"][j]), {kind: mx.array(raw[kind][j]) for kind in ("keys", "values")})
        for j in range(2)
    }
    predictor = Predictor(plan_blocks(((0,), (1, 0), (0,), (1, 0)), reads, AUXILIARY, 5, BASE))
    predicted = predictor(predictor.inputs(captured))

    # rows of the maps, in the order of base layers; a hidden state's map holds all keys before all values
    rows = {(0, "keys"): 0, (2, "keys"): 8, (1, "keys"): 0, (3, "keys"): 4}
    after = {(0,): 20, (1, 0): 12} if reads == "hidden_state" else {(0,): 0, (1, 0): 0}
    for layer, sources in enumerate([(0,), (1, 0), (0,), (1, 0)]):
        for kind in ("keys", "values"):
            read = "hidden" if reads == "hidden_state" else kind
            wide = predictor.maps[f"{read}_{'_'.join(map(str, sources))}"]
            start = rows[layer, "keys"] + (after[sources] if kind == "values" else 0)
            stop = start + WIDTHS[layer]
            x = np.concatenate([raw[read][source] for source in sources], axis=-1)
            expected = x @ np.array(wide.weight)[start:stop].T + np.array(wide.bias)[start:stop]
            np.testing.assert_allclose(np.array(predicted[layer][kind]), expected, atol=1e-5)
    assert sorted(predicted) == [0, 1, 2, 3]


@pytest.mark.parametrize("reads", ["keys_values", "hidden_state"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_matmul_per_block(family, reads):
    model, _ = paired(FAMILIES[family](), llama(3, num_hidden_layers=2), ((0,), (0,), (1,), (0, 1)), reads=reads)
    inputs = evaluated_inputs(model, token_ids(4))
    assert len(model.predictor.blocks) == (6 if reads == "keys_values" else 3)
    assert matmuls(*outputs(model.predictor(inputs))) == len(model.predictor.blocks)


def test_matmuls_do_not_grow_with_base_layers_that_share_a_source():
    counts = {}
    for depth in (4, 9):
        base = llama(num_hidden_layers=depth)
        model, _ = paired(base, llama(3, num_hidden_layers=2), spread_layer_map(depth, 2))
        prefix, _ = prefixed(base, 1)
        predicted = [run.predictor(evaluated_inputs(run, token_ids(4))) for run in (model, prefix)]
        assert [len(layers) for layers in predicted] == [depth, depth - 2]
        counts[depth] = [matmuls(*outputs(layers)) for layers in predicted]
    assert counts[4] == counts[9] == [4, 1]
