"""Transcripts of conversations: small JSON files beside the saved caches, which no size limit removes."""

from pathlib import Path
from typing import Any

from ..errors import BundleError, InputError
from ..files import cache_dir, read_json, write_json
from .prompt import Message
from .saved_caches import NAME, checked_name

FORMAT_VERSION = 1


def save_conversation(name: str, messages: list[Message], first: int) -> None:
    """Write a transcript, in place of what may be there, whole or not at all."""
    record = {"format_version": FORMAT_VERSION, "messages": messages, "first": first}
    write_json(_transcript(name), record, private=True)


def load_conversation(name: str) -> tuple[list[Message], int]:
    """Return a saved transcript and where its context begins.

    Raises:
        InputError: nothing of that name.
        BundleError: it is damaged.
    """
    path = _transcript(name)
    try:
        data = read_json(path)
        messages = [{"role": _text(m["role"]), "content": _text(m["content"])} for m in data["messages"]]
        if data["format_version"] != FORMAT_VERSION:
            raise ValueError("another version")
        return messages, range(len(messages) + 1).index(data["first"])
    except FileNotFoundError as error:
        known = ", ".join(conversation_names()) or "none yet"
        raise InputError(f"there is no saved conversation '{name}'; saved: {known}.") from error
    except (InputError, OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"the saved conversation {path} is damaged or of another version; remove it.") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def conversation_names() -> list[str]:
    """Return the names of the saved conversations, sorted."""
    return sorted(path.stem for path in _transcripts().glob("*.json") if NAME.fullmatch(path.stem))


def _transcripts() -> Path:
    return cache_dir() / "conversations"


def _transcript(name: str) -> Path:
    return _transcripts() / f"{checked_name(name)}.json"
