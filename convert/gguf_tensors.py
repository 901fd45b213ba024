"""GGUF tensors as arrays: blocks that mlx computes with stay bit for bit, all others are dequantised."""

from typing import Any

import mlx.core as mx
import numpy as np

from .gguf_file import PLAIN, GGUFTensor

KEPT_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
GROUP_SIZE = 32
"""Numbers in a block of these types: mlx's affine quantisation with groups of that size."""
PARTS = ("weight", "scales", "biases")


def read_dense(tensor: GGUFTensor, dtype: type = np.float32, *, above: float = 0.0) -> np.ndarray:
    """Return a tensor's numbers less ``above``; what is too large for ``dtype`` becomes infinite."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    stored = PLAIN.get(tensor.kind)
    out: np.ndarray = np.empty((tensor.size // tensor.shape[-1], tensor.shape[-1]), dtype)
    done = 0
    with np.errstate(all="ignore"):
        for rows in tensor.rows():
            numbers = rows.view(stored) if stored else dequantize(rows, GGMLQuantizationType[tensor.kind])
            out[done : done + len(numbers)] = numbers - np.float32(above) if above else numbers
            done += len(numbers)
    return out.reshape(tensor.shape)


def read_blocks(tensor: GGUFTensor) -> dict[str, np.ndarray]:
    """Return matrices of ``KEPT_BITS`` as mlx has them: packed numbers, scales and biases, row by row.

    A block is a scale ``d`` (and a minimum ``m``) in fp16, then the numbers: Q4_0 is ``d * (q - 8)``, Q4_1 is
    ``d * q + m``, Q8_0 is ``d * q`` with signed ``q``. The first half of a block's 4-bit numbers lies in the low halves
    of its bytes, the second half in the high ones; mlx wants neighbours side by side.
    """
    blocks = np.concatenate(list(tensor.rows())).reshape(-1, tensor.block_bytes)
    bits, rows = KEPT_BITS[tensor.kind], tensor.shape[:-1]
    fields = tensor.block_bytes - GROUP_SIZE * bits // 8
    scales, numbers = blocks[:, :2].copy().view(np.float16), blocks[:, fields:]
    with np.errstate(all="ignore"):
        if tensor.kind == "Q4_1":
            biases = blocks[:, 2:4].copy().view(np.float16)
        else:
            biases = scales * np.float16(-(2 ** (bits - 1)))
    if bits == 8:
        packed = numbers ^ 0x80
    else:
        halves = np.concatenate([numbers & 0x0F, numbers >> 4], axis=1)  # (N, 16) -> (N, 32)
        packed = halves[:, 0::2] | halves[:, 1::2] << 4  # -> (N, 16)
    arrays: tuple[np.ndarray, ...] = (np.ascontiguousarray(packed).view(np.uint32), scales, biases)
    return {part: array.reshape(*rows, -1) for part, array in zip(PARTS, arrays, strict=True)}


def half_split_rows(array: Any, heads: int) -> Any:
    """Reorder each head's rows from interleaved pairs (0, d/2, 1, d/2+1, ...) to halves.

    Works on weights and on their scales and biases alike, since only whole rows move.
    """
    rows, width = array.shape
    pairs = array.reshape(heads, rows // heads // 2, 2, width)  # (H, D/2, 2, W)
    return pairs.swapaxes(1, 2).reshape(rows, width)  # (H, 2, D/2, W) -> (H*D, W)


def to_mlx(array: np.ndarray) -> mx.array:
    """Return the same numbers as an mlx array."""
    return mx.array(np.ascontiguousarray(array))
