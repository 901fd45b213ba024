"""This machine: its name, cores, memory and versions, and its two ceilings as measured."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import __version__

MAX_SECONDS = 1.0


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
        "kvp_mlx": __version__,
        "commit": commit(),
        **(mac_details() if platform.system() == "Darwin" else {}),
    }


def commit() -> str | None:
    """Return the checkout's commit, with a + where it has changes; None for an installed package."""
    place = ["git", "-C", str(Path(__file__).parent)]
    is_ours = _output([*place, "ls-files", Path(__file__).name])  # not a repository that we are installed in
    found = is_ours and _output([*place, "rev-parse", "--short", "HEAD"])
    return found + ("+" if _output([*place, "status", "--porcelain", "-uno"]) else "") if found else None


def mac_details() -> dict[str, Any]:
    """Return performance and efficiency cores, power mode and thermal state of a Mac, as its tools say them."""
    return {
        "performance_cores": _output(["sysctl", "-n", "hw.perflevel0.physicalcpu"]),
        "efficiency_cores": _output(["sysctl", "-n", "hw.perflevel1.physicalcpu"]),
        "power": _output(["pmset", "-g", "ps"]).split("\n")[0],
        "power_mode": next((line.split()[-1] for line in _output(["pmset", "-g"]).split("\n") if "mode" in line), ""),
        "thermal": _output(["pmset", "-g", "therm"]),
    }


def _output(command: list[str]) -> str:
    """Return what a command prints, nothing where it fails or is absent."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def chip_name() -> str:
    """Return the processor's marketing name, or what the platform says instead."""
    if platform.system() == "Darwin":
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def free_bytes() -> int | None:
    """Return the memory that a new allocation can have without swapping; None where the system does not say."""
    if mx.default_device().type == mx.DeviceType.gpu:
        limit = mx.device_info().get("max_recommended_working_set_size")
        return None if limit is None else int(limit) - mx.get_active_memory()
    if sys.platform == "linux":
        with open("/proc/meminfo", encoding="utf-8") as file:
            fields = dict(line.split(":", 1) for line in file)
        return 1024 * int(fields["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - mx.get_active_memory()


def matmul_flops_per_s(dtype: mx.Dtype, rows: int = 1024, width: int = 2048) -> float:
    """Measure the rate of a (rows, width) x (width, width) matmul, FLOP/s; of fewer rows where that takes too long."""
    few = min(rows, 32)
    a, b = (mx.random.normal((size, width)).astype(dtype) for size in (rows, width))
    rate = 2.0 * few * width * width / best_time(lambda: a[:few] @ b.T, rounds=1)
    work = 2.0 * rows * width * width
    return rate if work / rate > MAX_SECONDS else work / best_time(lambda: a @ b.T)


def copy_bytes_per_s(size: int = 2**27) -> float:
    """Measure the bandwidth of a copy, bytes read and written per second.

    On CPU by NumPy into memory that is there already: mlx would ask the system for new pages every time, which
    takes several times longer than the copy.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
        return 2.0 * size / best_seconds(lambda: np.copyto(target, source))
    x = mx.zeros((size // 4,), dtype=mx.float32)
    return 2.0 * size / best_time(lambda: x + 1)


def best_time(work: Callable[[], mx.array], rounds: int = 5) -> float:
    """Return the shortest of ``rounds`` evaluations in seconds, after one that is not counted."""
    return best_seconds(lambda: mx.eval(work()), rounds)


def best_seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """Return the shortest of ``rounds`` calls in seconds, after one that is not counted."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
