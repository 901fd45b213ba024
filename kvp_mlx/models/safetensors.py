"""Reading safetensors headers without loading tensors: damage is found before mlx touches a file.

Format: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, the data.
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from ..errors import BundleError

SAMPLE_BYTES = 4096
DTYPE_BITS = {f"{kind}{bits}": bits for kind in "FUI" for bits in (8, 16, 32, 64)} | {"BF16": 16, "BOOL": 8}


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
        BundleError: the file is missing, cut short or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= size else {}
        data = 8 + length
        tensors = {
            name: TensorInfo(
                entry["dtype"],
                tuple(entry["shape"]),
                data + entry["data_offsets"][0],
                data + entry["data_offsets"][1],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
        for tensor in tensors.values():
            if 8 * (tensor.end - tensor.start) != DTYPE_BITS[tensor.dtype] * math.prod(tensor.shape):
                raise ValueError("a tensor's bytes do not fit its shape")
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing; convert or download the model again.") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}).") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BundleError(f"{path} is not a safetensors file; convert or download the model again.") from error
    end = max((tensor.end for tensor in tensors.values()), default=data)
    if size < end:
        raise BundleError(f"{path} is cut short ({size} of {end} bytes); convert or download the model again.")
    return tensors


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
    tensors = [(name, path, tensor) for path in files for name, tensor in read_header(path).items()]
    return sorted(tensors, key=lambda entry: entry[0])
