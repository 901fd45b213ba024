"""Selective recomputation: the base itself reads the prompt tokens whose prediction would do most harm.

Prediction fails on few tokens, and badly (names, figures, rare words). CacheBlend (arXiv 2405.16444) repairs a cache
that it reused by computing the entries anew of those tokens that deviate most; the share of them is its "recompute
ratio". Here the predictor tells from what it is given how wrong it will be and what harm that will do, and the end of
the prompt, where a question stands, tells what is going to be looked at.
"""

from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream

from .attention import last_attention
from .bundle import KVPModel
from .families import Cache, LayerCache, run_layers, section
from .positions import rope_at
from .streams import parts, side_by_side

ASKING_TOKENS = 16
"""Tokens at the prompt's end that the base reads first, to see what they attend to."""
ASKED_LAYERS = 3
"""Every which of the predicted layers is asked, from the last one down: all of them tell no more, measured."""
ATTENTION_WEIGHT = 0.5
"""Of the logarithm of attention beside the estimated deviation; chosen on prompts that no evaluation uses."""
ATTENTION_REACH = 12
"""Tokens after an attended one that count as attended too: an answer goes on from where the question points to."""


def first_layer(model: KVPModel) -> int:
    """Return the base's layer at which recomputation begins: where an exact prefix ends, else its first."""
    return model.config.auxiliary.layers if model.has_exact_prefix else 0


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
    harm: the largest deviation, weighed by the attention that the end pays unless few are chosen. Only the T newest are
    chosen from: what an earlier turn left in the cache stays as it is.

    Args:
        model: the bundle; ``recompute`` is the share.
        x: what ``first_layer`` takes of the T newest tokens in the cache: the residual stream ``(B, T, hidden)``, or
            token ids ``(B, T)`` for layer 0.
        deviations: see ``Predictor.deviations``, of each of them ``(B, T)``; only needed for a share above 0.
        cache: the base's cache, evaluated afterwards.
        exact_tail: how many of the newest tokens are read in any case.
        step_size: tokens per chunk.

    Returns:
        How many tokens of each sequence were read.
    """
    batch, tokens = x.shape[:2]
    wanted = exact_tail + round(model.recompute * (tokens - exact_tail))
    last = max(exact_tail, min(ASKING_TOKENS, wanted))
    chosen = mx.broadcast_to(mx.arange(tokens - last, tokens), (batch, last))
    if wanted > last and deviations is not None:
        harm = deviations
        if is_asked(wanted, last):
            attention = spread(asked_for(model, x[:, -ASKING_TOKENS:], cache))[:, -tokens:]
            harm = harm + ATTENTION_WEIGHT * mx.log(attention + 1e-9)
        chosen = mx.concatenate([largest(harm[:, : tokens - last], wanted - last), chosen], axis=1)
    if wanted:
        places = chosen if x.ndim == 2 else chosen[..., None]
        positions = cache[0].offset - tokens + chosen
        read_again(model, mx.take_along_axis(x, places, axis=1), positions, cache, step_size)
    return wanted


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


def asked_for(model: KVPModel, x: mx.array, cache: Cache) -> mx.array:
    """Let the base read the newest tokens; returns the most attention (B, S) that one of them pays to each entry.

    That is the largest over heads, tokens and a part of the layers whose entries are predicted. The tokens' own
    entries are replaced.
    """
    start, tokens = first_layer(model), x.shape[1]
    predicted = [number for number, sources in enumerate(model.config.predictor.layer_map) if sources is not None]
    listened = predicted[::-ASKED_LAYERS]
    for layer in cache[start:]:
        layer.trim(tokens)
    with mx.stream(generation_stream):
        above = section(model.base, start, len(model.base.layers))
        _, heard = run_layers(above, x, cache[start:], [number - start for number in listened])
        most = mx.array(0.0)
        for number in listened:
            keys, _ = cache[number].keys_and_values()
            row = last_attention(model.base, number, heard[number - start].hidden, keys, tokens)
            most = mx.maximum(most, row.max(axis=(1, 2)))  # (B, query heads, tokens, S) -> (B, S)
        return most


def read_again(model: KVPModel, x: mx.array, positions: mx.array, cache: Cache, step_size: int) -> None:
    """Let the base read some of the tokens that its cache holds, and replace their entries.

    Args:
        model: the bundle.
        x: what ``first_layer`` takes of these tokens, ``(B, n, hidden)`` or ids ``(B, n)``.
        positions: their positions ``(B, n)`` in the cache, rising.
        cache: the base's cache, evaluated afterwards.
        step_size: tokens per chunk.
    """
    start = first_layer(model)
    above = section(model.base, start, len(model.base.layers))
    seen: Any = (positions.max(axis=0) + 1).tolist()  # entries up to each token
    with side_by_side(positions.size) as streams:
        for begin in range(0, positions.shape[1], step_size):
            done = begin
            for stream, part in parts(x[:, begin : begin + step_size], streams):
                these = positions[:, done : done + part.shape[1]]
                done += part.shape[1]
                with mx.stream(stream), rope_at(above, these):
                    rewritten: Any = [RewrittenCache(layer, these, seen[done - 1]) for layer in cache[start:]]
                    run_layers(above, part, rewritten)
            mx.eval([layer.state for layer in cache])
