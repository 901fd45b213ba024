"""The continuation objective: the base must go on from a predicted cache as it would from the true one.

A window is split at a random point. The left part's cache is predicted, the base reads the right part on top of
it with its own keys and values, as in decoding, and the loss is the KL divergence from its next-token
distribution on the true cache. One teacher pass per window gives the targets, the predictor's inputs and the
exact entries of a prefix, and serves several splits.
"""

from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models.cache import ConcatenateKVCache, make_prompt_cache

from ..bundle import KVPModel
from ..families import Cache, append_raw, output_head, run_layers

TEACHER_STEP_SIZE = 256


@dataclass(frozen=True)
class Teacher:
    """What one pass over a window (1, T) gives.

    Attributes:
        ids: the window (1, T).
        hidden: the inner model's output (1, T, hidden).
        inputs: the predictor's inputs (1, T, in) by map.
        cache: the base's true cache of T positions.
    """

    ids: mx.array
    hidden: mx.array
    inputs: dict[str, mx.array]
    cache: Cache


def teach(model: KVPModel, window: list[int]) -> Teacher:
    """Run base and auxiliary over a window and evaluate what training needs of it."""
    ids = mx.array([window])
    cache = make_prompt_cache(model.base)
    auxiliary_cache = make_prompt_cache(model.auxiliary)
    outputs, inputs = [], []
    for start in range(0, len(window), TEACHER_STEP_SIZE):
        chunk = ids[:, start : start + TEACHER_STEP_SIZE]
        listen = model.predictor.sources if model.is_prefix else []
        output, heard = run_layers(model.base, chunk, cache, listen)
        if not model.is_prefix:
            _, heard = run_layers(model.auxiliary, chunk, auxiliary_cache, model.predictor.sources)
        outputs.append(output)
        inputs.append(model.predictor.inputs(heard))
        mx.eval(outputs[-1], inputs[-1], [layer.state for layer in cache])
    joined = {name: mx.concatenate([part[name] for part in inputs], axis=1) for name in inputs[0]}
    return Teacher(ids, mx.concatenate(outputs, axis=1), joined, cache)


def student_cache(model: KVPModel, teacher: Teacher, split: int) -> Cache:
    """Return the base's cache of the first ``split`` positions: exact where the bundle's is, else predicted."""
    cache: Cache = [ConcatenateKVCache() for _ in model.base.layers]
    predicted = model.predictor({name: x[:, :split] for name, x in teacher.inputs.items()})
    for layer, (own, true) in enumerate(zip(cache, teacher.cache, strict=True)):
        if layer not in predicted:
            keys, values = true.keys_and_values()
            own.update_and_fetch(keys[..., :split, :], values[..., :split, :])
    append_raw(model.base, predicted, cache)
    return cache


def continuation_loss(model: KVPModel, teacher: Teacher, split: int, right: int) -> mx.array:
    """Return the mean KL divergence over the ``right`` positions from ``split`` on, nats per token.

    Written as soft-target cross-entropy minus the target's entropy: the fewest passes over the vocabulary.
    """
    end = split + right
    true = output_head(model.base, teacher.hidden[:, split:end]).astype(mx.float32)
    target = mx.softmax(true, axis=-1)
    entropy = mx.logsumexp(true, axis=-1) - (target * true).sum(axis=-1)
    hidden, _ = run_layers(model.base, teacher.ids[:, split:end], student_cache(model, teacher, split))
    predicted = output_head(model.base, hidden).astype(mx.float32)
    cross_entropy = mx.logsumexp(predicted, axis=-1) - (target * predicted).sum(axis=-1)
    return (cross_entropy - entropy).mean()
