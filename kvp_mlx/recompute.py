"""Selective recomputation: the base itself reads the prompt tokens whose prediction would do most harm.

Prediction fails on few tokens, and badly (names, figures, rare words). CacheBlend (arXiv 2405.16444) repairs a cache
that it reused by computing the entries anew of those tokens that deviate most; the share of them is its "recompute
ratio". Here the predictor tells from what it is given how wrong it will be and what harm that will do, and the end of
the prompt, where a question stands, tells what is going to be looked at. In the last third of the layers it reads
fewer: the same work, spent on more tokens in the lower ones, brings the answer closer to full prefill's.
"""

from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import generation_stream

from .attention import last_attention
from .bundle import KVPModel
from .families import Cache, LayerCache, run_layers, section
from .positions import rope_at
from .streams import parts, side_by_side

ASKING_TOKENS = 16
"""Tokens at the prompt's end that the base reads first, to see what they attend to."""
ATTENTION_WEIGHT = 0.5
"""Of the logarithm of attention beside the estimated deviation; chosen on prompts that no evaluation uses."""
ATTENTION_REACH = 12
"""Tokens after an attended one that count as attended too: an answer goes on from where the question points to."""
LOWER_LAYERS = 2 / 3
"""Of the layers from ``first_layer`` on: those whose entries count most; chosen on the default model's base."""
UPPER_FROM = 0.25
"""Share to recompute from which on the layers above these read more than the prompt's end (all of it at 1)."""


def first_layer(model: KVPModel) -> int:
    """Return the base's layer at which recomputation begins: where an exact prefix ends, else its first."""
    return model.config.auxiliary.layers if model.has_exact_prefix else 0


class Span(NamedTuple):
    """How many tokens the base reads again in layers ``first`` to ``last - 1``."""

    first: int
    last: int
    tokens: int


def spans(model: KVPModel, tokens: int, exact_tail: int) -> list[Span]:
    """Return what recomputation reads of ``tokens`` positions, in the lower layers and in the ones above.

    The mean over layers of their tokens is the exact tail and the model's share of the others.
    """
    first, end = first_layer(model), len(model.base.layers)
    middle = first + round(LOWER_LAYERS * (end - first))
    upper = max(0.0, model.recompute - UPPER_FROM) / (1 - UPPER_FROM)
    lower = (model.recompute - (1 - LOWER_LAYERS) * upper) / LOWER_LAYERS
    most, least = (exact_tail + round(share * (tokens - exact_tail)) for share in (lower, upper))
    return [Span(first, middle, most), Span(middle, end, max(least, min(most, ASKING_TOKENS)))]


class RewrittenCache:
    """Stands in for one layer's cache: what the layer writes takes the place of entries that are there.

    Attributes:
        positions: of the tokens that the layer reads ``(B, n)``.
        offset: entries that are seen, none of the tokens stands beyond them.
    """

    def __init__(self, cache: LayerCache, positions: mx.array, length: int):
        self.cache = cache
        self.positions = positions
        self.offset = length

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Replace the entries at the positions; returns all keys and values (B, H, S, D) that are seen."""
        held: Any = self.cache
        places = self.positions[:, None, :, None]
        held.keys = mx.put_along_axis(held.keys, mx.broadcast_to(places, keys.shape), keys, axis=2)
        held.values = mx.put_along_axis(held.values, mx.broadcast_to(places, values.shape), values, axis=2)
        return held.keys[..., : self.offset, :], held.values[..., : self.offset, :]

    def make_mask(self, length: int, **_: Any) -> mx.array:
        """Return which entries each token sees ``(B, 1, n, S)``: those up to its own position."""
        return (mx.arange(self.offset) <= self.positions[..., None])[:, None]


def repair(
    model: KVPModel, x: mx.array, deviations: mx.array | None, cache: Cache, exact_tail: int, step_size: int
) -> int:
    """Let the base read the exact tail and a share of the other tokens, and replace their entries.

    The share holds the last ``ASKING_TOKENS`` in any case, and beside these the tokens whose prediction would do most
    harm: the largest deviation, weighed by the attention that the end pays unless few are chosen. See ``spans`` for how
    many and in which layers. Only the T newest are chosen from: what an earlier turn left in the cache stays as it is.

    Args:
        model: the bundle; ``recompute`` is the share.
        x: what ``first_layer`` takes of the T newest tokens in the cache: the residual stream ``(B, T, hidden)``, or
            token ids ``(B, T)`` for layer 0.
        deviations: see ``Predictor.deviations``, of each of them ``(B, T)``; only needed for a share above 0.
        cache: the base's cache, evaluated afterwards.
        exact_tail: how many of the newest tokens are read in any case.
        step_size: tokens per chunk.

    Returns:
        How many tokens of each sequence were read, in some layers at least.
    """
    batch, tokens = x.shape[:2]
    lower, upper = spans(model, tokens, exact_tail)
    if not lower.tokens:
        return 0
    last = min(lower.tokens, max(exact_tail, ASKING_TOKENS))
    harm = mx.zeros((batch, tokens)) if deviations is None else deviations
    if is_asked(lower.tokens, last):
        attention = spread(asked_for(model, x[:, -ASKING_TOKENS:], cache, lower))[:, -tokens:]
        harm = harm + ATTENTION_WEIGHT * mx.log(attention + 1e-9)
    harm = mx.where(mx.arange(tokens) < tokens - last, harm, mx.inf)
    positions = mx.broadcast_to(mx.arange(cache[0].offset - tokens, cache[0].offset), (batch, tokens))
    for span in (lower, upper):
        kept = largest(harm, span.tokens)
        harm, positions = (mx.take_along_axis(numbers, kept, axis=1) for numbers in (harm, positions))
        x = mx.take_along_axis(x, kept if x.ndim == 2 else kept[..., None], axis=1)
        x = read_again(model, x, positions, cache, span, step_size)
    return lower.tokens


def is_asked(wanted: int, last: int) -> bool:
    """Return whether the base reads the end first, given how many tokens it is to read and how many of them are last.

    Asking reads ``ASKING_TOKENS``, so it is left out where fewer than that are to be chosen.
    """
    return wanted - last >= ASKING_TOKENS


def largest(x: mx.array, count: int) -> mx.array:
    """Return the places (B, count), rising, of the largest numbers in ``x`` (B, T)."""
    return mx.sort(mx.argsort(-x, axis=1)[:, :count], axis=1).astype(mx.int32)


def spread(attention: mx.array) -> mx.array:
    """Return for each entry (B, S) the largest attention that it or one of the few before it gets.

    What a question attends to is where an answer begins; the answer's later tokens need what stands after it. SnapKV
    (arXiv 2404.14469) keeps the neighbours of attended entries for that reason.
    """
    entries = attention.shape[1]
    padded = mx.pad(attention, [(0, 0), (ATTENTION_REACH, 0)])
    return mx.stack([padded[:, start : start + entries] for start in range(ATTENTION_REACH + 1)]).max(axis=0)


def asked_for(model: KVPModel, x: mx.array, cache: Cache, span: Span) -> mx.array:
    """Let the base read the newest tokens in a span; returns the most attention (B, S) that one pays to each entry.

    That is the largest over heads, tokens and layers. The tokens' own entries are replaced.
    """
    tokens, entries = x.shape[1], cache[span.first : span.last]
    for layer in entries:
        layer.trim(tokens)
    with mx.stream(generation_stream):
        _, heard = run_layers(section(model.base, span.first, span.last), x, entries, range(len(entries)))
        most = mx.array(0.0)
        for number, layer in enumerate(entries):
            keys, _ = layer.keys_and_values()
            row = last_attention(model.base, span.first + number, heard[number].hidden, keys, tokens)
            most = mx.maximum(most, row.max(axis=(1, 2)))  # (B, query heads, tokens, S) -> (B, S)
        return most


def read_again(model: KVPModel, x: mx.array, positions: mx.array, cache: Cache, span: Span, step_size: int) -> mx.array:
    """Let some of the base's layers read tokens that its cache holds, and replace their entries.

    Args:
        model: the bundle.
        x: what layer ``span.first`` takes of these tokens, ``(B, n, hidden)`` or ids ``(B, n)``.
        positions: their positions ``(B, n)`` in the cache, rising.
        cache: the base's cache, whose layers of the span are evaluated afterwards.
        span: the layers.
        step_size: tokens per chunk.

    Returns:
        What the layer after the span takes ``(B, n, hidden)``; lazy behind the last layer.
    """
    layers, entries = section(model.base, span.first, span.last), cache[span.first : span.last]
    is_last = span.last == len(model.base.layers)
    seen: Any = (positions.max(axis=0) + 1).tolist()  # entries up to each token
    outputs = []
    with side_by_side(positions.size) as streams:
        for begin in range(0, positions.shape[1], step_size):
            done = begin
            for stream, part in parts(x[:, begin : begin + step_size], streams):
                these = positions[:, done : done + part.shape[1]]
                done += part.shape[1]
                with mx.stream(stream), rope_at(layers, these):
                    rewritten: Any = [RewrittenCache(layer, these, seen[done - 1]) for layer in entries]
                    outputs.append(run_layers(layers, part, rewritten)[0])
            mx.eval([layer.state for layer in entries], [] if is_last else outputs)
    return mx.concatenate(outputs, axis=1)
