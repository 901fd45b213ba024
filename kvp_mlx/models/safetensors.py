"""Reading safetensors headers without loading tensors: damage is found before mlx touches a file.

Format: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, the data.
"""

import hashlib
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import BundleError, InputError, KVPError
from ..files import MAX_HEADER_BYTES, tensor_header

SAMPLE_BYTES = 4096
QUANTISED_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (16, 32, 64, 128)
DTYPE_BITS = {f"{kind}{bits}": bits for kind in "FUI" for bits in (8, 16, 32, 64)} | {"BF16": 16, "BOOL": 8}
DTYPE_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file; ``start`` and ``end`` are byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file by name.

    Raises:
        BundleError: the file is missing, cut short or no safetensors file, or its tensors do not fill it one after the
            other.
    """
    try:
        size = path.stat().st_size
        header, data = tensor_header(path)
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata of other types than text")
        tensors = {name: _tensor(entry, data) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing; convert or download the model again.") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}).") from error
    except (InputError, ValueError, KeyError, TypeError) as error:
        raise BundleError(_not_safetensors(path)) from error
    end = max((tensor.end for tensor in tensors.values()), default=data)
    if size < end:
        raise BundleError(f"{path} is cut short ({size} of {end} bytes); convert or download the model again.")
    position = data
    for name, tensor in sorted(tensors.items(), key=lambda entry: (entry[1].start, entry[1].end)):
        if tensor.start != position:
            raise BundleError(
                f"{path}: {name} begins at byte {tensor.start}, where the tensor before it ends at {position}; "
                "convert or download the model again."
            )
        position = tensor.end
    if position != size:
        raise BundleError(f"{path} has {size - position} bytes of no tensor; convert or download the model again.")
    return tensors


def _tensor(entry: dict[str, Any], data: int) -> TensorInfo:
    """Return a tensor as a header describes it; a ValueError, KeyError or TypeError where it describes none."""
    start, end = entry["data_offsets"]
    numbers = [start, end, *entry["shape"]]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("a size that is no count")
    if 8 * (end - start) != DTYPE_BITS[entry["dtype"]] * math.prod(entry["shape"]):
        raise ValueError("a tensor's bytes do not fit its shape")
    return TensorInfo(entry["dtype"], tuple(entry["shape"]), data + start, data + end)


def _not_safetensors(path: Path) -> str:
    """Say what is wrong with a file that has no readable header: cut within it, or something else."""
    with open(path, "rb") as file:
        first = file.read(8)
    length, size = int.from_bytes(first, "little"), path.stat().st_size
    if len(first) == 8 and size < 8 + length <= MAX_HEADER_BYTES:
        return f"{path} is cut short ({size} of {8 + length} bytes); convert or download the model again."
    return f"{path} is not a safetensors file; convert or download the model again."


def write_tensors(arrays: dict[str, mx.array], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, with metadata of one's own or as mlx-lm does.

    Raises:
        KVPError: there is no room, or no right to write there.
    """
    try:
        mx.save_safetensors(str(path), arrays, metadata=metadata or {"format": "mlx"})
        if path.stat().st_size == 0:
            raise RuntimeError("nothing was written")
    except (RuntimeError, OSError) as error:
        raise KVPError(f"cannot write {path.name} ({error}); make room on the disk or choose another --out.") from error


def check_quantised(tensors: dict[str, TensorInfo], where: Path) -> None:
    """Refuse quantised tensors whose parts do not fit each other, which mlx takes for granted.

    Raises:
        BundleError: scales or biases of another number of rows or groups than their weight's.
    """
    for name, scales in tensors.items():
        owner, _, part = name.rpartition(".")
        weight = tensors.get(f"{owner}.weight")
        if part != "scales" or weight is None or weight.dtype != "U32":
            continue
        if not _are_parts(weight.shape, scales.shape):
            raise BundleError(
                f"{where}: {name} of shape {scales.shape} does not fit its weight of shape {weight.shape}; get the "
                "model again."
            )
        biases = tensors.get(f"{owner}.biases", scales)
        if biases.shape != scales.shape:
            raise BundleError(f"{where}: {owner}.biases has shape {biases.shape}, the scales {scales.shape}.")


def _are_parts(weight: tuple[int, ...], scales: tuple[int, ...]) -> bool:
    """Return whether packed words ``(..., words)`` and scales ``(..., groups)`` can make one matrix."""
    if len(weight) < 2 or weight[:-1] != scales[:-1] or not scales[-1]:
        return False
    bits_per_group, rest = divmod(32 * weight[-1], scales[-1])
    return not rest and any(bits_per_group == bits * size for bits in QUANTISED_BITS for size in GROUP_SIZES)


def fingerprint(directory: Path) -> str:
    """Return what identifies the weights of a model directory, ``sha256:...``, whatever their sharding.

    It covers every tensor's name, dtype, shape and its first and last 4 KiB, so that it takes milliseconds on
    models of any size. Any training run changes it; a change deep inside a single large tensor may not.

    Raises:
        BundleError: no weights, or a damaged file.
    """
    digest = hashlib.sha256()
    for name, path, tensor in weight_tensors(directory):
        digest.update(f"{name}:{tensor.dtype}:{tensor.shape}\n".encode())
        with open(path, "rb") as file:
            for start in (tensor.start, max(tensor.start, tensor.end - SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(min(SAMPLE_BYTES, tensor.end - start)))
    return f"sha256:{digest.hexdigest()}"


def weight_tensors(directory: Path) -> list[tuple[str, Path, TensorInfo]]:
    """List the tensors of ``model*.safetensors`` in a directory, sorted by name.

    Raises:
        BundleError: no weights, or a damaged file.
    """
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise BundleError(f"{directory} holds no model*.safetensors; it is not an mlx-lm model directory.")
    tensors = sorted(
        ((name, path, tensor) for path in files for name, tensor in read_header(path).items()),
        key=lambda entry: entry[0],
    )
    for (name, first, _), (other, second, _) in pairwise(tensors):
        if name == other:
            raise BundleError(f"{name} stands twice, in {first.name} and in {second.name}; get {directory} again.")
    return tensors
