"""A conversation: the cache is kept from turn to turn, and only new tokens are read or predicted."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import common_prefix_len

from .bundle import KVPModel
from .calibration import auto_min_tokens
from .errors import InputError
from .families import Cache
from .pipeline import (
    Prefill,
    auxiliary_cache_for,
    base_prefill,
    catch_up_auxiliary,
    check_context,
    check_text,
    choose_prefill,
    decode,
    predict_base_cache,
)


@dataclass
class Turn:
    """One piece of a streamed reply, with what is known of the turn so far."""

    text: str
    prefill: str
    reused_tokens: int
    new_tokens: int
    ttft_ms: float
    generation_tps: float

    def summary(self) -> str:
        """Return the line that follows a reply."""
        path = "predicted" if self.prefill == "kvp" else "full prefill"
        return (
            f"{path}, {self.new_tokens} new tokens on {self.reused_tokens} cached, first token after "
            f"{self.ttft_ms / 1e3:.2f} s, then {self.generation_tps:.1f} tokens/s"
        )


class Conversation:
    """Messages and the caches that stand for them.

    ``tokens`` is always what the base's cache holds. The auxiliary's cache (kinds ``model`` and ``pruned``) may
    lag behind, since replies are generated without it; it catches up before the next prediction.
    """

    def __init__(self, model: KVPModel, system: str | None = None):
        if model.text_tokenizer.chat_template is None:
            raise InputError("this model has no chat template; use 'kvp generate --raw'.")
        self.model = model
        self.messages = [{"role": "system", "content": system}] if system else []
        self.tokens: list[int] = []
        self.cache = make_prompt_cache(model.base)
        self._own_auxiliary_cache = None if model.is_prefix else make_prompt_cache(model.auxiliary)

    @property
    def auxiliary_cache(self) -> Cache:
        """The auxiliary's own cache; for a prefix the base's first layers, as they are now."""
        return self._own_auxiliary_cache or auxiliary_cache_for(self.model, self.cache)

    def reply(
        self, text: str, *, prefill: Prefill = "auto", exact_tail: int = 0, max_tokens: int = 512, **options: Any
    ) -> Iterator[Turn]:
        """Answer the user's next message, yielding text as it is generated.

        Stopping early (closing the iterator, Ctrl-C) leaves a valid conversation that holds the partial reply.

        Args:
            text: the message.
            prefill: as in ``pipeline.stream_generate``, for the new tokens.
            exact_tail: likewise.
            max_tokens: tokens to generate at most.
            options: passed to mlx-lm's ``stream_generate``.

        Raises:
            InputError: the conversation no longer fits the context window; the message is not taken.
        """
        start = time.perf_counter()
        check_text(text)
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.model.text_tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        check_context(self.model, len(ids), max_tokens)
        choose_prefill(prefill, len(ids), exact_tail)  # refuses bad options before anything changes
        self.messages = messages
        reused = self._keep(common_prefix_len(self.tokens, ids[:-1]))
        path = choose_prefill(prefill, len(ids) - reused, exact_tail, auto_min=auto_min_tokens(self.model))
        generated: list[int] = []
        reply, ttft_ms = "", 0.0
        try:
            self._read(ids, path, exact_tail)
            for piece in decode(self.model, ids, self.cache, max_tokens=max_tokens, **options):
                ttft_ms = ttft_ms or 1e3 * (time.perf_counter() - start)
                generated.append(piece.token)
                reply += piece.text
                yield Turn(piece.text, path, reused, len(ids) - reused, ttft_ms, piece.generation_tps)
        finally:
            self.tokens = ids + generated
            self._keep(len(self.tokens))
            self.messages.append({"role": "assistant", "content": reply})

    def _keep(self, length: int) -> int:
        """Trim the caches to the first ``length`` tokens, or to what every layer holds; returns what is left.

        An interrupt between layers can leave some of them a chunk ahead of the others.
        """
        length = trim_to(self.cache, length)
        trim_to(self.auxiliary_cache, length)
        self.tokens = self.tokens[:length]
        return length

    def _read(self, ids: list[int], path: str, exact_tail: int) -> None:
        """Bring the base's cache up to the last prompt token (predicting: up to the exact tail)."""
        held = self.cache[0].offset
        if path == "full":
            if held < len(ids) - 1:
                base_prefill(self.model, mx.array([ids[held:-1]]), self.cache)
            return
        lag = self.auxiliary_cache[0].offset
        if lag < held:
            catch_up_auxiliary(self.model, mx.array([ids[lag:held]]), self.auxiliary_cache)
        new = mx.array([ids[held : len(ids) - 1 - exact_tail]])
        predict_base_cache(self.model, new, self.cache, self.auxiliary_cache)


def trim_to(cache: Cache, length: int) -> int:
    """Trim every layer to ``length`` tokens or to what the shortest one holds; returns what is left."""
    length = min(length, *(layer.offset for layer in cache))
    for layer in cache:
        layer.trim(layer.offset - length)
    return length
