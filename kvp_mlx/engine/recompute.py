"""Selective recomputation: the base itself reads the prompt tokens whose prediction would do most harm.

Prediction fails on few tokens, and badly (names, figures, rare words). CacheBlend (arXiv 2405.16444) repairs a cache
that it reused by computing the entries anew of those tokens that deviate most; the share of them is its "recompute
ratio". Here the predictor tells from what it is given how wrong it will be and what harm that will do, and the end of
the prompt, where a question stands, tells what is going to be looked at. In the last third of the layers it reads
fewer: the same work, spent on more tokens in the lower ones, brings the answer closer to full prefill's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import generation_stream

from ..bundle.config import RecomputeConfig
from ..bundle.loading import KVPModel
from ..device.streams import parts, side_by_side
from ..models.attention import last_attention
from ..models.families import Cache, LayerCache
from ..models.positions import at_positions
from ..models.sections import run_layers, section
from .pace import Pace, Steps, groups


def settings_of(model: KVPModel) -> RecomputeConfig:
    """Return how a bundle chooses tokens: its section of kvp.json, or the defaults (an exact tail needs no more)."""
    return model.config.recompute or RecomputeConfig()


def first_layer(model: KVPModel) -> int:
    """Return the base's layer at which recomputation begins: where an exact prefix ends, else its first."""
    return model.config.auxiliary.layers if model.has_exact_prefix else 0


class Span(NamedTuple):
    """How many tokens the base reads again in layers ``first`` to ``last - 1``."""

    first: int
    last: int
    tokens: int


def spans(model: KVPModel, share: float, tokens: int, exact_tail: int, exact_head: int = 0) -> list[Span]:
    """Return what recomputation reads of ``tokens`` positions, in the lower layers and in the ones above.

    The mean over layers of their tokens is the exact head and tail and ``share`` of the others.
    """
    settings, first, end = settings_of(model), first_layer(model), len(model.base.layers)
    middle = first + max(1, round(settings.lower_layers * (end - first)))
    upper = max(0.0, share - settings.upper_from) / (1 - settings.upper_from)
    lower = (share - (1 - settings.lower_layers) * upper) / settings.lower_layers
    behind = tokens - exact_head
    most, least = (exact_tail + round(part * (behind - exact_tail)) for part in (lower, upper))
    least = max(least, min(most, settings.asking_tokens))
    return [Span(first, middle, exact_head + most), Span(middle, end, exact_head + least)]


def work_of(spans: list[Span]) -> int:
    """Return what recomputation reads, in tokens times layers."""
    return sum((span.last - span.first) * span.tokens for span in spans)


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


def repairing(
    model: KVPModel,
    x: mx.array,
    deviations: mx.array | None,
    cache: Cache,
    share: float,
    exact_tail: int,
    step_size: int,
    pace: Pace | None = None,
    note: Callable[[int], None] = lambda work: None,
    exact_head: int = 0,
    attention: mx.array | None = None,
) -> Steps[tuple[int, mx.array | None]]:
    """Let the base read the exact head and tail and a share of the other tokens, and replace their entries.

    The share holds the tokens that ask in any case, and beside these the tokens whose prediction would do most
    harm: the largest deviation, weighed by the attention that the end pays unless few are chosen. See ``spans`` for how
    many and in which layers. Only the T newest are chosen from: what an earlier turn left in the cache stays as it is.

    Args:
        model: the bundle.
        x: what ``first_layer`` takes of the T newest tokens in the cache: the residual stream ``(B, T, hidden)``, or
            token ids ``(B, T)`` for layer 0.
        deviations: see ``Predictor.deviations``, of each of them ``(B, T)``; only needed for a share above 0.
        cache: the base's cache, evaluated afterwards.
        share: of the other tokens, on average over layers.
        exact_tail: how many of the newest tokens are read in any case.
        step_size: tokens per chunk.
        pace: pause between groups of layers, too, and not only between chunks.
        note: called with the tokens times layers that were read since the last call (see ``work_of``).
        exact_head: how many of the first of the newest tokens are read in any case.
        attention: that the end pays to each entry ``(B, S)``, where the prefix has told (see ``RecomputeConfig.asks``).

    Returns:
        How many tokens of each sequence were read, in some layers at least, and what the last layer makes of them
        ``(B, n, hidden)``, normed and lazy.
    """
    (batch, tokens), settings = x.shape[:2], settings_of(model)
    lower, upper = spans(model, share, tokens, exact_tail, exact_head)
    if not lower.tokens:
        return 0, None
    asking = settings.asking_tokens
    last = min(lower.tokens - exact_head, max(exact_tail, asking))
    if is_asked(settings, lower.tokens - exact_head, last):
        attention = yield from attention_of_end(model, x[:, -asking:], cache, lower, pace)
    harm = mx.zeros((batch, tokens)) if deviations is None else deviations
    harm = weighed_by_attention(model, harm, attention)
    if model.hosts is not None:  # each has looked at its own heads
        with mx.stream(generation_stream):
            harm = model.hosts.largest(harm)
    places = mx.arange(tokens)
    harm = mx.where((places >= exact_head) & (places < tokens - last), harm, mx.inf)
    positions = mx.broadcast_to(mx.arange(cache[0].offset - tokens, cache[0].offset), (batch, tokens))
    for span in (span for span in (lower, upper) if span.first < span.last):
        kept = largest(harm, span.tokens)
        harm, positions = (mx.take_along_axis(numbers, kept, axis=1) for numbers in (harm, positions))
        x = mx.take_along_axis(x, kept if x.ndim == 2 else kept[..., None], axis=1)
        x = yield from recompute_span(model, x, positions, cache, span, step_size, pace, note)
    return lower.tokens, x


def attention_of_prefix(model: KVPModel, hidden: mx.array, cache: Cache) -> mx.array:
    """Return the most attention (B, S) that one of the newest tokens pays to each entry, over the heads of one layer.

    That is the first layer behind an exact prefix: its queries and keys are exact, too.

    Args:
        model: the bundle.
        hidden: what its projections read ``(B, T, hidden)``.
        cache: the base's.
    """
    layer, tokens = first_layer(model), min(hidden.shape[1], settings_of(model).asking_tokens)
    with mx.stream(generation_stream):
        return last_attention(model.base, layer, hidden, cache[layer], tokens).max(axis=(1, 2))


def is_asked(settings: RecomputeConfig, wanted: int, last: int) -> bool:
    """Return whether the base reads the end first, given how many tokens it is to read and how many of them are last.

    That reads ``asking_tokens``, so it is left out where fewer than that are to be chosen.
    """
    return settings.asks == "base" and wanted - last >= settings.asking_tokens


def weighed_by_attention(model: KVPModel, harm: mx.array, attention: mx.array | None) -> mx.array:
    """Return the harm ``(B, T)``, a logarithm, with that of the attention ``(B, S)`` which the newest T entries get."""
    if attention is None:
        return harm
    settings = settings_of(model)
    seen = reached(attention, settings.attention_reach, settings.attention_reach_before)
    return harm + settings.attention_weight * mx.log(seen[:, -harm.shape[1] :] + 1e-9)


def largest(x: mx.array, count: int) -> mx.array:
    """Return the places (B, count), rising, of the largest numbers in ``x`` (B, T)."""
    return mx.sort(mx.argsort(-x, axis=1)[:, :count], axis=1).astype(mx.int32)


def reached(attention: mx.array, reach: int, before: int = 0) -> mx.array:
    """Return for each entry (B, S) the largest attention that it or a neighbour gets.

    Neighbours are the ``reach`` entries before it and the ``before`` ones after it. What a question attends to is where
    an answer begins; the answer's later tokens need what stands after it, and what is read there rests on what stands
    before it. SnapKV (arXiv 2404.14469) keeps the neighbours of attended entries for that reason.
    """
    entries = attention.shape[1]
    padded = mx.pad(attention, [(0, 0), (reach, before)])
    return mx.stack([padded[:, start : start + entries] for start in range(reach + before + 1)]).max(axis=0)


def attention_of_end(model: KVPModel, x: mx.array, cache: Cache, span: Span, pace: Pace | None) -> Steps[mx.array]:
    """Let the base read the newest tokens in a span; returns the most attention (B, S) that one pays to each entry.

    That is the largest over heads, tokens and layers. The tokens' own entries are replaced.
    """
    tokens, entries = x.shape[1], cache[span.first : span.last]
    for layer in entries:
        layer.trim(tokens)
    most = mx.array(0.0)
    for group in groups(pace, len(entries), x.shape[0] * tokens):
        first, last = span.first + group.start, span.first + group.stop
        with mx.stream(generation_stream):
            x, captured = run_layers(section(model.base, first, last), x, cache[first:last], range(last - first))
            for number in range(first, last):
                row = last_attention(model.base, number, captured[number - first].hidden, cache[number], tokens)
                most = mx.maximum(most, row.max(axis=(1, 2)))  # (B, query heads, tokens, S) -> (B, S)
        if last < span.last:
            mx.eval(most, x)
            yield
    return most


def recompute_span(
    model: KVPModel,
    x: mx.array,
    positions: mx.array,
    cache: Cache,
    span: Span,
    step_size: int,
    pace: Pace | None,
    note: Callable[[int], None],
) -> Steps[mx.array]:
    """Let some of the base's layers read tokens that its cache holds, and replace their entries.

    Args:
        model: the bundle.
        x: what layer ``span.first`` takes of these tokens, ``(B, n, hidden)`` or ids ``(B, n)``.
        positions: their positions ``(B, n)`` in the cache, rising.
        cache: the base's cache, whose layers of the span are evaluated afterwards.
        span: the layers.
        step_size: tokens per chunk.
        pace: see ``repairing``.
        note: see ``repairing``.

    Returns:
        What the layer after the span takes ``(B, n, hidden)``; lazy behind the last layer.
    """
    seen: Any = (positions.max(axis=0) + 1).tolist()  # entries up to each token
    outputs = []
    for begin in range(0, positions.shape[1], step_size):
        done = begin
        started: list[tuple[Any, mx.array, mx.array, int]] = []  # stream, x, positions, entries that are seen
        with side_by_side(positions.size) as streams:
            for stream, part in parts(x[:, begin : begin + step_size], streams):
                places = positions[:, done : done + part.shape[1]]
                done += part.shape[1]
                started.append((stream, part, places, seen[done - 1]))
        for group in groups(pace, span.last - span.first, sum(places.size for _, _, places, _ in started)):
            first, last = span.first + group.start, span.first + group.stop
            with side_by_side(positions.size):
                started = [_rewritten(model, first, last, cache, *each) for each in started]
                reached_last = last == len(model.base.layers)
                mx.eval([layer.state for layer in cache[first:last]], [] if reached_last else [s[1] for s in started])
            note((last - first) * sum(places.shape[1] for _, _, places, _ in started))
            yield
        outputs += [x for _, x, _, _ in started]
    return mx.concatenate(outputs, axis=1)


def _rewritten(
    model: KVPModel, first: int, last: int, cache: Cache, stream: Any, x: mx.array, places: mx.array, seen: int
) -> tuple[Any, mx.array, mx.array, int]:
    """Let layers ``first`` to ``last - 1`` read a part of the tokens on its stream; lazy. See ``recompute_span``."""
    with mx.stream(stream):
        rewritten: Any = [RewrittenCache(layer, places, seen) for layer in cache[first:last]]
        view = at_positions(section(model.base, first, last), places)
        return stream, run_layers(view, x, rewritten)[0], places, seen
