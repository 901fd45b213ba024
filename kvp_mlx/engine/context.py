"""What a model has read so far: the token ids, the caches that hold them, and how many of them are exact."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import (
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.utils import common_prefix_len

from ..bundle.loading import KVPModel
from ..errors import InputError
from ..models.entries import held_positions
from ..models.families import Cache, LayerCache, is_listed, kinds_of
from ..models.sections import run_layers, section
from .auxiliary import auxiliary_cache_for
from .dial import Dial
from .pace import Pace, Steps, finish
from .prefill import PrefillTimes, Progress, base_prefilling, catch_up_auxiliary, exact_end, filling, read_ahead
from .prefix_stream import PrefixStream

REFINE_CHUNK_TOKENS = 32
"""1,024 tokens of the default base, two CPU cores: 6.8 s and 7 ms a layer; in chunks of 64 5.3 s and 11 ms."""

CATCH_UP_CHUNK_TOKENS = 16

FULL = Dial("full", 0, 0)
KEPT_SNAPSHOTS = 4
"""A turn takes two: where its reading begins, for an edit, and where its answer does, for another one."""

Pair = tuple[mx.array, mx.array]
TRIMMABLE = KVCache | QuantizedKVCache | ConcatenateKVCache
"""Caches of all keys and values; the others (windows, states) cannot go back, or only for a while."""


class Frozen(NamedTuple):
    """What cannot be trimmed of a cache, by layer, as it was when it held ``length`` tokens."""

    length: int
    layers: dict[int, LayerCache]


Snapshot = list[Frozen]
"""Of the base's cache, and of the auxiliary's where it has its own."""


class Context:
    """Token ids and the caches that stand for them.

    Attributes:
        tokens: what the base's cache holds, always.
        exact_tokens: how many of the first tokens have the entries that full prefill would give. What the base reads
            on top of a predicted entry is not exact either, since it saw the prediction.
        prefix_stream: what an exact prefix made of the tokens that were predicted last, if any are left.

    The auxiliary's own cache (kinds ``model`` and ``pruned``) may lag behind, since replies are generated without
    it; it catches up before the next prediction, or in ``idle_work``.
    """

    def __init__(self, model: KVPModel):
        self.model = model
        self.tokens: list[int] = []
        self.exact_tokens = 0
        self.prefix_stream: PrefixStream | None = None
        self.cache: Cache = make_prompt_cache(model.base)
        self._own_auxiliary_cache = None if model.is_prefix else make_prompt_cache(model.auxiliary)
        self._uncounted_tokens = 0  # that layers hold which do not count them
        self._snapshots: list[Snapshot] = []  # the longest last; none where all can be trimmed
        self._exact: Context | None = None  # the beginning of the tokens, read exactly in idle time

    @property
    def is_plain(self) -> bool:
        """Whether every layer keeps all keys and values, so that they can be cut anywhere; quantised or not."""
        return all(isinstance(layer, TRIMMABLE) for cache in self._caches for layer in cache)

    @property
    def is_quantised(self) -> bool:
        """Whether mlx-lm quantised the cache, on which nothing is predicted."""
        return any(isinstance(layer, QuantizedKVCache) for layer in self.cache)

    @property
    def turns(self) -> list[int]:
        """Lengths that it can come back to where not every cache can be trimmed."""
        return [snapshot[0].length for snapshot in self._snapshots]

    @property
    def _caches(self) -> list[Cache]:
        return [self.cache, *([] if self._own_auxiliary_cache is None else [self._own_auxiliary_cache])]

    @property
    def can_be_saved(self) -> bool:
        """Whether the cache can be written to disk and taken up again."""
        if not is_listed(self.model.base) or self.model.hosts is not None:
            return False
        own = [type(kind.new_cache()) for kind in kinds_of(self.model.base)]
        return own == [type(layer) for layer in self.cache]

    @property
    def auxiliary_cache(self) -> Cache:
        """The auxiliary's own cache; for a prefix the base's first layers, as they are now."""
        return self._own_auxiliary_cache or auxiliary_cache_for(self.model, self.cache)

    @property
    def position(self) -> int:
        """How many tokens all layers hold, also between two pauses of a reading."""
        return min((layer.offset for layer in self.cache if hasattr(layer, "offset")), default=self._uncounted_tokens)

    def replace(self, tokens: list[int], cache: Cache, exact_tokens: int) -> None:
        """Take over a base's cache that holds ``tokens``, the first ``exact_tokens`` of them exact."""
        self.keep(0)
        self.tokens, self.cache, self.exact_tokens = list(tokens), cache, exact_tokens
        self._uncounted_tokens = len(tokens)

    def keep(self, length: int) -> int:
        """Trim the caches to the first ``length`` tokens, or to what every layer holds; returns what is left.

        An interrupt between layers can leave some of them a chunk ahead of the others. Caches that cannot be cut there
        (sliding windows, recurrent states) go back to the last snapshot before, or begin anew.
        """
        if self.is_plain:
            length = trim_to(self.cache, length)
            trim_to(self.auxiliary_cache, length)
        else:
            length = self._keep_or_restore(length)
        self.tokens = self.tokens[:length]
        self.exact_tokens = min(self.exact_tokens, length)
        self._cut_stream()
        return length

    def _cut_stream(self) -> None:
        """Let go of what an exact prefix made of tokens that are gone, or all of it where nothing is left to refine."""
        stream = self.prefix_stream and self.prefix_stream.cut(len(self.tokens))
        self.prefix_stream = stream if stream and stream.end > max(stream.first, self.exact_tokens) else None

    def _keep_or_restore(self, length: int) -> int:
        """Do what ``keep`` does where not every cache can be trimmed."""
        held = self.position
        if held > length > 0 and self._own_auxiliary_cache is None and can_trim_prompt_cache(self.cache):
            trim_prompt_cache(self.cache, held - length)
        elif not 0 < held <= length:
            self._restore(next((each for each in reversed(self._snapshots) if each[0].length <= length), None))
        length = self.position
        self._snapshots = [snapshot for snapshot in self._snapshots if snapshot[0].length <= length]
        return length

    def remember(self) -> None:
        """Take a snapshot of what cannot be trimmed, for ``keep`` to come back to; the last few are kept."""
        length = len(self.tokens)
        if length and not self.is_plain and length not in self.turns:
            self._snapshots = [*self._snapshots, self._snapshot()][-KEPT_SNAPSHOTS:]

    def _snapshot(self) -> Snapshot:
        length = len(self.tokens)
        return [frozen(cache, min(length, held_positions(cache) or length)) for cache in self._caches]

    def _restore(self, snapshot: Snapshot | None) -> None:
        """Go back to a snapshot; without one, begin anew."""
        if snapshot is None:
            self.cache, self._uncounted_tokens, self._snapshots = make_prompt_cache(self.model.base), 0, []
            if self._own_auxiliary_cache is not None:
                self._own_auxiliary_cache = make_prompt_cache(self.model.auxiliary)
            return
        for cache, kept in zip(self._caches, snapshot, strict=True):
            thaw(cache, kept)
        self._uncounted_tokens = snapshot[0].length

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
        other._uncounted_tokens, other._snapshots = self._uncounted_tokens, list(self._snapshots)
        other.tokens, other.exact_tokens = list(self.tokens), self.exact_tokens
        other.prefix_stream = self.prefix_stream
        cut = length if self.is_plain else len(self.tokens)  # the others go back to a snapshot, or not at all
        other.cache = first_entries(self.cache, cut)
        if self._own_auxiliary_cache is not None:
            other._own_auxiliary_cache = first_entries(self._own_auxiliary_cache, cut)
        other.keep(length)
        return other

    def compacted(self) -> "Context":
        """Give back the memory that the tokens do not need, evaluate all, and return this context.

        Another thread cannot evaluate what this one has begun.
        """
        for layer in (layer for cache in self._caches for layer in cache):
            if isinstance(layer, KVCache) and layer.offset:
                layer.keys, layer.values = (mx.contiguous(entries) for entries in layer.keys_and_values())
            if not layer.empty():
                mx.eval([array for _, array in tree_flatten(layer.state) if isinstance(array, mx.array)])
        return self

    @property
    def nbytes(self) -> int:
        """What the caches take."""
        own = sum(layer.nbytes for cache in self._caches for layer in cache if not layer.empty())
        kept = sum(layer.nbytes for snapshot in self._snapshots for part in snapshot for layer in part.layers.values())
        stream = self.prefix_stream.x.nbytes if self.prefix_stream else 0
        return own + kept + stream + (self._exact.nbytes if self._exact else 0)

    def read(self, ids: list[int], dial: Dial, **how: Any) -> mx.array | None:
        """Bring the caches up to the last of ``ids``; what they hold stays. See ``reading``."""
        return finish(self.reading(ids, dial, **how))

    def reading(
        self,
        ids: list[int],
        dial: Dial,
        *,
        with_last: bool = False,
        times: PrefillTimes | None = None,
        step_size: int | None = None,
        progress: Progress | None = None,
        pace: Pace | None = None,
    ) -> Steps[mx.array | None]:
        """Do what ``read`` does, with pauses in which nothing else may use the context.

        Closing the iterator at a pause leaves a valid context, which holds what was read exactly until then; or what it
        held before, where layers cannot be trimmed to the same length.

        Args:
            ids: token ids that begin with ``tokens``.
            dial: settled, so that its path is ``full`` or ``kvp``.
            with_last: see ``filling``, as for what is returned.
            times: filled with what each part took.
            step_size: tokens per chunk (default: ``default_step_size()``).
            progress: called with (tokens done, tokens to do) after every chunk; it may raise to stop the reading.
            pace: how often to pause between two chunks.
        """
        end, is_predicted = len(ids) - 1, dial.path == "kvp"
        held = len(self.tokens)
        exact, ahead = exact_end(dial, held, end), read_ahead(self.model, dial, held, end)
        before = None if self.is_plain or not held else self._snapshot()
        output = None

        def note(done: int, to_do: int) -> None:
            self._uncounted_tokens = held + done
            if progress:
                progress(done, to_do)

        report: dict[str, Any] = {"prefill_step_size": step_size, "times": times, "progress": note, "pace": pace}
        try:
            if self.model.config.has_predictor:
                filling_steps = filling(
                    self.model, mx.array([ids]), self.cache, self.auxiliary_cache, dial, with_last=with_last, **report
                )
                output, below = yield from filling_steps
                if below is not None:
                    layers, first = self.model.config.auxiliary.layers, end + (output is not None) - below.shape[1]
                    mx.eval(below)  # another thread cannot
                    self.prefix_stream = PrefixStream(layers, first, below)
            elif held < end:
                yield from base_prefilling(self.model, mx.array([ids[held:end]]), self.cache, **report)
            self._uncounted_tokens = end
            return output
        except BaseException as error:
            pauses_between_layers = is_listed(self.model.base)
            if not self.is_plain and (pauses_between_layers or not isinstance(error, GeneratorExit)):
                self._restore(before)  # nobody knows how far each layer came
            elif is_predicted:  # what was predicted still lacks what the base would have read of it
                self.keep(ahead)
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

    def note_exact(self, tokens: int) -> None:
        """Note that so many of the first tokens have exact entries by now, as far as the caches hold them."""
        self.exact_tokens = min(tokens, len(self.tokens))
        self._cut_stream()

    def idle_work(self) -> Iterator[None]:
        """Do what the next turn gains from: let the auxiliary catch up, then refine. As ``refining``."""
        if self._own_auxiliary_cache is not None:
            yield from self._catching_up(self._own_auxiliary_cache)
        yield from self.refining()

    def refining(self, chunk_tokens: int = REFINE_CHUNK_TOKENS) -> Iterator[None]:
        """Recompute exactly, from the front, whatever is not exact: in place, or beside it and then swapped.

        Yields after every layer of every chunk. Closing the iterator there drops the chunk begun and leaves caches
        that are exact up to ``exact_tokens`` and beyond it as they were. Nothing else may use the context before.

        Raises:
            InputError: the cache was quantised.
        """
        if self.exact_tokens < len(self.tokens) and self.is_quantised:
            raise InputError("a quantised cache cannot be refined; leave out kv_bits.")
        is_rewritable = all(isinstance(layer, KVCache) for layer in self.cache)
        yield from self._refining_in_place(chunk_tokens) if is_rewritable else self._refining_beside(chunk_tokens)

    def _refining_beside(self, chunk_tokens: int) -> Iterator[None]:
        """Read in a second context what is not exact here, and take over its caches at the end."""
        while self.exact_tokens < len(self.tokens):
            exact = self._exact = self.beginning()
            start = len(exact.tokens)
            end = min(start + chunk_tokens, len(self.tokens), *(turn for turn in self.turns if turn > start))
            yield from exact.reading([*self.tokens[:end], 0], FULL, pace=Pace(0.0))  # a pause after every layer
            if end in self.turns:
                exact.remember()
            self.take_over(exact)
            yield

    def beginning(self) -> "Context":
        """Return what was read exactly of its first tokens, be it beside its own caches, to be read on."""
        exact, self._exact = self._exact or self.copy(self.exact_tokens), None
        exact.keep(common_prefix_len(exact.tokens, self.tokens))
        return exact

    def take_over(self, exact: "Context") -> None:
        """Go on from a context that was read exactly, if it holds all tokens; else keep it until it does."""
        self._exact = exact
        if len(exact.tokens) == len(self.tokens):
            self.cache, self._snapshots, self._exact = exact.cache, exact._snapshots, None
            self.exact_tokens = len(self.tokens)

    def _refining_in_place(self, chunk_tokens: int) -> Iterator[None]:
        while self.exact_tokens < len(self.tokens):
            start = self.exact_tokens
            end, layers = min(start + chunk_tokens, len(self.tokens)), 0
            x = mx.array([self.tokens[start:end]])
            if (stream := self.prefix_stream) and stream.first <= start < stream.end:
                layers, x = stream.layers, stream.of(start, end)
            exact: list[Pair] = []
            for number in range(layers, len(self.cache)):
                x, pair = self._layer_on_exact(number, x)
                exact.append(pair)
                yield
            self.overwrite(start, exact)
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

    def overwrite(self, start: int, exact: list[Pair]) -> None:
        """Write exact pairs of the last layers over the entries from ``start`` on; the entries behind them stay."""
        length = len(self.tokens)
        try:
            with mx.stream(generation_stream):
                for layer, (keys, values) in zip(self.cache[-len(exact) :], exact, strict=True):
                    layer.trim(length - start)
                    layer.update_and_fetch(keys, values)
                    layer.offset = length
                mx.eval([layer.state for layer in self.cache])
        except BaseException:
            self.keep(start)  # some layers may be ahead of the others
            raise
        self.note_exact(start + exact[0][0].shape[2])

    def _catching_up(self, auxiliary_cache: Cache) -> Iterator[None]:
        while (lag := held_positions(auxiliary_cache)) is not None and lag < len(self.tokens):
            catch_up_auxiliary(self.model, mx.array([self.tokens[lag : lag + CATCH_UP_CHUNK_TOKENS]]), auxiliary_cache)
            yield


def reading_together(
    contexts: Sequence[Context], prompts: Sequence[list[int]], *, progress: Progress | None = None, pace: Pace
) -> Steps[None]:
    """Read several prompts in full up to their last tokens, as one batch padded at its end.

    Args:
        contexts: one for each prompt; plain, and of as many tokens each. They stay as they are until all is read.
        prompts: token ids that begin with what their contexts hold.
        progress: called with (tokens done, tokens to do), of the longest.
        pace: how often to pause between two groups of layers.
    """
    held, longest = len(contexts[0].tokens), max(map(len, prompts)) - 1
    ids = mx.array([[*ids[held:-1], *[0] * (longest - len(ids) + 1)] for ids in prompts])
    cache: Cache = make_prompt_cache(contexts[0].model.base)
    if held:
        rows = zip(*(context.cache for context in contexts), strict=True)
        cache = [_stacked([layer.keys_and_values() for layer in layers]) for layers in rows]
    yield from base_prefilling(contexts[0].model, ids, cache, progress=progress, pace=pace)
    for row, (context, prompt) in enumerate(zip(contexts, prompts, strict=True)):
        end, exact = len(prompt) - 1, context.exact_tokens
        own: Cache = [_row_of(layer, row, end) for layer in cache]
        context.replace(prompt[:-1], own, end if exact == held else exact)


def _stacked(pairs: list[Pair]) -> KVCache:
    keys, values = (mx.concatenate(list(entries)) for entries in zip(*pairs, strict=True))
    return KVCache.from_state((keys, values, keys.shape[2]))


def _row_of(layer: LayerCache, row: int, length: int) -> KVCache:
    keys, values = (mx.contiguous(entries[row : row + 1, :, :length]) for entries in layer.keys_and_values())
    return KVCache.from_state((keys, values, length))


def frozen(cache: Cache, length: int) -> Frozen:
    """Return what cannot be trimmed of a cache of so many tokens; it shares the numbers until the cache changes."""
    return Frozen(length, {n: copy.deepcopy(one) for n, one in enumerate(cache) if not isinstance(one, TRIMMABLE)})


def thaw(cache: Cache, kept: Frozen) -> None:
    """Bring a cache back to what it was."""
    for number, layer in enumerate(cache):
        if number in kept.layers:
            cache[number] = copy.deepcopy(kept.layers[number])
        else:
            layer.trim(max(0, layer.offset - kept.length))


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
