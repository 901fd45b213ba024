"""Reading GGUF files: metadata, and tensors a few rows at a time; the parts of a split file are one file.

Format: the GGUF specification (ggml-org/ggml, docs/gguf.md). Nothing that a header says is believed before it is held
against the file's size.
"""

import functools
import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# GGUF's numbers for kinds of metadata, with NumPy's names
SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4
PLAIN = {"F32": np.float32, "F16": np.float16}
PART = re.compile(r"(.+-)(\d{5})-of-(\d{5})\.gguf")
NUMBERS_AT_ONCE = 2**22


class _DamagedError(Exception):
    """What a header says cannot be so."""


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor.

    Attributes:
        path: the file that holds it.
        kind: ggml's name for its type.
        shape: outermost dimension first, as NumPy has it.
        offset: position of its first byte in the file.
        block: numbers that are stored together.
        block_bytes: bytes that they take.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    block: int
    block_bytes: int

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[-1] // self.block * self.block_bytes

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size // self.block * self.block_bytes

    def head(self, rows: int) -> "GGUFTensor":
        """Return the first rows of a matrix as a tensor."""
        return replace(self, shape=(min(rows, self.shape[0]), *self.shape[1:]))

    def rows(self) -> Iterator[np.ndarray]:
        """Yield the bytes of a few rows at a time, ``(rows, row_bytes)``."""
        step = max(1, NUMBERS_AT_ONCE // self.shape[-1])
        rows = self.size // self.shape[-1]
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            for start in range(0, rows, step):
                data = file.read(min(step, rows - start) * self.row_bytes)
                yield np.frombuffer(data, np.uint8).reshape(-1, self.row_bytes)


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file, all parts of it.

    Attributes:
        path: what the user named.
        metadata: values as Python has them.
        tensors: by name, in the file's order.
        parts: the files.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    parts: tuple[Path, ...]

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Return a whole number of at least ``least``."""
        value: int = self._value(key, lambda x: type(x) is int and least <= x < 2**31, "a usable whole number", default)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number, not below zero, without what storing a short decimal as fp32 added to it."""
        value = self._value(key, lambda x: type(x) in (int, float) and 0 <= x < math.inf, "a usable number", default)
        return decimal(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value: bool = self._value(key, lambda x: type(x) is bool, "true or false", default)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text."""
        value: str = self._value(key, lambda x: type(x) is str, "a text", default)
        return value

    def items(self, key: str, kind: type) -> list[Any]:
        """Return a list of values of one type."""

        def fits(value: Any) -> bool:
            return type(value) is list and all(type(item) is kind for item in value)

        value: list[Any] = self._value(key, fits, f"a list of {kind.__name__}", None)
        return value

    def _value(self, key: str, fits: Callable[[Any], bool], words: str, default: Any) -> Any:
        if key not in self.metadata:
            if default is None:
                raise InputError(f"{self.path} lacks the metadata key {key}; download another conversion of the model.")
            return default
        value = self.metadata[key]
        if not fits(value):
            raise InputError(f"{self.path}: {key} is {shown(value)}, not {words}; download it again.")
        return value


def shown(value: Any) -> str:
    """Return a metadata value, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def decimal(value: float) -> float:
    """Undo what storing a short decimal as fp32 added (1e-05 was stored as 9.99999974737875e-06)."""
    with np.errstate(over="ignore"):
        stored = np.float32(value)
    return float(str(stored)) if float(stored) == value else float(value)


def read_gguf(source: Path) -> GGUFFile:
    """Read the headers of a GGUF file and, if it is one part of a split file, of all other parts.

    Raises:
        InputError: not a whole GGUF file of a readable version; a part is missing; a tensor's type is unknown.
    """
    metadata, tensors = _read_part(source)
    count = metadata.get("split.count", 1)
    if count in (0, 1):  # 0: llama.cpp's own tool has merged the parts
        return GGUFFile(source, metadata, tensors, (source,))
    parts = _part_names(source, metadata.get("split.no"), count)
    first, merged = metadata, dict[str, GGUFTensor]()
    for number, part in enumerate(parts):
        keys, found = (metadata, tensors) if part.name == source.name else _read_part(part)
        if (keys.get("split.no"), keys.get("split.count")) != (number, count):
            raise InputError(f"{part} says that it is another part of a split file; download it again.")
        if twice := merged.keys() & found.keys():
            raise InputError(f"{part} holds the tensor {min(twice)}, as another part of the split file does.")
        merged |= found
        first = keys if number == 0 else first
    total = first.get("split.tensors.count", len(merged))
    if total != len(merged):
        raise InputError(f"the parts of the split file {source} hold {len(merged)} tensors, not {shown(total)}.")
    return GGUFFile(source, first, merged, tuple(parts))


def _part_names(source: Path, number: Any, count: Any) -> list[Path]:
    """Return all parts of a split file, in order.

    Raises:
        InputError: the name of this one does not tell the others', or one of these is not there.
    """
    if type(number) is not int or type(count) is not int or not 0 <= number < count < 10**5:
        raise InputError(f"{source} says that it is part {shown(number)} of {shown(count)} of a split file.")
    match = PART.fullmatch(source.name)
    if match is None or (int(match[2]), int(match[3])) != (number + 1, count):
        raise InputError(
            f"{source} is part {number + 1} of {count} of a split file; give it back the name that ends in "
            f"-{number + 1:05d}-of-{count:05d}.gguf, so that the other parts are found."
        )
    parts = [source.with_name(f"{match[1]}{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    for part in parts:
        if not part.exists():
            raise InputError(f"{source} is one part of a split file, and {part.name} is missing; put it beside.")
    return parts


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Return metadata and tensors of one file."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; name a GGUF file.")
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_header(_Header(data), path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    except (_DamagedError, ValueError) as error:  # of an empty file, mmap raises ValueError; wrong UTF-8 is one
        reason = str(error) if isinstance(error, _DamagedError) else "its header is damaged"
        raise InputError(f"{path} is not a whole GGUF file ({reason}); copy or download it again.") from error


class _Header:
    """A cursor over GGUF's building blocks, little-endian."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise _DamagedError("it is cut short: it ends inside its header")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return value

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self) -> Any:
        """Read a metadata value; arrays of arrays, which no model has, count as damage."""
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self._scalars(kind, 1)[0]
        kind, length = self.number("I"), self.number("Q")
        if kind != STRING:
            return self._scalars(kind, length)
        if length * 8 > len(self.data) - self.at:
            raise _DamagedError("it is cut short: it ends inside its header")
        return [self.text() for _ in range(length)]

    def _scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in SCALARS:
            raise _DamagedError(f"it has metadata of the unknown kind {kind}")
        dtype = np.dtype(f"<{SCALARS[kind]}")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


def _read_header(header: _Header, path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    if header.take(4) != MAGIC:
        raise _DamagedError("it does not begin with GGUF")
    version = header.number("I")
    if version not in VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise InputError(f"{path} is big-endian, which is not read here; download the little-endian file.")
        raise InputError(f"{path} is GGUF of version {version}, not 2 or 3; convert the model anew with llama.cpp.")
    count, entries = header.number("Q"), header.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = header.text()
        if key in metadata:
            raise _DamagedError(f"it has the metadata key {shown(key)} twice")
        metadata[key] = header.value()
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = header.text()
        if name in infos:
            raise _DamagedError(f"it has the tensor {shown(name)} twice")
        dimensions = header.number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _DamagedError(f"{shown(name)} has {dimensions} dimensions")
        shape = tuple(header.number("Q") for _ in range(dimensions))[::-1]
        infos[name] = (shape, header.number("I"), header.number("Q"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _DamagedError(f"general.alignment is {shown(alignment)}")
    start = -(-header.at // alignment) * alignment
    tensors = {name: _tensor(path, name, *info, start) for name, info in infos.items()}
    _check_places(tensors, alignment, start, len(header.data))
    return metadata, tensors


def _tensor(path: Path, name: str, shape: tuple[int, ...], number: int, offset: int, start: int) -> GGUFTensor:
    kind, block, block_bytes = _type(number)
    if not block:
        raise InputError(
            f"{path}: {shown(name)[1:-1]} is {kind}, which cannot be read here; requantise it with llama.cpp."
        )
    if min(shape) < 1 or shape[-1] % block:
        raise _DamagedError(f"{shown(name)} is {kind} and of shape {shape}, which that type does not allow")
    return GGUFTensor(path, kind, shape, start + offset, block, block_bytes)


@functools.cache
def _type(number: int) -> tuple[str, int, int]:
    """Return a ggml type's name, how many numbers it stores together (0: it is not read here), in how many bytes."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # takes longer to import than all of convert
    from gguf.quants import dequantize

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        return f"type {number}", 0, 0
    block, block_bytes = GGML_QUANT_SIZES[kind]
    try:
        if kind.name not in PLAIN:
            with np.errstate(all="ignore"):
                dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return kind.name, 0, 0
    return kind.name, block, block_bytes


def _check_places(tensors: dict[str, GGUFTensor], alignment: int, start: int, size: int) -> None:
    """Refuse tensors that lie outside the file or on one another."""
    end, before = start, ""
    for name, tensor in sorted(tensors.items(), key=lambda entry: entry[1].offset):
        if tensor.offset + tensor.nbytes > size:
            raise _DamagedError(f"it is cut short: it ends before {shown(name)}")
        if tensor.offset < end:
            raise _DamagedError(f"{shown(name)} lies on {shown(before)}")
        if (tensor.offset - start) % alignment:
            raise _DamagedError(f"{shown(name)} is not aligned")
        end, before = tensor.offset + tensor.nbytes, name
