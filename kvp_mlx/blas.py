"""Puts a fast BLAS in front of mlx on Linux.

mlx's Linux wheel bundles the reference BLAS. Symbols of a library that is loaded globally before mlx win, so
loading OpenBLAS first makes fp32 matmuls about 30 times faster (README, "Where it runs").
"""

import ctypes
import sys

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
