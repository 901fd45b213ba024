"""The arithmetic: FLOPs and weight bytes of a first token, by full prefill, by prediction and by token pruning.

Counted: every matmul that is evaluated, attention over the causal half, the predictor, the base's first step.
Not counted: embedding look-up and output head, norms, softmax; the few queries that choose tokens, of pruning or of a
prefix that is asked. The last layer of a model that only fills a cache contributes its K and V projections (all of a
fused projection) and nothing else: that is so for mlx-lm's own prefill too, since nothing asks for the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..bundle.loading import KVPModel
from ..engine.prefill import reads_on_top
from ..engine.recompute import Span, is_asked, settings_of, spans
from ..models.families import SUMMING, kinds_of, linear_size, targets_of


@dataclass(frozen=True)
class Work:
    """FLOPs, bytes of weights read, and values that hosts among which a base is spread add up; all of one host."""

    flops: float = 0.0
    weight_bytes: float = 0.0
    summed_values: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        weight_bytes = self.weight_bytes + other.weight_bytes
        return Work(self.flops + other.flops, weight_bytes, self.summed_values + other.summed_values)


def full_work(model: KVPModel, prompt_tokens: int, batch: int) -> Work:
    """Return the work of mlx-lm's own prefill and first step."""
    return alone_work(model.base, prompt_tokens, batch)


def kvp_work(
    model: KVPModel, prompt_tokens: int, batch: int, share: float = 0.0, exact_tail: int = 0, exact_head: int = 0
) -> Work:
    """Return the work of auxiliary prefill, prediction, the base's own reading and its first step."""
    read, step = prompt_tokens - 1, step_work(model.base, prompt_tokens, batch)
    if reads_on_top(model, share, exact_tail):  # the last token goes through the layers with what is recomputed
        step = replace(step, weight_bytes=step.weight_bytes - sum(map(_bytes, model.base.layers[:-1])))
    return (
        prefill_work(model.auxiliary, read, batch)
        + predictor_work(model, read, batch)
        + recompute_work(model, read, batch, share, exact_tail, exact_head)
        + step
    )


def recompute_work(
    model: KVPModel, tokens: int, batch: int, share: float, exact_tail: int, exact_head: int = 0
) -> Work:
    """Return the work of ``recompute.repairing`` on ``tokens`` positions: asking, and reading what was chosen.

    What is chosen beside the tokens at the end is taken to be spread evenly.
    """
    lower, upper = spans(model, share, tokens, exact_tail, exact_head)
    if not lower.tokens:
        return Work()
    asking = settings_of(model).asking_tokens
    last = min(lower.tokens - exact_head, max(exact_tail, asking))
    before = tokens - last  # mean entries that a token sees: of those spread evenly, and of the last ones
    own = last * (before + (last + 1) / 2)
    work = Work()
    for span in (lower, upper):
        work += span_work(model, span, own + (span.tokens - last) * (before + 1) / 2, batch)
    if is_asked(settings_of(model), lower.tokens - exact_head, last):
        pairs = asking * (tokens - asking + (asking + 1) / 2)
        work += span_work(model, lower._replace(tokens=asking), pairs, batch)
    return work


def span_work(model: KVPModel, span: Span, pairs: float, batch: int) -> Work:
    """Return the work of a span's reading; the model's last layer only projects K and V.

    Args:
        model: the bundle.
        span: layers, and the positions that they read.
        pairs: of such a position and an entry that it sees.
        batch: sequences.
    """
    work, last = Work(), len(model.base.layers) - 1
    for layer in range(span.first, min(span.last, last)):
        module, mixing = model.base.layers[layer], batch * attention_flops(model.base, layer, 1, pairs)
        summed = batch * span.tokens * summed_size(module)
        work += Work(2.0 * batch * span.tokens * linear_size(module) + mixing, _bytes(module), summed)
    return work + kv_work(model.base, last, span.tokens, batch) if span.first <= last < span.last else work


def predictor_work(model: KVPModel, tokens: int, batch: int) -> Work:
    """Return the work of the predictor's maps on ``batch * tokens`` positions."""
    flops = 0.0
    for block in model.predictor.blocks:
        positions = tokens if block.last is None else min(tokens, block.last)
        flops += 2.0 * positions * block.in_width * block.out_width
    for layer in {layer for block in model.predictor.blocks for layer, _, _ in block.targets}:
        flops += tokens * state_flops(model.base, layer)
    return Work(batch * flops, sum(map(_bytes, model.predictor.maps.values())))


def prefill_work(model: nn.Module, tokens: int, batch: int) -> Work:
    """Return the work of filling a cache with ``tokens`` positions; the last layer only projects K and V."""
    last = len(model.layers) - 1
    whole = (layer_work(model, layer, tokens, batch) for layer in range(last))
    return sum(whole, kv_work(model, last, tokens, batch))


def layer_work(model: nn.Module, layer: int, tokens: int, batch: int) -> Work:
    """Return the work of one whole layer on ``tokens`` positions that follow none."""
    module = model.layers[layer]
    attention = batch * attention_flops(model, layer, tokens, mean_entries(model, layer, tokens))
    rest = batch * tokens * (2.0 * linear_size(module) + state_flops(model, layer))
    return Work(rest + attention, _bytes(module), batch * tokens * summed_size(module))


def kv_work(model: nn.Module, layer: int, tokens: int, batch: int) -> Work:
    """Return the work of the projections that feed one layer's cache (all of a fused one)."""
    mixer = model.layers[layer][kinds_of(model)[layer].mixer]
    projections = [mixer[name] for name in dict.fromkeys(target.projection for target in targets_of(model)[layer])]
    size = sum(linear_size(projection) for projection in projections)
    flops = batch * tokens * (2.0 * size + state_flops(model, layer))
    return Work(flops, sum(map(_bytes, projections)))


def step_work(model: nn.Module, context: int, batch: int) -> Work:
    """Return the work of one decoding step that attends to ``context`` positions; bytes include the head."""
    work = Work(0.0, _bytes(model))
    for number, layer in enumerate(model.layers):
        rest = 2.0 * linear_size(layer) + state_flops(model, number)
        flops = batch * (rest + attention_flops(model, number, 1, context))
        work += Work(flops, 0.0, batch * summed_size(layer))
    return work


def alone_work(network: nn.Module, prompt_tokens: int, batch: int) -> Work:
    """Return the work of a model that reads a whole prompt and decodes itself."""
    return prefill_work(network, prompt_tokens - 1, batch) + step_work(network, prompt_tokens, batch)


def kept_work(base: nn.Module, kept: int, batch: int) -> Work:
    """Return the work of a base that reads ``kept`` tokens of a prompt, and its first step."""
    return prefill_work(base, kept, batch) + step_work(base, kept + 1, batch)


def lazy_work(base: nn.Module, kept_by_layer: Sequence[int], batch: int) -> Work:
    """Return LazyLLM's work: every layer over its own share of the prompt, the last token among them."""
    depth, work = len(base.layers), step_work(base, 0, batch)
    for layer, kept in enumerate(kept_by_layer):
        layer_or_kv = layer_work if layer + 1 < depth else kv_work
        work += layer_or_kv(base, layer, kept + 1, batch)
        work += Work(batch * attention_flops(base, layer, 1, kept + 1))  # of the step
    return work


def attention_flops(model: nn.Module, layer: int, queries: int, keys: float) -> float:
    """Return the FLOPs of scores and weighted values of ``queries`` tokens over ``keys`` entries of one layer."""
    kind = kinds_of(model)[layer]
    keys = min(keys, getattr(kind, "window", keys))
    return queries * keys * kind.pair_flops(model.layers[layer][kind.mixer])


def mean_entries(model: nn.Module, layer: int, tokens: int) -> float:
    """Return how many entries of a layer one of the first ``tokens`` positions sees, on average."""
    window = min(tokens, getattr(kinds_of(model)[layer], "window", tokens))
    return (tokens + 1) / 2 if window == tokens else window - window * (window - 1) / (2 * tokens)


def state_flops(model: nn.Module, layer: int) -> float:
    """Return the FLOPs per token of keeping one layer's state."""
    kind = kinds_of(model)[layer]
    return kind.state_flops(model.layers[layer][kind.mixer])


def summed_size(module: nn.Module) -> int:
    """Return how many values hosts add up for each token in a module."""
    return sum(int(part.weight.shape[0]) for part in module.modules() if isinstance(part, SUMMING))


def parameters_of(module: nn.Module) -> int:
    """Return the number of parameters, embeddings included."""
    return sum(array.size for _, array in tree_flatten(module.parameters()))


def _bytes(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()) if isinstance(array, mx.array))
