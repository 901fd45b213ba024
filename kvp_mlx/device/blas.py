"""Puts a fast BLAS in front of mlx on Linux.

mlx's Linux wheel bundles the reference BLAS. Symbols of a library that is loaded globally before mlx win, so
loading OpenBLAS first makes fp32 matmuls about 30 times faster (docs/benchmarks.md).
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OPENBLAS = "libopenblas.so.0"
REMEDY = "apt-get install libopenblas0 (or your system's OpenBLAS package)"


def load_fast_blas() -> bool:
    """Load OpenBLAS ahead of the first ``import mlx.core``.

    Returns:
        True where nothing is left to wish for: OpenBLAS was loaded, or the platform brings its own fast BLAS.
        False on a Linux machine without OpenBLAS.
    """
    if sys.platform != "linux":
        return True
    try:
        ctypes.CDLL(OPENBLAS, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def openblas_threads() -> int:
    """Return how many threads OpenBLAS uses for one matmul; 1 where it is absent or another BLAS is at work."""
    library = _openblas()
    return 1 if library is None else int(library.openblas_get_num_threads())


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep OpenBLAS to one thread per matmul while the block runs."""
    library = _openblas()
    if library is None:
        yield
        return
    before = library.openblas_get_num_threads()
    library.openblas_set_num_threads(1)
    try:
        yield
    finally:
        library.openblas_set_num_threads(before)


def _openblas() -> ctypes.CDLL | None:
    """Return the library that ``load_fast_blas`` loaded, if it is there."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(OPENBLAS)
    except OSError:
        return None
