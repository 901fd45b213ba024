"""RoPE scaling of GGUF files, as mlx-lm's ``rope_scaling``; what mlx-lm has no exact form of is refused by name."""

import math
from typing import Any

import numpy as np

from ..errors import InputError
from .gguf_file import GGUFFile, shown
from .gguf_tensors import read_dense

LLAMA3, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTOR_TENSORS = (LLAMA3, LONG, SHORT)
TOLERANCE = 1e-4
"""Of frequencies, relative; llama.cpp's converter computes in fp32."""
PUBLISHED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every Llama 3.1, 3.2 and 3.3."""


def rope_scaling(
    file: GGUFFile, architecture: str, forms: tuple[str, ...], dimensions: int, theta: float, window: int
) -> dict[str, Any] | None:
    """Return mlx-lm's ``rope_scaling``, or None where the model has none.

    Args:
        file: the GGUF file.
        architecture: its metadata's prefix.
        forms: of scaling that mlx-lm's model file of this architecture knows.
        dimensions: features of a head that are turned.
        theta: RoPE's base.
        window: context length.

    Raises:
        InputError: a scaling that mlx-lm cannot do exactly, named.
    """
    named = {name: read_dense(file.tensors[name]) for name in FACTOR_TENSORS if name in file.tensors}
    kind = _kind(file, architecture, set(named))
    if kind == "none":
        return None
    if kind not in forms:
        raise InputError(f"{file.path}: mlx-lm has no {kind} RoPE scaling for {architecture} models.")
    for name, factors in named.items():
        if factors.shape != (dimensions // 2,) or not (np.isfinite(factors) & (factors > 0)).all():
            raise InputError(f"{file.path}: {name} does not hold {dimensions // 2} RoPE factors; download it again.")
    if kind == "longrope":
        return _longrope(file, architecture, named, window)
    _require_plain(file, f"{architecture}.rope.scaling.attn_factor", 1.0)
    if kind == "llama3":
        return _llama3(file, named[LLAMA3], dimensions, theta)
    factor = _factor(file, architecture)
    return {"rope_type": "linear", "factor": factor} if kind == "linear" else _yarn(file, architecture, factor, window)


def _kind(file: GGUFFile, architecture: str, tensors: set[str]) -> str:
    """Return ``none``, ``linear``, ``yarn``, ``longrope`` or ``llama3``; a factor without a type means linear."""
    key = f"{architecture}.rope.scaling.type"
    stated = file.text(key, "linear")
    if stated not in ("none", "linear", "yarn", "longrope"):
        raise InputError(f"{file.path}: {key} is {shown(stated)}, which is not known here.")
    if LLAMA3 in tensors:
        if stated in ("yarn", "longrope") or (stated == "linear" and _factor(file, architecture) != 1):
            raise InputError(f"{file.path} has both {LLAMA3} and {key} {stated}; mlx-lm has no such RoPE.")
        return "llama3"
    if tensors or stated == "longrope":
        if tensors != {LONG, SHORT}:
            raise InputError(f"{file.path} has not both {LONG} and {SHORT}, which its RoPE scaling needs.")
        return "longrope"
    return "none" if _factor(file, architecture) == 1 else stated


def _factor(file: GGUFFile, architecture: str) -> float:
    """Return by what positions are stretched; 0 stands for none, and old files have another key."""
    old = file.number(f"{architecture}.rope.scale_linear", 1.0)
    return file.number(f"{architecture}.rope.scaling.factor", old) or 1.0


def _require_plain(file: GGUFFile, key: str, value: float) -> None:
    if file.number(key, value) != value:
        raise InputError(f"{file.path}: mlx-lm has no RoPE with {key} = {file.number(key)}.")


def _yarn(file: GGUFFile, architecture: str, factor: float, window: int) -> dict[str, Any]:
    prefix = f"{architecture}.rope.scaling"
    _require_plain(file, f"{prefix}.yarn_ext_factor", 1.0)
    _require_plain(file, f"{prefix}.yarn_attn_factor", 1.0)
    _require_plain(file, f"{prefix}.yarn_log_multiplier", 0.0)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": file.integer(f"{prefix}.original_context_length", window),
        "beta_fast": file.number(f"{prefix}.yarn_beta_fast", 32.0),
        "beta_slow": file.number(f"{prefix}.yarn_beta_slow", 1.0),
    }


def _longrope(file: GGUFFile, architecture: str, factors: dict[str, np.ndarray], window: int) -> dict[str, Any]:
    """Phi-3's; mlx-lm derives the attention factor from both lengths and uses the long factors throughout."""
    original = file.integer(f"{architecture}.rope.scaling.original_context_length", least=2)
    derived = math.sqrt(1 + math.log(window / original) / math.log(original)) if window > original else 1.0
    key = f"{architecture}.rope.scaling.attn_factor"
    if abs(file.number(key, 1.0) - derived) > TOLERANCE * derived:
        raise InputError(f"{file.path}: mlx-lm has no RoPE with {key} = {file.number(key, 1.0)} (only {derived:.6g}).")
    return {"type": "longrope", "long_factor": factors[LONG].tolist(), "short_factor": factors[SHORT].tolist()}


def _llama3(file: GGUFFile, factors: np.ndarray, dimensions: int, theta: float) -> dict[str, Any]:
    """Find the parameters that a table of factors was made from.

    The published ones are tried first. Otherwise: slow pairs have the whole factor, fast ones none, and between them
    the share ``s`` that is not scaled is linear in 1 / wavelength; any line through the table's points does.
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, dimensions, 2) / dimensions)
    factor = float(factors.max())
    with np.errstate(all="ignore"):
        for parameters in (PUBLISHED, _fitted(factors.astype(np.float64), wavelengths, factor)):
            scaling = {"rope_type": "llama3", "factor": factor, **(parameters or PUBLISHED)}
            if factor > 1 and np.allclose(llama3_factors(scaling, wavelengths), factors, rtol=TOLERANCE, atol=0):
                return scaling
    raise InputError(f"{file.path}: {LLAMA3} holds other factors than Llama 3's RoPE scaling, and mlx-lm has no other.")


def llama3_factors(scaling: dict[str, Any], wavelengths: np.ndarray) -> np.ndarray:
    """Return by what Llama 3's scaling divides each frequency (as in transformers and llama.cpp)."""
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    share = np.clip((scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - share) / factor + share)


def _fitted(factors: np.ndarray, wavelengths: np.ndarray, factor: float) -> dict[str, Any] | None:
    between = (factors > 1 + TOLERANCE) & (factors < factor * (1 - TOLERANCE))
    if not between.any():
        return None
    share = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    original = PUBLISHED["original_max_position_embeddings"]
    if between.sum() == 1:  # one point: keep the published factors, move the length
        return {**PUBLISHED, "original_max_position_embeddings": (3 * share[0] + 1) * wavelengths[between][0]}
    slope, intercept = np.polyfit(1 / wavelengths[between], share, 1)
    if not slope > 0:
        return None
    low = -intercept * original / slope
    return {**PUBLISHED, "low_freq_factor": float(low), "high_freq_factor": float(low + original / slope)}
