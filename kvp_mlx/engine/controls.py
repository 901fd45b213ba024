"""Control tokens in what people write: a message or document must not open or close turns.

The template's own control tokens (``<|im_end|>``) become tokens; the same characters in content are read as characters.
Content that holds none is rendered and encoded as ever. In other content a break stands behind the first character of
each, and after rendering the text is encoded from break to break, so that no tokeniser of any kind sees it whole.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

BREAK = "\ufdd0"
"""A noncharacter: Unicode keeps it for such uses, and no text that is passed on holds it."""
PROBES = ("\n", "a", "1")


def set_apart(tokenizer: TokenizerWrapper, messages: list[Any]) -> list[Any]:
    """Return messages whose content forges no control tokens, the very same ones where none did.

    What an assistant's message says of its thinking and its tool calls stays: the model wrote that.
    """
    tokens, normalise = control_tokens(tokenizer), _normaliser(tokenizer)
    own = {getattr(tokenizer, name) for name in ("think_start", "think_end", "tool_call_start", "tool_call_end")}
    found = False

    def checked(message: Any) -> Any:
        nonlocal found
        is_own = isinstance(message, dict) and message.get("role") == "assistant"
        looked_for = [token for token in tokens if not (is_own and token in own)]
        if not _holds("".join(_strings(message)), looked_for, normalise):
            return message
        found = True
        return _mapped(message, lambda text: _broken(text, looked_for, normalise))

    safe = [checked(message) for message in messages]
    return safe if found else messages


def encode_apart(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """Return the token ids of a rendered template, breaks and all; without breaks they are what they always were."""
    first, *others = text.split(BREAK)
    ids: list[int] = tokenizer.encode(first, add_special_tokens=False)
    for piece in others:
        ids += _continued(tokenizer, piece)
    return ids


def control_tokens(tokenizer: TokenizerWrapper) -> list[str]:
    """Return the texts of the special tokens, and of the other added tokens that the chat template writes."""
    template = tokenizer.chat_template
    source = "\n".join(template.values()) if isinstance(template, dict) else str(template or "")
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if len(token.content) > 1 and not token.content.isspace() and (token.special or token.content in source)
    ]


def _normaliser(tokenizer: TokenizerWrapper) -> Callable[[str], str] | None:
    """Return what a tokeniser does to text before it looks for tokens that are marked as normalised."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is None:
        return None
    is_needed = any(token.normalized for token in tokenizer.added_tokens_decoder.values())
    normalise: Callable[[str], str] = backend.normalizer.normalize_str
    return normalise if is_needed else None


def _holds(text: str, tokens: list[str], normalise: Callable[[str], str] | None) -> bool:
    if any(token in text for token in tokens):
        return True
    return normalise is not None and any(token in normalise(text) for token in tokens)


def _broken(text: str, tokens: list[str], normalise: Callable[[str], str] | None) -> str:
    """Return text with a break inside every control token."""
    longest_first = sorted(tokens, key=len, reverse=True)
    pattern = re.compile(f"(?=(?:{'|'.join(map(re.escape, longest_first))}))(.)", re.DOTALL)
    lines = pattern.sub(rf"\1{BREAK}", text.replace(BREAK, "")).split("\n")
    if normalise is not None:  # what only becomes one when it is normalised: each of its characters for itself
        lines = [BREAK.join(line) if any(token in normalise(line) for token in tokens) else line for line in lines]
    return "\n".join(lines)


def _continued(tokenizer: TokenizerWrapper, piece: str) -> list[int]:
    """Return the token ids of text that goes on from other text, so that no tokeniser puts a space in front."""
    for probe in PROBES:
        head = tokenizer.encode(probe, add_special_tokens=False)
        ids: list[int] = tokenizer.encode(probe + piece, add_special_tokens=False)
        if ids[: len(head)] == head:
            return ids[len(head) :]
    return list(tokenizer.encode(piece, add_special_tokens=False))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _strings(child)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a message with its texts changed, and a break behind each part of content, since templates join these."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(child, change) for key, child in value.items()}
    return [_ended(_mapped(child, change)) for child in value] if isinstance(value, list | tuple) else value


def _ended(part: Any) -> Any:
    """Return a part of content with a break behind its text, in front of the space at its end."""
    if isinstance(part, str):
        return re.sub(r"(\S)(\s*)\Z", rf"\1{BREAK}\2", part)
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part | {"text": _ended(part["text"])}
    return part
