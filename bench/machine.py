"""What the benchmark ran on: its name, and its two ceilings as measured."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import mlx.core as mx


def describe_machine() -> dict[str, Any]:
    """Return chip, cores, memory, system and library versions."""
    return {
        "chip": chip_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": mx.default_device().type.name,
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "kvp_mlx": version("kvp-mlx"),
    }


def chip_name() -> str:
    """Return the processor's marketing name, or what the platform says instead."""
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def matmul_flops_per_s(dtype: mx.Dtype, rows: int = 1024, width: int = 2048) -> float:
    """Measure the rate of a (rows, width) x (width, width) matmul, FLOP/s."""
    a, b = (mx.random.normal((size, width)).astype(dtype) for size in (rows, width))
    return 2.0 * rows * width * width / best_time(lambda: a @ b.T)


def copy_bytes_per_s(size: int = 2**27) -> float:
    """Measure the bandwidth of an elementwise pass, bytes read and written per second."""
    x = mx.zeros((size // 4,), dtype=mx.float32)
    return 2.0 * size / best_time(lambda: x + 1)


def best_time(work: Callable[[], mx.array], rounds: int = 5) -> float:
    """Return the shortest of ``rounds`` evaluations in seconds, after one that is not counted."""
    mx.eval(work())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        mx.eval(work())
        times.append(time.perf_counter() - start)
    return min(times)
