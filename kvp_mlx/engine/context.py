"""What a model has read so far: the token ids, the caches that hold them, and how many of them are exact."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import (
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

from ..bundle.loading import KVPModel
from ..errors import InputError
from ..models.families import Cache, is_listed
from ..models.sections import run_layers, section
from .dial import Dial
from .prefill import PrefillTimes, Progress, auxiliary_cache_for, base_prefill, catch_up_auxiliary, fill

REFINE_CHUNK_TOKENS = 64
"""Measured (docs/chat.md): as quick as full prefill within 4 %, and no layer of it takes 50 ms at 2,048 tokens."""

CATCH_UP_CHUNK_TOKENS = 16

Pair = tuple[mx.array, mx.array]


class Context:
    """Token ids and the caches that stand for them.

    Attributes:
        tokens: what the base's cache holds, always.
        exact_tokens: how many of the first tokens have the entries that full prefill would give. What the base reads
            on top of a predicted entry is not exact either, since it saw the prediction.

    The auxiliary's own cache (kinds ``model`` and ``pruned``) may lag behind, since replies are generated without
    it; it catches up before the next prediction, or in ``idle_work``.
    """

    def __init__(self, model: KVPModel):
        self.model = model
        self.tokens: list[int] = []
        self.exact_tokens = 0
        self.cache: Cache = make_prompt_cache(model.base)
        self._own_auxiliary_cache = None if model.is_prefix else make_prompt_cache(model.auxiliary)
        self._uncounted_tokens = 0  # that layers hold which do not count them

    @property
    def is_plain(self) -> bool:
        """Whether every layer keeps all keys and values, which can be cut, saved and predicted; quantised or not."""
        return all(isinstance(layer, KVCache | QuantizedKVCache | ConcatenateKVCache) for layer in self.cache)

    @property
    def can_be_saved(self) -> bool:
        """Whether the cache can be written to disk and taken up again."""
        return is_listed(self.model.base) and all(isinstance(layer, KVCache) for layer in self.cache)

    @property
    def auxiliary_cache(self) -> Cache:
        """The auxiliary's own cache; for a prefix the base's first layers, as they are now."""
        return self._own_auxiliary_cache or auxiliary_cache_for(self.model, self.cache)

    def replace(self, tokens: list[int], cache: Cache, exact_tokens: int) -> None:
        """Take over a base's cache that holds ``tokens``, the first ``exact_tokens`` of them exact."""
        self.keep(0)
        self.tokens, self.cache, self.exact_tokens = list(tokens), cache, exact_tokens

    def keep(self, length: int) -> int:
        """Trim the caches to the first ``length`` tokens, or to what every layer holds; returns what is left.

        An interrupt between layers can leave some of them a chunk ahead of the others. Caches that cannot be cut there
        (sliding windows, recurrent states) begin anew.
        """
        if self.is_plain:
            length = trim_to(self.cache, length)
            trim_to(self.auxiliary_cache, length)
        else:
            length = self._keep_or_begin_anew(length)
        self.tokens = self.tokens[:length]
        self.exact_tokens = min(self.exact_tokens, length)
        return length

    def _keep_or_begin_anew(self, length: int) -> int:
        """Do what ``keep`` does where no cache is plain; only a model without a predictor has such."""
        offsets = [getattr(layer, "offset", None) for layer in self.cache]
        held = self._uncounted_tokens if None in offsets else min(offset for offset in offsets if offset is not None)
        if held > length > 0 and can_trim_prompt_cache(self.cache):
            trim_prompt_cache(self.cache, held - length)
            return length
        if 0 < held <= length:
            return held
        self._begin_anew()
        return 0

    def _begin_anew(self) -> None:
        self.cache, self._uncounted_tokens = make_prompt_cache(self.model.base), 0

    def lend(self) -> Cache:
        """Return the cache, to be extended by others; ``grown_to`` finds out what it holds then."""
        self._uncounted_tokens = 0
        return self.cache

    def read(
        self,
        ids: list[int],
        dial: Dial,
        *,
        times: PrefillTimes | None = None,
        step_size: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Bring the caches up to the last of ``ids``; what they hold stays.

        Args:
            ids: token ids that begin with ``tokens``.
            dial: settled, so that its path is ``full`` or ``kvp``.
            times: filled with what each part took.
            step_size: tokens per chunk (default: ``default_step_size()``).
            progress: called with (tokens done, tokens to do) after every chunk; it may raise to stop the reading.
        """
        end, is_predicted = len(ids) - 1, dial.path == "kvp"
        exact = max(len(self.tokens), min(dial.exact_head, end) if is_predicted else end)
        report: dict[str, Any] = {"prefill_step_size": step_size, "times": times, "progress": progress}
        try:
            if self.model.config.has_predictor:
                fill(self.model, mx.array([ids]), self.cache, self.auxiliary_cache, dial, **report)
            elif len(self.tokens) < end:
                base_prefill(self.model, mx.array([ids[len(self.tokens) : end]]), self.cache, **report)
            self._uncounted_tokens = end
        except BaseException:
            if is_predicted:  # what was predicted still lacks what the base would have read of it
                self.keep(exact)
            if not self.is_plain:  # nobody knows how far each layer came
                self._begin_anew()
            raise
        finally:
            self.grown_to(ids, exact if is_predicted else len(ids))

    def grown_to(self, ids: list[int], read_by_base: int | None = None) -> None:
        """Note that the caches now hold ``ids``, or as many of them as every layer got to see.

        Args:
            ids: token ids that begin with ``tokens``.
            read_by_base: how many of them did not come from a prediction made just now (default: all).
        """
        was_exact = self.exact_tokens == len(self.tokens)
        self.tokens = ids
        length = self.keep(len(ids))
        if was_exact:
            self.exact_tokens = length if read_by_base is None else min(length, read_by_base)

    def idle_work(self) -> Iterator[None]:
        """Do what the next turn gains from: let the auxiliary catch up, then refine. As ``refining``."""
        if self._own_auxiliary_cache is not None:
            yield from self._catching_up(self._own_auxiliary_cache)
        yield from self.refining()

    def refining(self, chunk_tokens: int = REFINE_CHUNK_TOKENS) -> Iterator[None]:
        """Recompute exactly, in place and from the front, whatever is not exact.

        Yields after every layer of every chunk. Closing the iterator there drops the chunk begun and leaves caches
        that are exact up to ``exact_tokens`` and beyond it as they were. Nothing else may use the context before.

        Raises:
            InputError: the cache was quantised.
        """
        if self.exact_tokens < len(self.tokens) and not all(isinstance(layer, KVCache) for layer in self.cache):
            raise InputError("a quantised cache cannot be refined; leave out kv_bits.")
        while self.exact_tokens < len(self.tokens):
            start = self.exact_tokens
            x = mx.array([self.tokens[start : start + chunk_tokens]])
            exact: list[Pair] = []
            for number in range(len(self.cache)):
                x, pair = self._layer_on_exact(number, x)
                exact.append(pair)
                yield
            self._overwrite(start, exact)
            yield

    def _layer_on_exact(self, number: int, x: mx.array) -> tuple[mx.array, Pair]:
        """Run one layer on ``x``, seeing exact entries only; returns what it makes of it, and its keys and values."""
        start = self.exact_tokens
        seen = ConcatenateKVCache()
        with mx.stream(generation_stream):
            if start:
                seen.update_and_fetch(*(entries[..., :start, :] for entries in self.cache[number].keys_and_values()))
            x, _ = run_layers(section(self.model.base, number, number + 1), x, [seen])
            keys, values = (mx.contiguous(entries[..., start:, :]) for entries in seen.keys_and_values())
            mx.eval(keys, values, [] if number + 1 == len(self.cache) else x)
        return x, (keys, values)

    def _overwrite(self, start: int, exact: list[Pair]) -> None:
        """Write one exact pair per layer over the entries from ``start`` on; the entries behind them stay."""
        length = len(self.tokens)
        try:
            with mx.stream(generation_stream):
                for layer, (keys, values) in zip(self.cache, exact, strict=True):
                    layer.trim(length - start)
                    layer.update_and_fetch(keys, values)
                    layer.offset = length
                mx.eval([layer.state for layer in self.cache])
        except BaseException:
            self.keep(start)  # some layers may be ahead of the others
            raise
        self.exact_tokens = min(length, start + exact[0][0].shape[2])

    def _catching_up(self, auxiliary_cache: Cache) -> Iterator[None]:
        while (lag := auxiliary_cache[0].offset) < len(self.tokens):
            catch_up_auxiliary(self.model, mx.array([self.tokens[lag : lag + CATCH_UP_CHUNK_TOKENS]]), auxiliary_cache)
            yield


def trim_to(cache: Cache, length: int) -> int:
    """Trim every layer to ``length`` tokens or to what the shortest one holds; returns what is left."""
    length = min(length, *(layer.offset for layer in cache))
    for layer in cache:
        layer.trim(layer.offset - length)
    return length


def refine(context: Context, **options: Any) -> None:
    """Refine a context to its end."""
    for _ in context.refining(**options):
        pass
