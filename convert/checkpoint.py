"""PyTorch checkpoints: names, shapes and numbers, without running what they contain.

The only place that reads pickles: ``torch.load(weights_only=True)``, memory-mapped, so that a tensor's numbers are
read from disk when they are asked for.
"""

import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import InputError

Shapes = dict[str, tuple[int, ...]]

WRAPPERS = ("model_state_dict", "ema_model_state_dict")  # the first that is there is read
PREFIX = "module."
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, by name (``module.`` removed).

    Attributes:
        path: the file.
        shapes: of every tensor.
        dtype: the tensors' common dtype; float32 where they differ.
    """

    path: Path
    shapes: Shapes
    dtype: str

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, mx.array]]:
        """Yield some tensors, as stored.

        The file is mapped anew each time, so that memory which earlier reads mapped is given back.
        """
        tensors = load_state_dict(self.path)
        for name in names:
            yield name, _to_mlx(tensors[name])


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's names and shapes; no numbers are read.

    Raises:
        InputError: not a whole PyTorch file, one that holds code, no state dict, or a tensor of an unusable kind.
    """
    records = _checked_records(path)
    tensors = load_state_dict(path)
    size = path.stat().st_size
    for name, tensor in tensors.items():
        _check_tensor(f"{path}: {name}", tensor, size)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors.values())}
    if Counter(storages.values()) - Counter(records):  # mapped memory would read on into the neighbours
        raise InputError(f"{path} is damaged: it holds fewer numbers than it says; copy or save it again.")
    dtypes = {_dtype(tensor) for tensor in tensors.values()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Checkpoint(path, shapes, dtypes.pop() if len(dtypes) == 1 else "float32")


def _checked_records(path: Path) -> list[int]:
    """Return the sizes of a zip file's members, after checking their checksums, which mapped reading passes over."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; name a PyTorch checkpoint.")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
            damaged = None if packed else archive.testzip()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # zipfile raises more than BadZipFile on damaged files
        raise InputError(
            f"{path} is not a whole PyTorch zip file (cut short, damaged, or saved before PyTorch 1.6); copy it "
            "again or save it again with torch.save."
        ) from error
    if packed or damaged:
        reason = "it is compressed" if packed else f"the checksum of {damaged} is wrong"
        raise InputError(f"{path} is damaged ({reason}); copy or save it again.")
    return [member.file_size for member in members]


def load_state_dict(path: Path) -> dict[str, Any]:
    """Return PyTorch's tensors by name, memory-mapped; ``open_checkpoint`` tells whether they can be trusted.

    Raises:
        InputError: not a whole PyTorch file, one that holds code, or no state dict.
    """
    tensors = _load(path)
    if isinstance(tensors, dict):
        wrapped = [tensors[name] for name in WRAPPERS if isinstance(tensors.get(name), dict)]
        tensors = wrapped[0] if wrapped else tensors
    if not isinstance(tensors, dict) or not tensors:
        raise InputError(f"{path} holds no state dict; save the model's state_dict() and convert that.")
    bare: dict[str, Any] = {}
    for name, tensor in tensors.items():
        short = str(name).removeprefix(PREFIX)
        if short in bare:
            raise InputError(f"{path} holds {short} twice, with and without '{PREFIX}'; remove one of them.")
        bare[short] = tensor
    return bare


def _load(path: Path) -> Any:
    torch = _torch()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"the Python object {found[1]}" if found else "Python objects"
        raise InputError(
            f"{path} holds {what}, which is not loaded since it could run code; save the state_dict() alone."
        ) from error
    except Exception as error:  # whatever PyTorch raises on a damaged file
        raise InputError(f"{path} is not a whole PyTorch checkpoint; copy or save it again.") from error


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise InputError("PyTorch checkpoints need torch; run 'pip install kvp-mlx[torch]'.") from error
    return torch


def _check_tensor(where: str, tensor: Any, file_size: int) -> None:
    """Refuse what is not a plain array of numbers that the file really holds."""
    torch = _torch()
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{where} is a {type(tensor).__name__}, not a tensor; save the state_dict() alone.")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise InputError(f"{where} is not a plain tensor; save the model's dense weights.")
    if _dtype(tensor) not in DTYPES:
        raise InputError(f"{where} is {_dtype(tensor)}, not one of {', '.join(DTYPES)}.")
    if not 0 < tensor.nbytes <= file_size:
        raise InputError(f"{where} has shape {tuple(tensor.shape)}, which the file does not hold; save it again.")


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _to_mlx(tensor: Any) -> mx.array:
    torch = _torch()
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy has none: hand over the bits
        return mx.array(tensor.contiguous().view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())
