"""A conversation: the cache is kept from turn to turn, and only new tokens are read or predicted."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlx_lm.utils import common_prefix_len

from .bundle import KVPModel
from .calibration import auto_min_tokens
from .context import Context
from .errors import InputError
from .pipeline import Prefill, Progress, check_context, check_text, choose_prefill, decode
from .saved import Message, load_head, save_head

FILL_AFTER_OVERFLOW = 0.75
MAX_REPLY_SHARE = 0.25


@dataclass
class Turn:
    """One piece of a streamed reply, with what is known of the turn so far.

    Attributes:
        text: the next piece of text (may be empty).
        prefill: the path that the new tokens took, ``kvp`` or ``full``.
        reused_tokens: held by the cache when the turn began.
        new_tokens: the rest of the prompt.
        predicted_tokens: how many of those were predicted.
        dropped_turns: turns that left the context before this one, to make room.
        ttft_ms: from the call to the first token's value on the host, tokenising included.
        generation_tokens: tokens generated so far.
        generation_tps: per second since the first one, as mlx-lm counts it.
    """

    text: str
    prefill: str
    reused_tokens: int
    new_tokens: int
    predicted_tokens: int
    dropped_turns: int
    ttft_ms: float
    generation_tokens: int
    generation_tps: float

    def summary(self) -> str:
        """Return the line that follows a reply."""
        path = f"{self.predicted_tokens} of them predicted" if self.prefill == "kvp" else "full prefill"
        return (
            f"{self.new_tokens} new tokens on {self.reused_tokens} cached, {path}, first token after "
            f"{self.ttft_ms / 1e3:.2f} s, then {self.generation_tps:.1f} tokens/s"
        )


class Conversation:
    """Messages, and the context that stands for those of them that fit the model's window.

    Attributes:
        messages: the whole transcript, a system message first if there is one.
        first: index in ``messages`` of the first one (after the system message) that is in the context. When the
            window overflows, whole turns leave it, oldest first; see ``_first_that_fits``.
        context: what the model has read.
        keep_heads: whether exact heads are saved on disk, and loaded the next time.
    """

    def __init__(self, model: KVPModel, system: str | None = None):
        if model.text_tokenizer.chat_template is None:
            raise InputError("this model has no chat template; use 'kvp generate --raw'.")
        self.model = model
        self.context = Context(model)
        self.keep_heads = False
        self.restore([{"role": "system", "content": system}] if system else [])

    def restore(self, messages: list[Message], first: int | None = None) -> None:
        """Go on from another transcript; what its rendering shares with the context is not read again."""
        self.messages = messages
        self.first = max(first or 0, _system_messages(messages))

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.restore(self.messages[: _system_messages(self.messages)])

    def reply(self, text: str, **options: Any) -> Iterator[Turn]:
        """Answer the user's next message; see ``_answer``."""
        check_text(text)
        return self._answer([*self.messages, {"role": "user", "content": text}], **options)

    def edit(self, text: str, **options: Any) -> Iterator[Turn]:
        """Answer another message in place of the user's last one; see ``_answer``.

        Raises:
            InputError: there is none.
        """
        check_text(text)
        return self._answer([*self.messages[: self._last_turn()], {"role": "user", "content": text}], **options)

    def regenerate(self, **options: Any) -> Iterator[Turn]:
        """Answer the user's last message once more; see ``_answer``.

        Raises:
            InputError: there is none.
        """
        return self._answer(self.messages[: self._last_turn() + 1], **options)

    def last_message(self) -> str:
        """Return the user's last message.

        Raises:
            InputError: there is none.
        """
        return self.messages[self._last_turn()]["content"]

    def _last_turn(self) -> int:
        """Return the index of the user's last message."""
        numbers = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if not numbers:
            raise InputError("there is no message yet; write one first.")
        return numbers[-1]

    def _answer(
        self,
        messages: list[Message],
        *,
        prefill: Prefill = "auto",
        exact_head: int = 0,
        exact_tail: int = 0,
        max_tokens: int = 512,
        progress: Progress | None = None,
        **options: Any,
    ) -> Iterator[Turn]:
        """Answer the last of ``messages``, yielding text as it is generated.

        Stopping early (closing the iterator, an exception in ``progress``) leaves a valid conversation: with the
        partial reply, or as it was before if there is none yet.

        Args:
            messages: the transcript that is to become the conversation's.
            prefill: as in ``pipeline.stream_generate``, for the new tokens.
            exact_head: likewise.
            exact_tail: likewise.
            max_tokens: tokens to generate at most.
            progress: called with (new tokens done, new tokens to do) after every chunk.
            options: passed to mlx-lm's ``stream_generate``.

        Raises:
            InputError: the message does not fit the context window, even alone; the conversation stays as it was.
        """
        start = time.perf_counter()
        first, ids = self._first_that_fits(messages, max_tokens)
        check_context(self.model, len(ids), max_tokens)
        choose_prefill(prefill, len(ids), exact_tail, exact_head)  # refuses bad options before anything changes
        dropped = sum(message["role"] == "user" for message in messages[self.first : first])
        reused = self._reuse(ids, exact_head if prefill != "full" else 0)
        head = max(reused, exact_head)
        path = choose_prefill(
            prefill, len(ids) - reused, exact_tail, head - reused, auto_min=auto_min_tokens(self.model)
        )
        predicted = len(ids) - 1 - exact_tail - head if path == "kvp" else 0
        generated: list[int] = []
        reply, ttft_ms = "", 0.0
        try:
            self.context.read(ids, path, exact_head=exact_head, exact_tail=exact_tail, progress=progress)
            for piece in decode(self.model, ids, self.context.cache, max_tokens=max_tokens, **options):
                ttft_ms = ttft_ms or 1e3 * (time.perf_counter() - start)
                generated.append(piece.token)
                reply += piece.text
                yield Turn(
                    text=piece.text,
                    prefill=path,
                    reused_tokens=reused,
                    new_tokens=len(ids) - reused,
                    predicted_tokens=predicted,
                    dropped_turns=dropped,
                    ttft_ms=ttft_ms,
                    generation_tokens=len(generated),
                    generation_tps=piece.generation_tps,
                )
        finally:
            self.context.grown_to(ids + generated)
            if generated:
                self.messages, self.first = [*messages, {"role": "assistant", "content": reply}], first
        if self.keep_heads and path == "kvp" and exact_head:
            save_head(self.context, ids[:exact_head])

    def _reuse(self, ids: list[int], exact_head: int) -> int:
        """Keep what the context shares with ``ids``, or load the saved head if that is more; returns the length."""
        shared = self.context.keep(common_prefix_len(self.context.tokens, ids[:-1]))
        if self.keep_heads and shared < exact_head < len(ids) and load_head(self.context, ids[:exact_head]):
            return exact_head
        return shared

    def _first_that_fits(self, messages: list[Message], max_tokens: int) -> tuple[int, list[int]]:
        """Return where the context is to begin in ``messages``, and the prompt's ids.

        As long as prompt and reply fit the window, nothing changes. When they do not, whole turns are dropped, the
        oldest first, until they fill no more than three quarters of it, so that this does not happen every turn.
        A reply is granted ``max_tokens``, but no more than a quarter of the window.
        """
        first, ids = self.first, self._render(messages, self.first)
        window = self.model.context_length
        if window is None:
            return first, ids
        room = min(max_tokens, int(MAX_REPLY_SHARE * window))
        if len(ids) + room <= window:
            return first, ids
        while len(ids) + room > FILL_AFTER_OVERFLOW * window:
            later = [n for n in range(first + 1, len(messages)) if messages[n]["role"] == "user"]
            if not later:
                break
            first = later[0]
            ids = self._render(messages, first)
        return first, ids

    def _render(self, messages: list[Message], first: int) -> list[int]:
        shown = messages[: _system_messages(messages)] + messages[first:]
        return self.model.text_tokenizer.apply_chat_template(shown, add_generation_prompt=True)


def _system_messages(messages: list[Message]) -> int:
    """Return 1 where a system message stands in front, else 0."""
    return int(bool(messages) and messages[0]["role"] == "system")
