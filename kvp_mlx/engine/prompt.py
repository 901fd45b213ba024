"""From text and messages to token ids, and what a prompt must keep to."""

from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..bundle.loading import KVPModel
from ..errors import InputError

Message = dict[str, str]
"""``role`` and ``content``, as chat templates take them."""


def render(tokenizer: TokenizerWrapper, messages: list[Message], *, asks: bool = True) -> list[int]:
    """Return the token ids of messages in the model's chat template; with ``asks`` the assistant's turn is opened."""
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=asks)
    return ids


def render_text(tokenizer: TokenizerWrapper, messages: list[dict[str, Any]]) -> str:
    """Return messages in the model's chat template as text."""
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    return text


def encode(model: KVPModel, prompt: str | list[int], *, raw: bool = False) -> list[int]:
    """Turn a prompt into token ids: through the chat template as a user's message, or as it stands.

    Args:
        model: the bundle.
        prompt: text, or token ids that are passed through.
        raw: skip the chat template (a base without one is always raw).

    Raises:
        InputError: nothing to encode, no tokeniser, or more tokens than the context window holds.
    """
    if isinstance(prompt, str):
        tokenizer = model.text_tokenizer
        check_text(prompt)
        if raw or tokenizer.chat_template is None:
            has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
            ids = tokenizer.encode(prompt, add_special_tokens=not has_bos)
        else:
            ids = render(tokenizer, [{"role": "user", "content": prompt}])
    else:
        ids = list(prompt)
    if not ids:
        raise InputError("the prompt is empty; give it at least one token.")
    check_window(model, len(ids))
    return ids


def check_text(text: str) -> None:
    """Refuse text that is not Unicode (a terminal's or file's stray bytes arrive as lone surrogates).

    Raises:
        InputError: it does not encode to UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is not UTF-8 text (character {error.start}); convert it first.") from error


def check_window(model: KVPModel, tokens: int, max_tokens: int = 1) -> None:
    """Refuse a prompt that leaves no room for an answer, and an answer of no tokens.

    Raises:
        InputError: the context window is full, or ``max_tokens`` is below one.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, not {max_tokens}.")
    if model.context_length is not None and tokens >= model.context_length:
        raise InputError(
            f"the prompt has {tokens} tokens, the model's context window {model.context_length}; shorten the prompt."
        )


def allowed_tokens(model: KVPModel, prompt_tokens: int, max_tokens: int) -> int:
    """Return how many tokens an answer may have: ``max_tokens``, or what the context window leaves.

    Raises:
        InputError: see ``check_window``.
    """
    check_window(model, prompt_tokens, max_tokens)
    return max_tokens if model.context_length is None else min(max_tokens, model.context_length - prompt_tokens)
