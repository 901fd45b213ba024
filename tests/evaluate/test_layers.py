"""The caches layer by layer, against NumPy in float64."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.oracle import Entries, KVPrediction, Transformer, attend, rotate, split_heads
from support.tiny import itself, llama, openelm, paired, prefixed, small_llama, token_ids

from kvp_mlx.bundle.loading import KVPModel
from kvp_mlx.evaluate.layers import measure_layers

PROMPT, CONTINUATION = 24, 20
MODELS: dict[str, Callable[[], tuple[KVPModel, KVPrediction]]] = {
    "prefix of llama": lambda: prefixed(llama(), 1),
    "prefix of openelm": lambda: prefixed(openelm(), 1),
    "model": lambda: paired(llama(), small_llama(), [(0,), (0,), (1,), (2,)]),
}


def documents(count: int = 3) -> list[list[int]]:
    return token_ids(PROMPT + CONTINUATION, batch=count).tolist()


def test_layers_of_an_exact_bundle_are_exact() -> None:
    rows = measure_layers(itself(openelm()), documents(), CONTINUATION)
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row["key_error"] < 1e-5
        assert row["value_error"] < 1e-5
        assert row["attention_cosine"] == pytest.approx(1, abs=1e-5)


def attention(
    model: Transformer, ids: np.ndarray, cache: Sequence[Entries], streams: list[np.ndarray]
) -> list[np.ndarray]:
    """What each attention block returns for the given inputs of its layer."""
    positions = np.arange(len(cache[0]), len(cache[0]) + ids.shape[1])
    outputs = []
    for layer in range(model.depth):
        hidden = model.norm(layer, model.attention_norm, streams[layer])
        queries, keys, values = model.project(layer, hidden)
        entries = model.append(layer, cache[layer], keys, values, positions)
        heads = model.head_norm(layer, "q_norm", split_heads(queries, model.query_heads(layer)))
        outputs.append(model.output(layer, attend(rotate(heads, positions, model.rope_base), positions, entries)))
    return outputs


def plain_rows(oracle: KVPrediction, window: list[int]) -> np.ndarray:
    """One document's key error, value error and attention cosine per layer."""
    ids, rest = np.array([window]), np.array([window[PROMPT:]])
    whole = oracle.base.forward(ids)
    true = [entries.first(PROMPT) for entries in whole.cache]
    predicted, _ = oracle.prefill(ids[:, :PROMPT])
    streams = [stream[:, PROMPT:] for stream in whole.streams]
    on_true, on_predicted = (attention(oracle.base, rest, cache, streams) for cache in (true, predicted))
    rows = []
    for layer, (one, other) in enumerate(zip(on_true, on_predicted, strict=True)):
        pairs = [(getattr(predicted[layer], part), getattr(true[layer], part)) for part in ("keys", "values")]
        errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]
        norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
        rows.append([*errors, ((one * other).sum(axis=-1) / norms).mean()])
    return np.array(rows)


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_what_numpy_makes_of_them(name: str) -> None:
    model, oracle = MODELS[name]()
    before = {key: np.array(array) for key, array in tree_flatten(model.base.parameters())}
    rows = measure_layers(model, documents(), CONTINUATION)
    expected = np.mean([plain_rows(oracle, window) for window in documents()], axis=0)
    assert [row["layer"] for row in rows] == [layer for layer, s in enumerate(oracle.layer_map) if s is not None]
    for row in rows:
        found = [row["key_error"], row["value_error"], row["attention_cosine"]]
        np.testing.assert_allclose(found, expected[row["layer"]], rtol=1e-4, atol=1e-5)
        assert row["key_error"] > 0.1
    after = {key: np.array(array) for key, array in tree_flatten(model.base.parameters())}
    assert before.keys() == after.keys()  # no listener stays behind
    assert all(np.array_equal(before[key], after[key]) for key in before)
