"""A conversation beside the NumPy oracle, which follows each step and keeps the caches that should come of it."""

import itertools

import numpy as np
from mlx_lm.utils import common_prefix_len

from kvp_mlx.engine.conversation import Conversation
from kvp_mlx.engine.refining import idle_work

from .oracle import Entries
from .tiny import assert_cache_equal


class Mirror:
    """A conversation and its oracle's caches, base and auxiliary.

    Every method does the same to both. The oracle works from token ids and its own idea of the rules: what is kept
    is the common beginning, the head and tail are read by the base, the rest is predicted.
    """

    def __init__(self, model, oracle, system=None):
        self.conversation, self.oracle = Conversation(model, system), oracle
        self.tokens, self.exact = [], 0
        self.cache = self.auxiliary_cache = None

    def take(self, turn, *, pieces=None, exact_head=0, exact_tail=0):
        """Run a reply (its first ``pieces`` only) and return its last piece; None where it was stopped at once."""
        seen = list(itertools.islice(turn, pieces))
        turn.close()
        if not seen:
            return None
        last, tokens = seen[-1], self.conversation.context.tokens
        prompt = last.cached_tokens + last.new_tokens
        assert last.cached_tokens == common_prefix_len(self.tokens, tokens[: prompt - 1])
        self._trim(last.cached_tokens)
        end = prompt - 1 - exact_tail
        if last.path == "kvp":
            self._read(tokens[: max(self.held, exact_head)], "full")
            self._read(tokens[:end], "kvp")
        self._read(tokens, "full")
        return last

    def stopped_while_reading(self, turn):
        """Run a reply whose ``progress`` raises; the oracle forgets what may have been overwritten."""
        try:
            next(turn)
        except StopReadingError:
            self.resume()

    def resume(self):
        """Take over as common ground what the conversation holds now, where the oracle agrees with it."""
        held = common_prefix_len(self.tokens, self.conversation.context.tokens)
        self._trim(held)
        self.conversation.context.keep(held)

    def refine(self, steps=None):
        """Refine for a number of steps, then close."""
        context, before = self.conversation.context, self.conversation.context.exact_tokens
        assert before == self.exact
        work = idle_work(context)
        for _ in itertools.islice(work, steps):
            pass
        work.close()
        assert context.exact_tokens >= before
        if context.exact_tokens > before:
            true = self.oracle.base.forward(np.array([self.tokens[: context.exact_tokens]])).cache
            self.cache = [joined(a, b) for a, b in zip(true, self.cache, strict=True)]
            self.exact = context.exact_tokens

    def check(self):
        """Compare everything with the oracle."""
        context = self.conversation.context
        assert context.tokens == self.tokens
        assert context.exact_tokens == self.exact
        if not self.tokens:
            return
        assert_cache_equal(context.cache, self.cache)
        read = context.auxiliary_cache[0].offset
        if read and not context.model.is_prefix:
            assert_cache_equal(context.auxiliary_cache, [layer.first(read) for layer in self.auxiliary_cache])
        true = self.oracle.base.forward(np.array([self.tokens])).cache
        if self.exact == len(self.tokens):
            assert_cache_equal(context.cache, true)

    @property
    def held(self):
        return len(self.tokens)

    def _trim(self, length):
        self.tokens, self.exact = self.tokens[:length], min(self.exact, length)
        if self.cache:
            self.cache = [layer.first(length) for layer in self.cache]
            self.auxiliary_cache = [layer.first(length) for layer in self.auxiliary_cache]

    def _read(self, tokens, path):
        """Read on up to the end of ``tokens``."""
        new = np.array([tokens[self.held :]], dtype=int)
        if not new.size:
            return
        cache, auxiliary_cache = (self.cache, self.auxiliary_cache) if self.held else (None, None)
        if path == "kvp":
            self.cache, self.auxiliary_cache = self.oracle.prefill(new, cache, auxiliary_cache)
        else:
            self.exact += new.size if self.exact == self.held else 0
            self.auxiliary_cache = self.oracle.auxiliary.forward(new, auxiliary_cache).cache
            self.cache = self.oracle.base.forward(new, cache).cache
        self.tokens = list(tokens)


class StopReadingError(Exception):
    """What a test's ``progress`` raises."""


def stop_reading(done, total):
    raise StopReadingError


def joined(front, entries):
    """Return ``entries`` with their beginning replaced by ``front``."""
    length = len(front)
    return Entries(
        np.concatenate([front.keys, entries.keys[:, :, length:]], axis=2),
        np.concatenate([front.values, entries.values[:, :, length:]], axis=2),
        entries.positions,
    )
