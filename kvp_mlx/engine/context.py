"""What a model has read so far: the token ids, the caches that hold them, and how many of them are exact."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
)
from mlx_lm.utils import common_prefix_len

from ..bundle.loading import KVPModel
from ..models.cutting import TRIMMABLE, Snapshot, first_entries, frozen, thaw, trim_to
from ..models.entries import held_positions
from ..models.families import Cache, is_listed, kinds_of
from .auxiliary import auxiliary_cache_for
from .dial import Dial
from .pace import Pace, Steps, finish
from .prefill import PrefillTimes, Progress, base_prefilling, exact_end, filling, read_ahead
from .prefix_stream import PrefixStream

KEPT_SNAPSHOTS = 4
"""A turn takes two: where its reading begins, for an edit, and where its answer does, for another one."""

Pair = tuple[mx.array, mx.array]
"""Keys and values."""


class Context:
    """Token ids and the caches that stand for them.

    Attributes:
        tokens: what the base's cache holds, always.
        exact_tokens: how many of the first tokens have the entries that full prefill would give. What the base reads
            on top of a predicted entry is not exact either, since it saw the prediction.
        prefix_stream: what an exact prefix made of the tokens that were predicted last, if any are left.
        own_auxiliary_cache: the auxiliary's (kinds ``model`` and ``pruned``). It may lag behind, since replies are
            generated without it; it catches up before the next prediction, or in idle time.
    """

    def __init__(self, model: KVPModel):
        self.model = model
        self.tokens: list[int] = []
        self.exact_tokens = 0
        self.prefix_stream: PrefixStream | None = None
        self.cache: Cache = make_prompt_cache(model.base)
        self.own_auxiliary_cache = None if model.is_prefix else make_prompt_cache(model.auxiliary)
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
        return [self.cache, *([] if self.own_auxiliary_cache is None else [self.own_auxiliary_cache])]

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
        return self.own_auxiliary_cache or auxiliary_cache_for(self.model, self.cache)

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
        held, offsets = self.position, {layer.offset for layer in self.cache if hasattr(layer, "offset")}
        if held > length > 0 and self.own_auxiliary_cache is None and can_trim_prompt_cache(self.cache):
            trim_to(self.cache, length)
        elif not 0 < held <= length or len(offsets) > 1:
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
            if self.own_auxiliary_cache is not None:
                self.own_auxiliary_cache = make_prompt_cache(self.model.auxiliary)
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
        other._exact = self._exact and self._exact.copy(length)
        cut = length if self.is_plain else len(self.tokens)  # the others go back to a snapshot, or not at all
        other.cache = first_entries(self.cache, cut)
        if self.own_auxiliary_cache is not None:
            other.own_auxiliary_cache = first_entries(self.own_auxiliary_cache, cut)
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
                if below is not None and self.is_plain and self.model.hosts is None:
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
            self.note_exact(len(self.tokens))

    def overwrite(self, start: int, exact: list[Pair]) -> None:
        """Write exact pairs of the last layers over the entries from ``start`` on; the entries behind them stay."""
        length = len(self.tokens)
        try:
            with mx.stream(generation_stream):
                for layer, (keys, values) in zip(self.cache[-len(exact) :], exact, strict=True):
                    layer.trim(layer.offset - start)
                    layer.update_and_fetch(keys, values)
                    layer.offset = length
                mx.eval([layer.state for layer in self.cache])
        except BaseException:
            self.keep(start)  # some layers may be ahead of the others
            raise
        self.note_exact(start + exact[0][0].shape[2])
