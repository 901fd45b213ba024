"""Refinement while decoding: beside each new token the base reads some of what was predicted, exactly.

A step of decoding reads all of the base's weights for one token, so that a few dozen tokens more cost little where
memory is what it waits for. They are read from the front into a cache beside the predicted one, which takes its place
when all is read: an answer rests on prediction first, then on full prefill's entries, and never on a mixture. Where it
ends before, what was read is put in its places.
"""

from collections.abc import Collection
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..bundle.loading import KVPModel
from ..models.families import Cache
from ..models.sections import output_head, run_layers, section
from ..models.sides import beside, sides
from .context import Context
from .prefix_stream import PrefixStream


def can_refine(model: KVPModel) -> bool:
    """Return whether a base can read beside its cache, while it decodes, what is to take its place."""
    return model.config.has_predictor and model.hosts is None


def refining_network(context: Context, ids: list[int], refine_tokens: int) -> "RefiningNetwork | None":
    """Return what decodes behind a prompt that a context holds, and refines it; None where it cannot or need not."""
    is_exact = context.exact_tokens >= len(context.tokens)
    if not refine_tokens or is_exact or context.is_quantised or not can_refine(context.model):
        return None
    stream = context.prefix_stream if context.is_plain else None
    return RefiningNetwork(context.beginning(), ids, refine_tokens, stream, context.turns)


class RefiningNetwork(nn.Module):
    """Stands in for the base where mlx-lm decodes one sequence.

    Attributes:
        exact_tokens: how many of the first tokens have been read exactly.

    Args:
        exact: the first of the tokens, read exactly; its cache is extended, and its layers become the other's.
        ids: what the base's cache holds, all of it.
        refine_tokens: how many are read beside those of each call.
        stream: what an exact prefix has made of the tokens, if that is known; its layers, which can be trimmed, do not
            read them again.
        turns: lengths that a later turn may come back to.
    """

    def __init__(
        self,
        exact: Context,
        ids: list[int],
        refine_tokens: int,
        stream: PrefixStream | None = None,
        turns: Collection[int] = (),
    ):
        super().__init__()
        self.exact_tokens, self._held = len(exact.tokens), len(ids)
        self._exact, self._ids, self._refine_tokens, self._turns = exact, ids, refine_tokens, turns
        if stream is None or stream.first > self.exact_tokens:
            stream = PrefixStream(0, 0, mx.array([ids], dtype=mx.int32))
        self._stream, self._behind_stream = stream, mx.array([ids[stream.end :]], dtype=mx.int32)
        self._is_reading = False

    @property
    def is_exact(self) -> bool:
        """Whether the cache holds full prefill's entries alone."""
        return self.exact_tokens == self._held

    def __call__(self, ids: mx.array, cache: Cache) -> mx.array:
        """Return the base's logits ``(1, T, vocab)`` for ``ids`` (1, T) on top of its cache; lazy."""
        base, held, new = self._exact.model.base, self._held, ids.shape[1]
        self._held += new
        if self.exact_tokens == held:
            self.exact_tokens = self._held
            logits: mx.array = base(ids, cache=cache)
            return logits
        self._is_reading = True
        self._read_below(ids, cache)
        below, layers = self._stream, self._stream.layers
        view = section(base, layers, len(cache))
        first = self.exact_tokens
        last = min(held, first + self._refine_tokens, *(turn for turn in self._turns if turn > first))
        x = mx.concatenate([below.of(first, last), below.of(held, self._held)], axis=1)
        if last == held:
            output, _ = run_layers(view, x, self._exact.cache[layers:])
            cache[layers:], last = self._exact.cache[layers:], self._held
        else:
            both: Any = [sides(*each, last - first) for each in zip(self._exact.cache, cache, strict=True)]
            output, _ = run_layers(beside(view, last - first), x, both[layers:])
        self.exact_tokens, self._is_reading = last, False
        if last in self._turns:
            self._exact.take_back(self._exact.cache, self._ids[:last])
            self._exact.remember()
        return output_head(base, output[:, -new:])

    def _read_below(self, ids: mx.array, cache: Cache) -> None:
        """Let the layers of the prefix read new ``ids``, and those of the cache that their stream lacks."""
        x = mx.concatenate([self._behind_stream, ids.astype(mx.int32)], axis=1)
        if layers := self._stream.layers:
            for layer in cache[:layers]:
                layer.trim(self._behind_stream.shape[1])
            x, _ = run_layers(section(self._exact.model.base, 0, layers), x, cache[:layers])
        self._stream, self._behind_stream = self._stream.grown(x), self._behind_stream[:, :0]

    def leave(self, context: Context, tokens: list[int]) -> None:
        """Let a context whose cache was extended to ``tokens`` have what was read beside it; that need not be all."""
        exact, is_swapped = self._exact, context.cache[-1] is self._exact.cache[-1]
        if not context.is_plain and is_swapped:
            exact.take_back(exact.cache, tokens)
            context.tokens = list(exact.tokens)  # its snapshots are of the cache that is gone
            context.take_over(exact)
            return
        context.grown_to(tokens)
        start, tokens = context.exact_tokens, context.tokens[: self.exact_tokens]
        if context.is_plain:
            if start < len(tokens) and not is_swapped:
                pairs = (layer.keys_and_values() for layer in exact.cache[self._stream.layers :])
                ends = slice(start, len(tokens))
                context.overwrite(start, [(keys[..., ends, :], values[..., ends, :]) for keys, values in pairs])
            context.note_exact(len(tokens))
        elif not self._is_reading:  # an interrupt leaves nobody knows what in each layer
            exact.take_back(exact.cache, tokens)
            context.take_over(exact.compacted())
