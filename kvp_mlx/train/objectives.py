"""What training minimises: the paper's three losses, and the continuation objective that matches decoding.

Each is a function of the base's own pass (``Teacher``) and the auxiliary's reading of the same tokens, and is
differentiable in whatever the reading and the maps were made of. All are means over the tokens that are kept.
"""

import math
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import ConcatenateKVCache, KVCache

from ..bundle.loading import KVPModel
from ..engine.recompute import attention_of_prefix, settings_of, weighed_by_attention
from ..errors import InputError
from ..models.entries import append_raw, compared, open_caches
from ..models.families import Cache, LayerCache, kinds_of
from ..models.kinds import RawOutputs
from ..models.sections import output_head, run_layers, run_streams, section
from .teacher import Batch, Reading, Teacher, exact_layers


@dataclass(frozen=True)
class Weights:
    """How much each objective counts; 0 leaves it out.

    Attributes:
        continuation: KL divergence on what follows a predicted cache, and ``residual`` times the error of the
            residual stream there.
        base: cross-entropy of the base reading predicted entries alone.
        auxiliary: cross-entropy of the auxiliary; None: 1, or 0 for a prefix, which has no output of its own.
        consistency: L1 between predicted and true entries; None: one over the number of base layers.
        z: of the squared log-partition, added to both cross-entropies.
    """

    continuation: float = 1.0
    residual: float = 5.0
    base: float = 0.0
    auxiliary: float | None = 0.0
    consistency: float | None = 0.0
    z: float = 0.0

    def __post_init__(self) -> None:
        """Check them."""
        given = [1.0 if weight is None else weight for weight in astuple(self)]
        if not all(weight >= 0 and math.isfinite(weight) for weight in given):
            raise InputError("the weight of a loss cannot be negative, infinite or no number; give 0 or more.")
        if not any(given[i] for i in (0, 2, 3, 4)):
            raise InputError("every loss has weight 0; give at least one of them some weight.")

    def settled(self, model: KVPModel) -> "Weights":
        """Return the weights with the defaults that depend on the bundle filled in.

        Raises:
            InputError: an auxiliary loss for a prefix.
        """
        if model.is_prefix and self.auxiliary:
            raise InputError("a prefix has no output of its own to train; leave --auxiliary-weight out.")
        auxiliary = float(not model.is_prefix) if self.auxiliary is None else self.auxiliary
        consistency = 1 / len(model.base.layers) if self.consistency is None else self.consistency
        return replace(self, auxiliary=auxiliary, consistency=consistency)

    @property
    def paper(self) -> bool:
        """Whether one of the paper's losses counts (which need a pass on predicted entries alone)."""
        return bool(self.base or self.auxiliary or self.consistency)


OBJECTIVES = {
    "continuation": Weights(),
    "paper": Weights(continuation=0, base=1, auxiliary=None, consistency=None, z=1e-4),
}
"""The paper's: arXiv 2410.08391, with the consistency weight that it found better than 1."""


def weights_of(objective: str, **given: float | None) -> Weights:
    """Return the named weights (``continuation`` or ``paper``), with those that are given in their place."""
    return replace(OBJECTIVES[objective], **{name: weight for name, weight in given.items() if weight is not None})


def masked_mean(values: mx.array, kept: mx.array) -> mx.array:
    """Return the mean of the values that are kept (0 if there are none)."""
    return mx.where(kept, values, 0).sum() / mx.maximum(kept.sum(), 1)


def next_token_loss(logits: mx.array, batch: Batch, z: float) -> mx.array:
    """Return the mean cross-entropy of every next token, plus ``z`` times the squared log-partition.

    Args:
        logits: (B, T, vocab).
        batch: the tokens; a position counts if the one after it is kept.
        z: weight of the z-loss.
    """
    logits, targets = logits[:, :-1].astype(mx.float32), batch.ids[:, 1:]
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]  # (B, T, vocab) -> (B, T)
    log_partition = mx.logsumexp(logits, axis=-1)
    return masked_mean(log_partition - chosen + z * mx.square(log_partition), batch.kept[:, 1:])


def auxiliary_loss(model: KVPModel, reading: Reading, batch: Batch, z: float = 0.0) -> mx.array:
    """Return the auxiliary's own next-token loss, nats per token (arXiv 2410.08391, section 3)."""
    return next_token_loss(output_head(model.auxiliary, reading.hidden), batch, z)


def base_loss(
    model: KVPModel, teacher: Teacher, reading: Reading, predicted: dict[int, RawOutputs], batch: Batch, z: float = 0.0
) -> mx.array:
    """Return the base's next-token loss with every key and value predicted, nats per token.

    Token t attends to the predicted entries of 0 to t, its own position included, and to none of the base's.
    """
    start = exact_layers(model)
    cache = student_cache(model, reading, predicted, batch.ids.shape[1])[start:]
    above = section(model.base, start, len(model.base.layers))
    hidden, _ = run_layers(above, teacher.streams[0], [PredictedOnlyCache(layer) for layer in cache])
    return next_token_loss(output_head(model.base, hidden), batch, z)


def consistency_loss(model: KVPModel, teacher: Teacher, predicted: dict[int, RawOutputs], batch: Batch) -> mx.array:
    """Return the L1 distance of predicted from true entries.

    The mean over tokens and features, summed over layers, keys and values. Keys are compared after k_norm and
    before RoPE, values raw.
    """
    total = mx.array(0.0)
    for layer, raw in predicted.items():
        both = (compared(model.base, layer, outputs) for outputs in (raw, teacher.raw[layer]))
        for one, other in zip(*both, strict=True):
            total = total + masked_mean(mx.abs(one - other).astype(mx.float32).mean(axis=-1), batch.kept)
    return total


def continuation_losses(
    model: KVPModel,
    teacher: Teacher,
    reading: Reading,
    batch: Batch,
    split: int,
    end: int,
    *,
    recompute: float = 0.0,
    checkpoint: bool = False,
) -> tuple[mx.array, mx.array]:
    """Return how far the base strays when it goes on from a predicted cache, as decoding does.

    The cache of positions below ``split`` is predicted; the base reads ``split`` to ``end - 1`` on top of it with
    its own keys and values. A share ``recompute`` of the predicted tokens, those that a dial would recompute, has its
    true entries. With ``checkpoint``, activations are computed once more for the backward pass.

    Returns:
        The KL divergence of its next-token distribution from the one on the true cache, nats per token; and the
        squared error of the residual stream, relative to what the predicted layers add to it, a mean over layers.
    """
    start, kept = exact_layers(model), batch.kept[:, split:end]
    cache = student_cache(model, reading, predict(model, teacher, reading, split), split)
    if recompute:
        cache = with_true_entries(model, teacher, reading, cache, split, recompute)
    true = [stream[:, split:end] for stream in teacher.streams]
    if checkpoint:
        streams = checkpointed_streams(model, true[0], cache, start)
    else:
        streams, _ = run_streams(model.base, true[0], cache, start)
    divergence = kl_divergence(output_head(model.base, true[-1]), output_head(model.base, streams[-1]))
    return masked_mean(divergence, kept), stream_error(streams[1:-1], true[1:-1], true[0] if start else 0.0, kept)


def checkpointed_streams(model: KVPModel, x: mx.array, cache: Cache, first: int) -> list[mx.array]:
    """Return what ``run_streams`` returns, keeping nothing else for the backward pass."""
    streams = [x]
    for layer in range(first, len(model.base.layers)):
        held = dict(tree_flatten(cache[layer].state))
        arrays = {name: array for name, array in held.items() if isinstance(array, mx.array)}
        run = mx.checkpoint(partial(_layer_on, model, layer, held, x))
        taken = streams[-1:] if layer > 0 else []  # token ids have no gradient
        streams.append(run(arrays, *taken))
    return streams


def _layer_on(
    model: KVPModel,
    layer: int,
    held: dict[str, Any],
    ids: mx.array,
    arrays: dict[str, mx.array],
    x: mx.array | None = None,
) -> mx.array:
    """Run one layer on ``x``, or on token ids, on top of a cache whose state is ``held`` with these arrays in it."""
    own = kinds_of(model.base)[layer].open_cache()
    own.state = tree_unflatten(list((held | arrays).items()))
    return run_layers(section(model.base, layer, layer + 1), ids if x is None else x, [own])[0]


def stream_error(streams: list[mx.array], true: list[mx.array], origin: mx.array | float, kept: mx.array) -> mx.array:
    """Return the squared error of residual streams (B, T, hidden) relative to ``true - origin``, a mean over all."""
    errors = [
        masked_mean(mx.square(one - other).sum(axis=-1) / (mx.square(other - origin).sum(axis=-1) + 1e-6), kept)
        for one, other in zip(streams, true, strict=True)
    ]
    return sum(errors, mx.array(0.0)) / max(len(errors), 1)


def kl_divergence(true: mx.array, predicted: mx.array) -> mx.array:
    """Return KL(true, predicted) of two arrays of logits (..., vocab), in nats.

    Passes over the vocabulary that take exponentials are what is slow on a CPU: one for each side.
    """
    true, predicted = true.astype(mx.float32), predicted.astype(mx.float32)
    target = mx.softmax(true, axis=-1)
    difference = log_partition(predicted, mx.softmax(predicted, axis=-1)) - log_partition(true, target)
    return (target * (true - predicted)).sum(axis=-1) + difference


def log_partition(logits: mx.array, probabilities: mx.array) -> mx.array:
    """Return logsumexp (...) of logits (..., vocab), given their softmax."""
    return logits.max(axis=-1) - mx.log(probabilities.max(axis=-1))


def predict(model: KVPModel, teacher: Teacher, reading: Reading, tokens: int) -> dict[int, RawOutputs]:
    """Return the predicted raw pairs of the first ``tokens`` positions in the base's dtype; the maps are fp32."""
    dtype = teacher.streams[-1].dtype
    pairs = model.predictor({name: x[:, :tokens] for name, x in reading.inputs.items()})
    return {layer: {kind: x.astype(dtype) for kind, x in pair.items()} for layer, pair in pairs.items()}


def student_cache(model: KVPModel, reading: Reading, predicted: dict[int, RawOutputs], split: int) -> Cache:
    """Return the base's cache of the first ``split`` positions as prediction leaves it."""
    cache = open_caches(model.base)
    for own, shared in zip(cache, reading.cache, strict=False):
        if isinstance(shared, KVCache | ConcatenateKVCache):  # nobody reads the others' below a prediction
            keys, values = shared.keys_and_values()
            own.update_and_fetch(keys[..., :split, :], values[..., :split, :])
    append_raw(model.base, predicted, cache)
    return cache


def with_true_entries(
    model: KVPModel, teacher: Teacher, reading: Reading, cache: Cache, split: int, share: float
) -> Cache:
    """Return the cache of the first ``split`` positions with the base's own entries where recomputation puts them.

    They are those of the last tokens, which ask and are an exact tail, and of the ``share`` of the others that would do
    most harm, so that training spends nothing on them. Where the base is asked what the end attends to, which takes a
    pass of its own, the estimate alone decides. Half of a short text is predicted in any case.
    """
    settings = settings_of(model)
    harm, attention = model.predictor.deviations({name: x[:, :split] for name, x in reading.inputs.items()}), None
    if reading.behind is not None and settings.asks == "prefix":
        attention = attention_of_prefix(model, reading.behind[:, :split], cache)
    tail = min(settings.asking_tokens, split // 2)
    harm = weighed_by_attention(model, harm, attention)
    harm = mx.where(mx.arange(split) < split - tail, harm, mx.inf)
    least = mx.sort(harm, axis=1)[:, split - tail - max(1, round(share * (split - tail))), None]
    is_true = (harm >= least)[:, None, :, None]  # (B, 1, split, 1)
    true, merged = open_caches(model.base), list(cache)
    raw = {layer: {kind: x[:, :split] for kind, x in outputs.items()} for layer, outputs in teacher.raw.items()}
    append_raw(model.base, raw, true)
    for layer in raw:
        both = zip(true[layer].keys_and_values(), cache[layer].keys_and_values(), strict=True)
        merged[layer] = ConcatenateKVCache()
        merged[layer].update_and_fetch(*(mx.where(is_true, one, other) for one, other in both))
    return merged


class PredictedOnlyCache(ConcatenateKVCache):
    """Hands a layer the predicted entries of the very positions that it reads, in place of its own."""

    def __init__(self, predicted: LayerCache):
        super().__init__()
        self.predicted = predicted.keys_and_values()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Leave the layer's own entries aside."""
        return self.predicted
