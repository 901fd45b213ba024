"""What every converter writes: model directories in pieces, of the wanted precision, whole or not at all."""

import contextlib
import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import compute_bits_per_weight, get_total_parameters, quantize_model, save_config

from ..errors import InputError, KVPError
from ..files import write_json
from ..files.directories import atomic_directory, require_free
from ..models.loading import MEGABYTE, load_model
from ..models.safetensors import fingerprint, write_tensors
from .card import describe_source, write_card
from .tokenizer import check_tokenizer

Progress = Callable[[int, int], None]
Reader = Callable[[list[str]], Iterable[tuple[str, mx.array]]]

SHARD_BYTES = 2**30
Q_BITS = (4, 8)
Q_GROUP_SIZES = (32, 64, 128)
TEXT_PREFIX = "language_model."
"""Of weights in models that have other parts beside the language model, which is all that ``load_model`` returns."""


def NO_PROGRESS(done: int, total: int) -> None:  # noqa: N802 - a constant that can be called
    """Tell nobody."""


@dataclass(frozen=True)
class Precision:
    """Of the output: ``dtype`` (default: as stored) and mlx-lm's affine quantisation (default: none)."""

    dtype: str | None = None
    q_bits: int | None = None
    q_group_size: int | None = None

    def __post_init__(self) -> None:
        """Check the options against each other."""
        if self.q_bits not in (None, *Q_BITS):
            raise InputError(f"--q-bits must be 4 or 8, not {self.q_bits}.")
        if self.q_group_size not in (None, *Q_GROUP_SIZES):
            raise InputError(f"--q-group-size must be 32, 64 or 128, not {self.q_group_size}.")
        if self.q_group_size is not None and self.q_bits is None:
            raise InputError("--q-group-size belongs to --q-bits; give both.")

    @property
    def group_size(self) -> int:
        """Numbers that share one scale."""
        return self.q_group_size or 64


@contextlib.contextmanager
def output_directory(out: Path, force: bool, sources: Iterable[Path], *, marker: str) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``out`` when the block ends without an error.

    Raises:
        InputError: ``out`` is taken or overlaps a source (see ``files.directories.require_free``).
        KVPError: the machine failed to write.
    """
    require_free(out, force, sources=sources, marker=marker)
    with atomic_directory(out) as work:
        try:
            yield work
        except OSError as error:
            raise KVPError(
                f"cannot write {out} ({error.strerror or error}); make room or choose another --out."
            ) from error


def write_weights(sizes: dict[str, int], read: Reader, out: Path, progress: Progress) -> None:
    """Write tensors as ``model*.safetensors``, holding no more than one file's worth in memory.

    Args:
        sizes: bytes of each tensor to be read, by the name that ``read`` knows it by.
        read: yields (name to write, array) for the names it is given, in order.
        out: existing directory.
        progress: called with (MB done, MB to do): half of it is done when it has been read, half when written.

    Raises:
        InputError: a tensor with NaN or infinity.
        KVPError: the file cannot be written.
    """
    shards, done, total = plan_shards(sizes), 0, 2 * sum(sizes.values())
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        arrays = {}
        for stored, (name, array) in zip(names, read(names), strict=True):
            check_finite(stored, array)
            arrays[name], done = array, done + sizes[stored]
            progress(done // (2 * MEGABYTE), total // (2 * MEGABYTE))
        write_tensors(arrays, out / file)
        done += sum(sizes[name] for name in names)
        progress(done // (2 * MEGABYTE), total // (2 * MEGABYTE))
        files |= dict.fromkeys(arrays, file)
        mx.clear_cache()
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(files.items()))}
        write_json(out / "model.safetensors.index.json", index)


def plan_shards(sizes: dict[str, int]) -> list[list[str]]:
    """Cut tensors, in order, into files of at most ``SHARD_BYTES`` (or one larger tensor)."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def check_finite(name: str, array: mx.array) -> None:
    """Evaluate a tensor and refuse it if it holds NaN or infinity.

    Raises:
        InputError: it does.
    """
    if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
        dtype = str(array.dtype).removeprefix("mlx.core.")
        raise InputError(f"{name} holds NaN, infinity or numbers too large for {dtype}; it cannot be converted.")


@contextlib.contextmanager
def quantised_into(out: Path, precision: Precision, progress: Progress) -> Iterator[Path]:
    """Yield where to write a plain model directory: ``out``, or a place from which it is quantised into ``out``."""
    if precision.q_bits is None:
        yield out
        return
    plain = out / ".plain"
    plain.mkdir()
    yield plain
    rewrite_model(plain, out, precision, progress)
    shutil.rmtree(plain)


def rewrite_model(source: Path, out: Path, precision: Precision, progress: Progress) -> None:
    """Write an mlx-lm or Hugging Face model directory anew: config.json and weights as mlx-lm understands them.

    Args:
        source: directory with config.json and ``model*.safetensors``.
        out: existing directory.
        precision: of the output.
        progress: called with (MB done, MB to do).

    Raises:
        InputError: a source that is damaged, unsupported, or already quantised where ``q_bits`` is asked for.
        KVPError: the output cannot be written.
    """
    model, config = load_model(source)
    if precision.dtype is not None:
        model.set_dtype(getattr(mx, precision.dtype))
    if precision.q_bits is not None:
        if "quantization" in config:
            raise InputError("the model is already quantised; leave out --q-bits.")
        _check_widths(model, precision.group_size)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints
                model, config = quantize_model(model, config, precision.group_size, precision.q_bits)
        except ValueError as error:  # some layers have groups of their own
            raise InputError(f"the model cannot be quantised: {error}") from error
    prefix = "" if model.model_type == config["model_type"] else TEXT_PREFIX
    weights = {f"{prefix}{name}": array for name, array in tree_flatten(model.parameters())}  # not yet read
    for key in ("quantization", "quantization_config"):
        if isinstance(config.get(key), dict) and prefix:
            scheme = config[key].items()
            config[key] = {f"{prefix}{k}" if "." in k or isinstance(v, dict) else k: v for k, v in scheme}
    del model
    write_weights(
        {name: array.nbytes for name, array in weights.items()},
        lambda names: ((name, weights.pop(name)) for name in names),
        out,
        progress,
    )
    config.pop("auto_map", None)  # names Python files that are not copied
    if precision.dtype is not None:
        config |= {key: precision.dtype for key in ("dtype", "torch_dtype") if key in config}
    save_config(config, out / "config.json")


def _check_widths(model: nn.Module, group_size: int) -> None:
    """Refuse groups that divide no matrix's width; where they divide some, mlx-lm leaves the others as they are.

    Raises:
        InputError: nothing would be quantised.
    """
    widths = [module.weight.shape[-1] for module in model.modules() if hasattr(module, "to_quantized")]
    if all(width % group_size for width in widths):
        raise InputError(f"no matrix has a width that groups of {group_size} divide; choose another --q-group-size.")


def finish_model(
    work: Path, out: Path, model: str, source: Path, name: str, files: Sequence[Path] = ()
) -> dict[str, Any]:
    """Check a model directory's tokeniser, if it has one, and write its model card.

    Args:
        work: the directory, with config.json, weights and tokeniser.
        out: where it will be.
        model: what it is, in words.
        source: file or directory that was converted.
        name: what the user called the source.
        files: all files of the source, where it has several.

    Returns:
        ``out``, ``model``, ``source``, ``source_sha256``, ``licence`` and what ``describe_model`` returns.

    Raises:
        InputError: an unusable tokeniser.
    """
    check_tokenizer(work)
    report = {"model": model, **describe_source(source, name, files), **describe_model(work)}
    write_card(work, out.name, report)
    return {"out": str(out), **report}


def describe_model(directory: Path) -> dict[str, Any]:
    """Return a model directory's sizes and fingerprint; no weights are read.

    Returns:
        ``dtype``, ``parameters``, ``tensors``, ``bits_per_weight``, ``size_bytes``, ``fingerprint``.
    """
    model, _ = load_model(directory)
    return {**describe_module(model), "fingerprint": fingerprint(directory)}


def describe_module(module: nn.Module) -> dict[str, Any]:
    """Return what a module's parameters take, as mlx-lm counts it."""
    arrays = [array for _, array in tree_flatten(module.parameters())]
    dtypes = {str(array.dtype).removeprefix("mlx.core.") for array in arrays} - {"uint32"}
    return {
        "dtype": "/".join(sorted(dtypes)),
        "parameters": get_total_parameters(module),
        "tensors": len(arrays),
        "bits_per_weight": round(compute_bits_per_weight(module), 3),
        "size_bytes": sum(array.nbytes for array in arrays),
    }
