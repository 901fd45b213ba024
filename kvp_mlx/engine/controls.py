"""Control tokens in what people write: a message or document must not open or close turns.

The template's own control tokens (``<|im_end|>``) become tokens; the same characters in content are read as characters.
Content that holds none is rendered and encoded as ever. In other content a break stands behind the first character of
each, and after rendering the text is encoded from break to break, so that no tokeniser of any kind sees it whole.
"""

import functools
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

BREAK = "\ufdd0"
"""A noncharacter: Unicode keeps it for such uses, and no text that is passed on holds it."""
PROBES = ("\n", "a", "1")
MAX_REMEMBERED_CHARACTERS = 2**17
"""Of a turn whose token ids are remembered; 1,024 turns are, of a few thousand characters mostly."""


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
    ids = _encoded(tokenizer, first)
    for piece in others:
        ids += _continued(tokenizer, piece)
    return ids


def _encoded(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """Return the token ids of text, those of its turns from memory where the same were encoded before.

    Tokenisers of the library ``tokenizers`` cut text at control tokens and encode what is between for itself, so
    ``tests/engine/test_controls.py`` finds no difference. Others encode the whole.
    """
    turns = _turn_starts(tokenizer)
    if turns is None:
        return list(tokenizer.encode(text, add_special_tokens=False))
    pattern, starting = turns
    cuts = [0, *(match.start() for match in pattern.finditer(text) if match[0] in starting), len(text)]
    return [each for start, end in pairwise(cuts) if start < end for each in _encoded_turn(tokenizer, text[start:end])]


@functools.lru_cache(maxsize=8)
def _turn_starts(tokenizer: TokenizerWrapper) -> tuple[re.Pattern[str], set[str]] | None:
    """Return what finds the tokens that a tokeniser looks for first of all, and those of them that text is cut at."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values() if getattr(tokenizer, "is_fast", False) else []
    texts = sorted((token.content for token in added if not token.normalized), key=len, reverse=True)
    around = {token.content for token in added if token.lstrip or token.single_word}  # depend on what is before
    return (re.compile("|".join(map(re.escape, texts))), {*texts} - around) if texts else None


def _encoded_turn(tokenizer: TokenizerWrapper, turn: str) -> Iterable[int]:
    if len(turn) > MAX_REMEMBERED_CHARACTERS:
        return list(tokenizer.encode(turn, add_special_tokens=False))
    return _remembered(tokenizer, turn)


@functools.lru_cache(maxsize=1024)
def _remembered(tokenizer: TokenizerWrapper, turn: str) -> "array[int]":
    return array("i", tokenizer.encode(turn, add_special_tokens=False))


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
        head, ids = _encoded(tokenizer, probe), _encoded(tokenizer, probe + piece)
        if ids[: len(head)] == head:
            return ids[len(head) :]
    return _encoded(tokenizer, piece)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for child in chain.from_iterable(value.items()) if isinstance(value, dict) else value:
            yield from _strings(child)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a message with its texts changed, and a break behind each part of content, since templates join these."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _mapped(child, change) for key, child in value.items()}
    return [_ended(_mapped(child, change)) for child in value] if isinstance(value, list | tuple) else value


def _ended(part: Any) -> Any:
    """Return a part of content with a break behind its text, in front of the space at its end."""
    if isinstance(part, str):
        return re.sub(r"(\S)(\s*)\Z", rf"\1{BREAK}\2", part)
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part | {"text": _ended(part["text"])}
    return part
