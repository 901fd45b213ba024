"""Recomputation by hand, on the NumPy oracle."""

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from support.oracle import rotate, split_heads
from support.tiny import estimating, llama, openelm, paired, prefixed, small_llama

from kvp_mlx.engine.auxiliary import auxiliary_prefill
from kvp_mlx.engine.recompute import first_layer

ASKING_TOKENS, ATTENTION_REACH, ATTENTION_WEIGHT = 16, 12, 0.5
SETUPS = {
    "llama prefix": lambda: prefixed(llama(), 1),
    "openelm prefix": lambda: prefixed(openelm(), 2),
    "openelm prefix, two sources": lambda: prefixed(openelm(), 1, (None, None, (0, 1), (1, 0))),
    "openelm from llama": lambda: paired(openelm(), small_llama(), ((0,), (0,), (1,), (2,))),
}


def repairing(name):
    """Return a bundle with an estimator of random weights, and its oracle."""
    model, oracle = SETUPS[name]()
    return estimating(model), oracle


def repaired_by_hand(model, oracle, ids, ratio, cache=None, auxiliary_cache=None, *, tail=0, head=0):
    """Return the oracle's cache of one sequence, ids (1, T) after a cache, and the positions that the base reads."""
    predicted, _ = oracle.prefill(ids[:, len(cache[0]) if cache else 0 :], cache, auxiliary_cache)
    begin, end = len(cache[0]) if cache else 0, ids.shape[1]
    start, depth = first_layer(model), oracle.base.depth
    middle = start + round(2 / 3 * (depth - start))
    others = end - begin - head - tail
    wanted = tail + read_below(ratio, others)
    above = tail + round(max(0, 4 * ratio - 1) / 3 * others)
    certain = max(tail, min(ASKING_TOKENS, wanted))
    harm = np.zeros(end - begin)
    if wanted > certain:
        inputs, _ = auxiliary_prefill(model, mx.array(ids), make_prompt_cache(model.auxiliary))
        harm = np.array(model.predictor.deviations(inputs))[0, begin:]
        if wanted - certain >= ASKING_TOKENS:
            asking = np.arange(end - ASKING_TOKENS, end)
            predicted = oracle.base.rewrite(ids, predicted, {start: asking})
            asked = most_attention(oracle.base, ids, predicted, asking, range(start, middle))
            asked = np.array([asked[max(0, i - ATTENTION_REACH) : i + 1].max() for i in range(begin, end)])
            harm = harm + ATTENTION_WEIGHT * np.log(asked + 1e-9)
    order = begin + np.concatenate([np.arange(end - begin)[-certain:], head + np.argsort(-harm[head:-certain])])
    first = begin + np.arange(head)
    positions, few = (np.sort([*first, *order[:count]]) for count in (wanted, max(above, certain)))
    return oracle.base.rewrite(ids, predicted, {start: positions, middle: few}), positions


def read_below(ratio, others):
    """Return how many of the other tokens the lower layers read: half as many again up to a quarter, then less so."""
    return round((1.5 * ratio if ratio <= 0.25 else 1 / 6 + ratio * 5 / 6) * others)


def most_attention(base, ids, cache, asking, listened):
    """Return the largest attention (T,) of the asking tokens to each entry, over heads and some layers."""
    x, most = base.weights[f"{base.inner}.{base.embedding}.weight"][ids[:, asking]], np.zeros(ids.shape[1])
    for layer in range(base.depth):
        queries, _, _ = base.project(layer, base.norm(layer, base.attention_norm, x))
        queries = base.head_norm(layer, "q_norm", split_heads(queries, base.query_heads(layer)))
        queries = rotate(queries, asking, base.rope_base)
        keys = np.repeat(cache[layer].keys, queries.shape[1] // cache[layer].keys.shape[1], axis=1)
        scores = queries @ keys.swapaxes(2, 3) / np.sqrt(queries.shape[-1])
        weights = np.exp(np.where(np.arange(ids.shape[1]) <= asking[:, None], scores, -np.inf))
        weights /= weights.sum(axis=-1, keepdims=True)
        if layer in listened:
            most = np.maximum(most, weights.max(axis=(0, 1, 2)))
        values = np.repeat(cache[layer].values, queries.shape[1] // cache[layer].values.shape[1], axis=1)
        heads = (weights @ values).swapaxes(1, 2).reshape(1, len(asking), -1)
        x = x + base.output(layer, heads)
        x = x + base.ffn(layer, base.norm(layer, base.ffn_norm, x))
    return most
