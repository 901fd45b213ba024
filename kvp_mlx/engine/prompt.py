"""From text and messages to token ids, and what a prompt must keep to."""

from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..bundle.loading import KVPModel
from ..errors import InputError, PromptTooLongError
from .controls import encode_apart, set_apart

Message = dict[str, Any]
"""``role``, ``content`` and the like, as chat templates take them."""
MAX_CHARACTERS_PER_TOKEN = 32
"""On average over a text, and generous: prose has about 4."""
MAX_TEMPLATE_CHARACTERS, MAX_CHARACTERS_PER_CHARACTER = 2**20, 16
"""What a chat template may add of its own, and make of a character that it is given (``\\U0001f600``)."""


def render(
    tokenizer: TokenizerWrapper, messages: list[Message], *, asks: bool = True, arguments: dict[str, Any] | None = None
) -> list[int]:
    """Return the token ids of messages in the model's chat template, whose control tokens no message can forge.

    Args:
        tokenizer: the model's.
        messages: the conversation.
        asks: open the assistant's turn.
        arguments: for the template (``enable_thinking``, ...; ``tools``, which forge nothing either).

    Raises:
        InputError: the template refuses these messages, or fails.
    """
    arguments = arguments or {}
    written = [*messages, *(arguments.get("tools") or [])]
    safe = set_apart(tokenizer, written)
    options = {**arguments, "add_generation_prompt": asks, "tokenize": False}
    if safe is not written and "tools" in arguments:
        options["tools"] = safe[len(messages) :] or None
    try:
        rendered: str = tokenizer.apply_chat_template(safe[: len(messages)], **options)
    except Exception as error:  # templates raise what they like, and everything that Python does
        raise template_error(tokenizer, error) from error
    if len(rendered) > MAX_TEMPLATE_CHARACTERS + MAX_CHARACTERS_PER_CHARACTER * len(str((messages, arguments))):
        raise InputError(f"the model's chat template writes {len(rendered):,} characters; get the model again.")
    return encode_apart(tokenizer, rendered)


def template_error(tokenizer: TokenizerWrapper, error: Exception) -> InputError:
    """Return what a chat template's failure means to who wrote the messages."""
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(sorted(tokenizer.chat_template))
        return InputError(f"this model has chat templates named {names} and no default one; name one 'default' there.")
    return InputError(f"the model's chat template refuses this conversation: {reason}; change it, or see --system.")


def render_text(tokenizer: TokenizerWrapper, messages: list[Message]) -> str:
    """Return what ``render`` encodes, as text to be encoded by ``controls.encode_apart``.

    Raises:
        InputError: as ``render``.
    """
    try:
        text: str = tokenizer.apply_chat_template(set_apart(tokenizer, messages), tokenize=False)
    except Exception as error:
        raise template_error(tokenizer, error) from error
    return text


def encode_text(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """Return the token ids of text as it stands, with one BOS where the tokeniser puts one."""
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not has_bos)
    return ids


def encode(
    model: KVPModel,
    prompt: str | list[int],
    *,
    raw: bool = False,
    system: str | None = None,
    template_arguments: dict[str, Any] | None = None,
) -> list[int]:
    """Turn a prompt into token ids: through the chat template as a user's message, or as it stands.

    Args:
        model: the bundle.
        prompt: text, or token ids that are passed through.
        raw: skip the chat template (a base without one is always raw).
        system: a system message that goes before it, in the chat template.
        template_arguments: for the chat template.

    Raises:
        InputError: nothing to encode, no tokeniser, no chat template for what needs one, or more tokens than the
            context window holds.
    """
    if isinstance(prompt, str):
        tokenizer = model.text_tokenizer
        check_text(prompt)
        check_text(system or "")
        check_size(model, prompt)
        is_raw = raw or tokenizer.chat_template is None
        if is_raw and (system or template_arguments):
            raise InputError("a system prompt and template arguments need a chat template; leave them out.")
        if is_raw:
            ids = encode_text(tokenizer, prompt)
        else:
            messages = [{"role": "system", "content": system}] if system else []
            ids = render(tokenizer, [*messages, {"role": "user", "content": prompt}], arguments=template_arguments)
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


def check_size(model: KVPModel, text: str, what: str = "the prompt") -> None:
    """Refuse text that cannot fit the context window, before the work of tokenising it.

    Raises:
        PromptTooLongError: it has more characters than that many tokens ever stand for.
    """
    window = model.context_length
    if window is not None and len(text) > MAX_CHARACTERS_PER_TOKEN * window:
        raise PromptTooLongError(
            f"{what} has {len(text):,} characters, far more than the model's context window of {window:,} tokens can "
            "hold; shorten it."
        )


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
