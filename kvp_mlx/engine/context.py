"""What a model has read so far: the token ids, the caches that hold them, and how many of them are exact."""

import copy
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
from ..models.families import Cache, LayerCache, fixed_kinds, is_listed
from ..models.sections import run_layers, section
from .dial import Dial
from .pace import Pace, Steps, finish
from .prefill import PrefillTimes, Progress, auxiliary_cache_for, base_prefilling, catch_up_auxiliary, filling

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
        is_known = is_listed(self.model.base) and not fixed_kinds(self.model.base)
        return is_known and all(isinstance(layer, KVCache) for layer in self.cache)

    @property
    def auxiliary_cache(self) -> Cache:
        """The auxiliary's own cache; for a prefix the base's first layers, as they are now."""
        return self._own_auxiliary_cache or auxiliary_cache_for(self.model, self.cache)

    @property
    def position(self) -> int:
        """How many tokens all layers hold, also between two pauses of a reading."""
        offsets = [getattr(layer, "offset", None) for layer in self.cache]
        known = [offset for offset in offsets if offset is not None]
        return self._uncounted_tokens if len(known) < len(offsets) else min(known)

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
        held = self.position
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

    def take_back(self, cache: Cache, tokens: list[int]) -> None:
        """Go on from a copy of the cache that others extended until it held ``tokens``."""
        self.cache, self._uncounted_tokens = cache, len(tokens)
        self.grown_to(tokens)

    def copy(self, length: int) -> "Context":
        """Return a context of the first ``length`` tokens, which shares no state with this one.

        Where the cache cannot be cut there (see ``keep``), it is empty.
        """
        other = Context(self.model)
        other._uncounted_tokens = self._uncounted_tokens
        other.tokens, other.exact_tokens = list(self.tokens), self.exact_tokens
        other.cache = first_entries(self.cache, length)
        if self._own_auxiliary_cache is not None:
            other._own_auxiliary_cache = first_entries(self._own_auxiliary_cache, length)
        other.keep(length)
        return other

    def compacted(self) -> "Context":
        """Give back the memory that the tokens do not need, evaluate all, and return this context."""
        for layer in [*self.cache, *(self._own_auxiliary_cache or [])]:
            if isinstance(layer, KVCache) and layer.offset:
                layer.keys, layer.values = (mx.contiguous(entries) for entries in layer.keys_and_values())
                mx.eval(layer.keys, layer.values)
        return self

    @property
    def nbytes(self) -> int:
        """What the caches take."""
        return sum(layer.nbytes for layer in [*self.cache, *(self._own_auxiliary_cache or [])] if not layer.empty())

    def read(self, ids: list[int], dial: Dial, **report: Any) -> None:
        """Bring the caches up to the last of ``ids``; what they hold stays. See ``reading``."""
        finish(self.reading(ids, dial, **report))

    def reading(
        self,
        ids: list[int],
        dial: Dial,
        *,
        times: PrefillTimes | None = None,
        step_size: int | None = None,
        progress: Progress | None = None,
        pace: Pace | None = None,
    ) -> Steps[None]:
        """Do what ``read`` does, with pauses in which nothing else may use the context.

        Closing the iterator at a pause leaves a valid context, which holds what was read exactly until then.

        Args:
            ids: token ids that begin with ``tokens``.
            dial: settled, so that its path is ``full`` or ``kvp``.
            times: filled with what each part took.
            step_size: tokens per chunk (default: ``default_step_size()``).
            progress: called with (tokens done, tokens to do) after every chunk; it may raise to stop the reading.
            pace: how often to pause between two chunks.
        """
        end, is_predicted = len(ids) - 1, dial.path == "kvp"
        exact = max(len(self.tokens), min(dial.exact_head, end) if is_predicted else end)
        held = len(self.tokens)

        def note(done: int, to_do: int) -> None:
            self._uncounted_tokens = held + done
            if progress:
                progress(done, to_do)

        report: dict[str, Any] = {"prefill_step_size": step_size, "times": times, "progress": note, "pace": pace}
        try:
            if self.model.config.has_predictor:
                yield from filling(self.model, mx.array([ids]), self.cache, self.auxiliary_cache, dial, **report)
            elif held < end:
                yield from base_prefilling(self.model, mx.array([ids[held:end]]), self.cache, **report)
            self._uncounted_tokens = end
        except BaseException as error:
            if is_predicted:  # what was predicted still lacks what the base would have read of it
                self.keep(exact)
            if not (self.is_plain or isinstance(error, GeneratorExit)):  # nobody knows how far each layer came
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
        if self.is_plain:
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


def first_entries(cache: Cache, length: int) -> Cache:
    """Return a cache of the first ``length`` entries, or of all; layers of other kinds than mlx-lm's plain one whole.

    It shares the numbers until one of the two caches changes, and leaves out mlx-lm's room for more.
    """
    return [_first_of_layer(layer, length) for layer in cache]


def _first_of_layer(layer: LayerCache, length: int) -> LayerCache:
    if not isinstance(layer, KVCache):
        return copy.deepcopy(layer)
    if not (length := min(length, layer.offset)):
        return KVCache()
    keys, values = layer.keys_and_values()
    return KVCache.from_state((keys[..., :length, :], values[..., :length, :], length))
