"""A prompt in chunks, and the parts of a chunk side by side on CPU.

mlx's CPU backend runs each stream on one thread, and only matmuls use more: with one stream, softmax and activations
(40 % of a prefill, measured) leave all cores but one idle. Two parts of a prompt are independent but for the later
one's attention to the earlier one, which mlx's own dependencies between streams take care of. GPUs need none of this.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx_lm.generate import DEFAULT_PREFILL_STEP_SIZE, generation_stream

from .blas import one_blas_thread, openblas_threads
from .hosts import is_launched

MAX_STREAMS = 4
MIN_ROWS = 32
"""Rows (batch times tokens) below which a part's matmuls become slow."""
MAX_FREED_BYTES = 2**28
"""Freed memory to keep for the next chunk."""


def default_step_size() -> int:
    """Return the chunk length that suits the device.

    GPUs take mlx-lm's default. mlx computes the whole score matrix on CPU and masks it afterwards, so there
    short chunks save up to half of attention.
    """
    return 256 if mx.default_device().type == mx.DeviceType.cpu else DEFAULT_PREFILL_STEP_SIZE


def release_buffers() -> None:
    """Give freed buffers back once they pile up; below that, the next chunk runs faster on them."""
    if mx.get_cache_memory() > MAX_FREED_BYTES:
        mx.clear_cache()


def chunks(ids: mx.array, size: int | None) -> Iterator[tuple[mx.array, int]]:
    """Cut ``ids`` (B, T) along T; yields each chunk with the number of tokens up to its end."""
    size = size or default_step_size()
    for start in range(0, ids.shape[1], size):
        chunk = ids[:, start : start + size]
        yield chunk, start + chunk.shape[1]


@functools.cache
def _streams(count: int) -> list[Any]:
    more = [mx.new_thread_local_stream(mx.cpu) for _ in range(count - 1)]
    return [generation_stream, *more]


@contextmanager
def side_by_side(rows: int) -> Iterator[list[Any]]:
    """Yield the streams to spread the parts of a chunk over; meanwhile each stream's matmuls keep to one core.

    Args:
        rows: what is going to be read (batch times tokens); too few for two parts go on one stream, with all cores. So
            do all with ``mlx.launch``, since hosts must exchange their sums in one order.
    """
    is_cut = mx.default_device().type == mx.DeviceType.cpu and not is_launched()
    count = min(MAX_STREAMS, openblas_threads(), rows // MIN_ROWS) if is_cut else 1
    if count < 2:
        yield [generation_stream]
        return
    with one_blas_thread():
        yield _streams(count)


def parts(chunk: mx.array, streams: list[Any]) -> list[tuple[Any, mx.array]]:
    """Cut a chunk (B, T) along T into at most one part per stream, none of them too small."""
    batch, length = chunk.shape[:2]
    count = max(1, min(len(streams), batch * length // MIN_ROWS, length))
    size = -(-length // count)
    starts = range(0, length, size)
    return [(stream, chunk[:, start : start + size]) for stream, start in zip(streams, starts, strict=False)]
