"""Source text that ``sandbox`` puts into both processes of a judged program: calls and plain values as JSON lines."""

import builtins
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

PLAIN: tuple[Callable[[Any], object], ...] = (bool, int, float, str)


def pack(value: object) -> object:
    """Return a value as JSON can hold it; what is no plain value becomes one that equals nothing."""
    if value is None:
        return None
    for kind in PLAIN:
        if isinstance(value, kind):  # type: ignore[arg-type] # classes are callables
            return value if type(value) is kind else kind(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    for sequence in (bytes, list, tuple, set, frozenset):
        if isinstance(value, sequence):
            return {sequence.__name__: [pack(item) for item in value]}
    return {"object": type(value).__name__}


def unpack(packed: Any) -> Any:
    """Return the value that was packed."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "complex":
        return complex(*content)
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in content}
    if kind in {"bytes", "list", "tuple", "set", "frozenset"}:
        return getattr(builtins, kind)(unpack(item) for item in content)
    return object()


def send(descriptor: int, message: object) -> None:
    """Write one line."""
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


def received(descriptor: int) -> Iterator[Any]:
    """Yield what the lines say, until there are no more."""
    data = b""
    while part := os.read(descriptor, 65536):
        *lines, data = (data + part).split(b"\n")
        yield from map(json.loads, lines)


class Candidate:
    """A function in another process."""

    def __init__(self, ask: int, answered: int):
        self.ask, self.answers = ask, received(answered)

    def __call__(self, *arguments: object, **named: object) -> object:
        """Let the other process call it."""
        send(self.ask, [pack(arguments), pack(named)])
        answer = next(self.answers)
        if "error" in answer:
            error = getattr(builtins, str(answer["error"]), Exception)
            raise error if isinstance(error, type) and issubclass(error, Exception) else Exception
        return unpack(answer["value"])


def serve(function: Callable[..., object], asked: int, answer: int) -> None:
    """Answer the calls of ``Candidate`` until there are no more."""
    for arguments, named in received(asked):
        try:
            found = {"value": pack(function(*unpack(arguments), **unpack(named)))}
        except Exception as error:
            found = {"error": type(error).__name__}
        send(answer, found)
