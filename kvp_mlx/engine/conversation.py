"""A conversation: the cache is kept from turn to turn, and only new tokens are read or predicted."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from mlx_lm.utils import common_prefix_len

from ..bundle.loading import KVPModel
from ..errors import InputError
from .context import Context
from .dial import QUALITIES, Dial
from .prompt import Message, check_size, check_text, check_window, render
from .reply import Piece, reply
from .saved_caches import load_head, save_head

FILL_AFTER_OVERFLOW = 0.75
MAX_REPLY_SHARE = 0.25


class Conversation:
    """Messages, and the context that stands for those of them that fit the model's window.

    Attributes:
        messages: the whole transcript, a system message first if there is one.
        first: index in ``messages`` of the first one (after the system message) that is in the context. When the
            window overflows, whole turns leave it, oldest first; see ``_first_that_fits``.
        context: what the model has read.
        dropped_turns: turns that left the context for the latest answer, to make room.
        keep_heads: whether exact heads are saved on disk, and loaded the next time.

    Args:
        model: the bundle.
        system: a system message.
        template_arguments: for the chat template (``enable_thinking``, ...).

    Raises:
        InputError: no chat template, or one that refuses such a conversation.
    """

    def __init__(self, model: KVPModel, system: str | None = None, *, template_arguments: dict[str, Any] | None = None):
        if model.text_tokenizer.chat_template is None:
            raise InputError("this model has no chat template; use 'kvp generate --raw'.")
        self.model = model
        self._template_arguments = template_arguments
        self.context = Context(model)
        self.dropped_turns = 0
        self.keep_heads = False
        check_text(system or "")
        self.restore([{"role": "system", "content": system}] if system else [])
        self._head()

    def restore(self, messages: list[Message], first: int | None = None) -> None:
        """Go on from another transcript; what its rendering shares with the context is not read again."""
        self.messages = messages
        self.first = max(first or 0, _system_messages(messages))

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.restore(self.messages[: _system_messages(self.messages)])
        self.context.keep(common_prefix_len(self.context.tokens, self._head()))

    def tokens_of(self, text: str, what: str = "the message") -> int:
        """Return how many tokens a message takes in a conversation of its own.

        Raises:
            InputError: it does not fit the context window, or is no Unicode.
        """
        check_text(text)
        check_size(self.model, text, what)
        tokens = len(self._render([*self._system(), {"role": "user", "content": text}], 0))
        window = self.model.context_length
        if window is not None and tokens >= window:
            raise InputError(f"{what} has {tokens:,} tokens, the model's context window {window:,}; shorten it.")
        return tokens

    def unread_tokens(self) -> int:
        """Return how many tokens of the conversation the context does not hold."""
        ids = self._render(self.messages, self.first, asks=False) if len(self.messages) > len(self._system()) else []
        return len(ids) - common_prefix_len(self.context.tokens, ids)

    def _system(self) -> list[Message]:
        return self.messages[: _system_messages(self.messages)]

    def _head(self) -> list[int]:
        """Return the tokens that every conversation after this system message begins with."""
        a, b = (self._render([*self._system(), {"role": "user", "content": text}], 0) for text in ("a", "1"))
        return a[: common_prefix_len(a, b)]

    def reply(self, text: str, **options: Any) -> Iterator[Piece]:
        """Answer the user's next message; see ``_answer``."""
        check_text(text)
        check_size(self.model, text, "the message")
        return self._answer([*self.messages, {"role": "user", "content": text}], **options)

    def edit(self, text: str, **options: Any) -> Iterator[Piece]:
        """Answer another message in place of the user's last one; see ``_answer``.

        Raises:
            InputError: there is none.
        """
        check_text(text)
        check_size(self.model, text, "the message")
        return self._answer([*self.messages[: self._last_turn()], {"role": "user", "content": text}], **options)

    def regenerate(self, **options: Any) -> Iterator[Piece]:
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
        dial: Dial = QUALITIES["balanced"],
        *,
        max_tokens: int = 512,
        **options: Any,
    ) -> Iterator[Piece]:
        """Answer the last of ``messages``, yielding text as it is generated.

        Stopping early (closing the iterator, an exception in ``progress``) leaves a valid conversation: with the
        partial reply, or as it was before if there is none yet.

        Args:
            messages: the transcript that is to become the conversation's.
            dial: how the new tokens are read.
            max_tokens: tokens to generate at most.
            options: as ``engine.reply.reply`` takes them.

        Raises:
            InputError: the message does not fit the context window, even alone; the conversation stays as it was.
        """
        first, ids = self._first_that_fits(messages, max_tokens)
        check_window(self.model, len(ids), max_tokens)
        dial = dial.at(self.model.config, len(ids))
        dial.share(self.model.config)  # refused before anything changes
        self.dropped_turns = sum(message["role"] == "user" for message in messages[self.first : first])
        head = ids[: dial.exact_head] if self.keep_heads and dial.path != "full" else []
        if common_prefix_len(self.context.tokens, ids[:-1]) < len(head) < len(ids):
            load_head(self.context, head)
        text, last = "", None
        with closing(reply(self.context, ids, dial, max_tokens=max_tokens, **options)) as pieces:
            try:
                for piece in pieces:
                    text, last = text + piece.text, piece
                    yield piece
            finally:
                if last is not None:
                    self.messages, self.first = [*messages, {"role": "assistant", "content": text}], first
        if last is not None and last.path == "kvp" and head:
            save_head(self.context, head)

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

    def _render(self, messages: list[Message], first: int, *, asks: bool = True) -> list[int]:
        number = _system_messages(messages)
        shown = messages[:number] + messages[max(first, number) :]
        return render(self.model.text_tokenizer, shown, asks=asks, arguments=self._template_arguments)


def _system_messages(messages: list[Message]) -> int:
    """Return 1 where a system message stands in front, else 0."""
    return int(bool(messages) and messages[0]["role"] == "system")
