"""Every arm against NumPy at explicit positions, against the full model, and its arithmetic against the paper's."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama as mlx_lm_llama
from support.oracle import Entries, Transformer, attend, rms_norm, rotate, split_heads
from support.tiny import BASES, itself, llama, openelm, oracle_of, paired, prefixed, small_llama, token_ids

from kvp_mlx.arms import baselines
from kvp_mlx.arms.arm import Arm, Reading
from kvp_mlx.arms.baselines import (
    chunk_means,
    last_token_attention,
    lazy_prefill,
    lazy_retention,
    random_prefill,
    read_kept,
    static_prefill,
)
from kvp_mlx.arms.kinds import KINDS, parse_arm, parse_arms
from kvp_mlx.arms.work import full_work, kvp_work
from kvp_mlx.bundle.loading import KVPModel, build_predictor
from kvp_mlx.bundle.presets import preset_parts
from kvp_mlx.device import streams
from kvp_mlx.engine.prefill import base_prefill
from kvp_mlx.engine.recompute import largest
from kvp_mlx.errors import InputError
from kvp_mlx.models.families import mixer_of

PROMPT = 21
FAMILIES = {"llama": llama, "openelm": openelm}
each_family = pytest.mark.parametrize("family", FAMILIES)


def last_logits(model: object, cache: list, ids: np.ndarray) -> np.ndarray:
    return np.array(model(mx.array(ids[:, -1:]), cache=cache)[:, -1])


def read_at(oracle: Transformer, layers: range, x: np.ndarray, positions: np.ndarray, cache: list) -> np.ndarray:
    """Run some layers over the stream x (1, T, hidden) at explicit positions; fills ``cache`` by layer."""
    for layer in layers:
        hidden = oracle.norm(layer, oracle.attention_norm, x)
        queries, keys, values = oracle.project(layer, hidden)
        cache[layer] = oracle.append(layer, cache[layer], keys, values, positions)
        queries = oracle.head_norm(layer, "q_norm", split_heads(queries, oracle.query_heads(layer)))
        heads = attend(rotate(queries, positions, oracle.rope_base), positions, cache[layer])
        x = x + oracle.output(layer, heads)
        x = x + oracle.ffn(layer, oracle.norm(layer, oracle.ffn_norm, x))
    return x


def embedded(oracle: Transformer, ids: np.ndarray) -> np.ndarray:
    return oracle.weights[f"{oracle.inner}.{oracle.embedding}.weight"][ids]


def logits_of(oracle: Transformer, x: np.ndarray) -> np.ndarray:
    weights = oracle.weights
    x = rms_norm(x, weights[f"{oracle.inner}.norm.weight"], oracle.eps)
    tied = weights[f"{oracle.inner}.{oracle.embedding}.weight"]
    return (x @ weights.get("lm_head.weight", tied).T)[:, -1]


def attention_row(
    oracle: Transformer, layer: int, x: np.ndarray, positions: np.ndarray, entries: Entries
) -> np.ndarray:
    """The last token's attention (query heads, T-1) in a layer that reads the stream x (1, T, hidden)."""
    queries, _, _ = oracle.project(layer, oracle.norm(layer, oracle.attention_norm, x))
    queries = oracle.head_norm(layer, "q_norm", split_heads(queries, oracle.query_heads(layer)))
    query = rotate(queries, positions, oracle.rope_base)[0, :, -1]
    groups = len(query) // entries.keys.shape[1]
    keys = np.repeat(entries.keys[0], groups, axis=0)
    scores = np.einsum("hd,htd->ht", query, keys) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True))[:, :-1]


def all_rows(oracle: Transformer, ids: np.ndarray) -> list[np.ndarray]:
    whole = oracle.forward(ids)
    positions = np.arange(ids.shape[1])
    return [
        attention_row(oracle, layer, whole.streams[layer], positions, whole.cache[layer])
        for layer in range(oracle.depth)
    ]


def logits_of_kept(oracle: Transformer, ids: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The last token's logits when only ``kept`` was read, everything at the position it has in the prompt."""
    places = np.append(kept, ids.shape[1] - 1)
    cache: list = [None] * oracle.depth
    return logits_of(oracle, read_at(oracle, range(oracle.depth), embedded(oracle, ids[:, places]), places, cache))


@pytest.mark.parametrize("base", BASES)
def test_kept_tokens_are_read_where_they_stand_in_the_prompt(base: str) -> None:
    model, ids = BASES[base](), token_ids(PROMPT)
    kept = np.array([0, 1, 5, 6, 7, 13, 19])
    cache = read_kept(model, mx.array(ids), mx.array(kept[None].astype(np.uint32)), step_size=3)
    assert [layer.offset for layer in cache] == [7] * 4
    expected = logits_of_kept(oracle_of(model), ids, kept)
    np.testing.assert_allclose(last_logits(model, cache, ids), expected, atol=1e-3)


def test_decoding_goes_on_at_the_right_distances() -> None:
    model, ids = llama(), token_ids(PROMPT + 3)
    kept = np.array([2, 3, 9, 17])
    cache = read_kept(model, mx.array(ids[:, :PROMPT]), mx.array([kept.tolist()]))
    one_by_one = [np.array(model(mx.array(ids[:, i : i + 1]), cache=cache)[:, -1]) for i in range(20, 24)]
    together = model(
        mx.array(ids[:, 20:]), cache=read_kept(model, mx.array(ids[:, :PROMPT]), mx.array([kept.tolist()]))
    )
    oracle = oracle_of(model)
    for step, logits in enumerate(one_by_one):
        places = np.concatenate([kept, np.arange(20, 21 + step)])
        cache_: list = [None] * 4
        expected = logits_of(oracle, read_at(oracle, range(4), embedded(oracle, ids[:, places]), places, cache_))
        np.testing.assert_allclose(logits, expected, atol=1e-3)
        np.testing.assert_allclose(np.array(together[:, step]), expected, atol=1e-3)


@each_family
def test_last_tokens_attention_is_numpys(family: str) -> None:
    model, ids = FAMILIES[family](), token_ids(PROMPT)
    rows = last_token_attention(model, mx.array(ids), step_size=8)
    for row, expected in zip(rows, all_rows(oracle_of(model), ids), strict=True):
        np.testing.assert_allclose(np.array(row[0]), expected, atol=1e-5)


def best(importance: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-importance)[:count])


@each_family
def test_static_reads_what_the_first_quarter_attends_to(family: str) -> None:
    model, ids = FAMILIES[family](), token_ids(PROMPT, seed=1)
    oracle = oracle_of(model)
    importance = all_rows(oracle, ids)[0].mean(axis=0)  # a quarter of four layers
    expected = logits_of_kept(oracle, ids, best(importance, 10))
    cache = static_prefill(model, mx.array(ids), 0.5, step_size=8)
    np.testing.assert_allclose(last_logits(model, cache, ids), expected, atol=1e-3)


def test_spec_reads_what_the_auxiliary_attends_to() -> None:
    model, oracle = paired(llama(), small_llama(), [(0,), (0,), (1,), (2,)])
    ids = token_ids(PROMPT, seed=2)
    importance = np.max([row.max(axis=0) for row in all_rows(oracle.auxiliary, ids)], axis=0)
    stretches = [importance[start : start + 8] for start in range(0, 20, 8)]
    smooth = np.concatenate([np.full(len(stretch), stretch.mean()) for stretch in stretches])
    np.testing.assert_allclose(np.array(chunk_means(mx.array(importance[None]), 8))[0], smooth, rtol=1e-5)
    order = np.argsort([-stretch.mean() for stretch in stretches])
    count = 8 if order[0] < 2 else 4  # the whole of the best stretch, whichever length it has
    expected = logits_of_kept(oracle.base, ids, best(smooth, count))
    _, cache = Arm("spec", KINDS["spec"], (count / 20,)).read(model, mx.array(ids))
    np.testing.assert_allclose(last_logits(model.base, cache, ids), expected, atol=1e-3)


@each_family
def test_lazy_prunes_from_layer_to_layer(family: str) -> None:
    model, ids = FAMILIES[family](), token_ids(PROMPT, seed=3)
    oracle, tokens = oracle_of(model), PROMPT - 1
    shares = [1.0, 1.0, 0.75 - 0.5 * (0.5 - 0.3) / 0.6, 0.75 - 0.5 * (0.75 - 0.3) / 0.6]
    assert [lazy_retention(layer, 4, 0.75, 0.25) for layer in range(4)] == pytest.approx(shares)
    places, x = np.arange(PROMPT), embedded(oracle, ids)
    cache: list = [None] * 4
    for layer in range(4):
        before = x
        x = read_at(oracle, range(layer, layer + 1), x, places, cache)
        count = round(tokens * shares[layer + 1]) if layer < 3 else tokens
        if count < len(places) - 1:
            row = attention_row(oracle, layer, before, places, cache[layer]).mean(axis=0)
            chosen = np.append(best(row, count), len(places) - 1)
            places, x = places[chosen], x[:, chosen]
    mine = lazy_prefill(model, mx.array(ids), 0.75, 0.25, step_size=6)
    assert [layer.offset for layer in mine] == [20, 20, round(20 * shares[2]), round(20 * shares[3])]
    np.testing.assert_allclose(last_logits(model, mine, ids), logits_of(oracle, x), atol=1e-3)


def test_a_batch_is_its_rows() -> None:
    model, ids = llama(), token_ids(PROMPT, batch=3, seed=4)
    for read in (
        lambda rows: static_prefill(model, rows, 0.5),
        lambda rows: lazy_prefill(model, rows, 0.5, 0.25),
        lambda rows: random_prefill(model, rows, 0.5, seed=1),
    ):
        together = last_logits(model, read(mx.array(ids)), ids)
        alone = [last_logits(model, read(mx.array(row[None])), row[None])[0] for row in ids]
        np.testing.assert_allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("name", ["random-0.6", "static-0.6", "lazy-0.8-0.4", "spec-0.6"])
def test_parts_side_by_side_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mx.default_device().type != mx.DeviceType.cpu:
        pytest.skip("GPUs run one stream")
    model, ids = prefixed(llama(), 2)[0], token_ids(29)
    _, whole = parse_arm(name).read(model, mx.array(ids), Reading(step_size=10))
    monkeypatch.setattr(streams, "MIN_ROWS", 4)
    monkeypatch.setattr(streams, "openblas_threads", lambda: 3)
    used = []
    monkeypatch.setattr(
        baselines, "parts", lambda *args: used.append(len(streams.parts(*args))) or streams.parts(*args)
    )
    _, parted = parse_arm(name).read(model, mx.array(ids), Reading(step_size=10))
    assert max(used) == 2
    for one, other in zip(whole, parted, strict=True):
        np.testing.assert_allclose(*(np.array(layer.keys_and_values()) for layer in (one, other)), atol=1e-5)


@pytest.mark.parametrize("name", ["full", "kvp", "kvp-5", "kvp-99", "random-1", "static-1", "lazy-1-1", "spec-1"])
@pytest.mark.parametrize("base", BASES)
def test_at_retention_one_every_arm_is_the_full_model(name: str, base: str) -> None:
    model, ids = itself(BASES[base]()), token_ids(PROMPT)
    answering, cache = parse_arm(name).read(model, mx.array(ids), Reading(step_size=8))
    full = base_prefill(model, mx.array(ids[:, :-1]))
    np.testing.assert_allclose(last_logits(answering, cache, ids), last_logits(model.base, full, ids), atol=1e-3)


def test_arms_that_answer_alone() -> None:
    model, oracle = prefixed(llama(), 2)
    ids = token_ids(PROMPT)
    for name, layers in {"auxiliary": [0, 1], "layers-0.5": [0, 2], "layers-0.75": [0, 1, 2]}.items():
        answering, cache = parse_arm(name).read(model, mx.array(ids))
        x = embedded(oracle.base, ids)
        for layer in layers:
            x = read_at(oracle.base, range(layer, layer + 1), x, np.arange(PROMPT), [None] * 4)
        np.testing.assert_allclose(last_logits(answering, cache, ids), logits_of(oracle.base, x), atol=1e-3)
    assert mixer_of(model.base, 0).rope is not None  # the wrapped modules are back
    assert len(model.base.layers) == 4


def test_random_keeps_a_seeded_share() -> None:
    model, ids = llama(), mx.array(token_ids(101))
    rows = [random_prefill(model, ids, 0.25, seed=seed)[0].keys_and_values()[0] for seed in (0, 0, 1)]
    assert [row.shape[2] for row in rows] == [25] * 3
    assert mx.array_equal(rows[0], rows[1])
    assert not mx.array_equal(rows[0], rows[2])


def test_a_prompt_of_one_token_has_nothing_to_read() -> None:
    model, _ = prefixed(llama(), 2)
    for name in ("full", "kvp", "kvp-4", "auxiliary", "random-0.5", "static-0.5", "lazy-0.5-0.25", "spec-0.5"):
        answering, cache = parse_arm(name).read(model, mx.array([[3]]))
        assert last_logits(answering, cache, np.array([[3]])).shape == (1, 97)


def test_most_important_come_in_order() -> None:
    assert largest(mx.array([[0.1, 0.5, 0.2, 0.9]]), 3).tolist() == [[1, 2, 3]]


def test_names() -> None:
    assert parse_arms("full, kvp-64,full,lazy-0.75-0.25") == [
        Arm("full", KINDS["full"]),
        Arm("kvp-64", KINDS["kvp"], (64,)),
        Arm("lazy-0.75-0.25", KINDS["lazy"], (0.75, 0.25)),
    ]
    for bad in (
        "psychic",
        "kvp-x",
        "kvp-1-2",
        "random",
        "random-0",
        "random-1.5",
        "lazy-0.5",
        "layers-0.6",
        "",
        "full-1",
    ):
        with pytest.raises(InputError):
            parse_arm(bad)


@pytest.fixture(scope="module")
def openelm_1_1b() -> KVPModel:
    """The published pair, never evaluated: only its shapes count."""
    base, auxiliary, config = preset_parts("openelm-1_1b-kvp-lp-0_50")
    return KVPModel(base, auxiliary, build_predictor(base, auxiliary, config), None, config, {})


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        *(("random-0.75", 1 / 0.75), ("random-0.25", 4), ("layers-0.25", 4), ("static-0.5", 1 / (0.25 + 0.5))),
        *(("lazy-0.75-0.75", 1 / (0.3 + 0.7 * 0.75)), ("lazy-0.75-0.25", 1 / (0.3 + 0.6 * 0.5 + 0.1 * 0.25))),
    ],
)
def test_work_is_what_the_paper_says(name: str, ratio: float, openelm_1_1b: KVPModel) -> None:
    """The paper's ratios (1.33, 4, 1.33, 1.21, 1.60) are of equal layers, and leave attention aside."""
    shape = {"num_attention_heads": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-5, "vocab_size": 100}
    args = mlx_lm_llama.ModelArgs("llama", hidden_size=2048, num_hidden_layers=40, intermediate_size=8192, **shape)
    model = replace(openelm_1_1b, base=mlx_lm_llama.Model(args))
    full, arm = (parse_arm(arm).work(model, 401).flops for arm in ("full", name))
    assert full == full_work(model, 401, 1).flops
    assert full / arm == pytest.approx(ratio, rel=0.08)  # the last of few layers is only half run


def test_work_of_prediction_with_and_without_a_tail(openelm_1_1b: KVPModel) -> None:
    works = {name: parse_arm(name).work(openelm_1_1b, 1000) for name in ("kvp", "kvp-0", "kvp-64", "kvp-999")}
    assert works["kvp"] == works["kvp-0"] == kvp_work(openelm_1_1b, 1000, 1)
    assert works["kvp"].flops < works["kvp-64"].flops < works["kvp-999"].flops
    assert works["kvp-999"] == parse_arm("full").work(openelm_1_1b, 1000)
