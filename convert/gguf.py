"""GGUF files as ordinary mlx-lm model directories.

Read by ``gguf_file``, understood by ``gguf_config``, ``gguf_rope`` and ``gguf_tokenizer``, decoded by ``gguf_tensors``.
llama.cpp stores the query and key rows of its llama architecture interleaved for its own RoPE; mlx-lm's half-split RoPE
wants them back in order.
"""

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..files import write_json
from .gguf_config import architecture_of, mlx_name, model_config
from .gguf_file import PLAIN, GGUFFile, GGUFTensor, read_gguf
from .gguf_tensors import (
    GROUP_SIZE,
    KEPT_BITS,
    PARTS,
    half_split_rows,
    read_blocks,
    read_dense,
    to_mlx,
)
from .gguf_tokenizer import build_tokenizer, write_tokenizer
from .output import NO_PROGRESS, Precision, Progress, finish_model, output_directory, rewrite_model, write_weights
from .tokenizer import copy_tokenizer
from .tokenizer import write_tokenizer as write_any_tokenizer


def convert_gguf_file(
    source: Path,
    out: Path,
    precision: Precision,
    *,
    tokenizer: str | None = None,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Write a GGUF file as an mlx-lm model directory.

    Args:
        source: the ``.gguf`` file, or any part of a split one.
        out: directory to write.
        precision: dtype and quantisation of the output; default: see ``plan_tensors``.
        tokenizer: Llama ``tokenizer.model``, directory or Hub id; default: the file's own.
        force: replace an existing model directory.
        progress: called with (MB done, MB to do), for each stage.

    Returns:
        What was written: ``out``, ``model``, source, parameters, ``bits_per_weight``, ``size_bytes``, ...

    Raises:
        InputError: an unusable source or output.
        KVPError: the output cannot be written.
    """
    model = open_model(source, own_tokenizer=tokenizer is None)
    parts = model.file.parts
    if precision.q_bits is not None and quantization_of(plan_tensors(model.file, model.config, np.float16)):
        raise InputError(f"{source} is already quantised to blocks that mlx computes with; leave out --q-bits.")
    with output_directory(out, force, parts, marker="config.json") as work:
        if tokenizer is not None:
            write_any_tokenizer(tokenizer, work)
        plain = work if precision == Precision() else work / ".plain"
        plain.mkdir(exist_ok=True)
        # through fp32 where another dtype than fp16 is wanted, whose limits are its own
        write_model(model, plain, np.float16 if precision.dtype in (None, "float16") else np.float32, progress)
        if plain != work:
            rewrite_model(plain, work, precision, progress)
            copy_tokenizer(plain, work)
            shutil.rmtree(plain)
        return finish_model(work, out, model.config["model_type"], source, str(source), parts)


def convert_gguf(source: Path, out: Path, *, own_tokenizer: bool = True, progress: Progress = NO_PROGRESS) -> None:
    """Write the mlx-lm model directory of a GGUF file into the existing directory ``out``.

    Args:
        source: the ``.gguf`` file, or any part of a split one.
        out: directory that receives config.json, ``model*.safetensors`` and the tokeniser's files.
        own_tokenizer: take the file's own tokeniser over.
        progress: called with (MB done, MB to do).

    Raises:
        InputError: not a whole GGUF file, or of a model, type or tokeniser that cannot be carried over.
    """
    write_model(open_model(source, own_tokenizer=own_tokenizer), out, np.float16, progress)


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file that is known to be convertible.

    Attributes:
        file: its headers.
        config: config.json, without quantisation.
        tokenizer: its tokeniser and tokenizer_config.json, if wanted.
    """

    file: GGUFFile
    config: dict[str, Any]
    tokenizer: tuple[Any, dict[str, Any]] | None


def open_model(source: Path, *, own_tokenizer: bool = True) -> GGUFModel:
    """Read all of a GGUF file but the weights, and check it.

    Raises:
        InputError: it cannot be converted.
    """
    file = read_gguf(source)
    config = model_config(file)
    tokenizer = build_tokenizer(file, config["max_position_embeddings"]) if own_tokenizer else None
    return GGUFModel(file, config, tokenizer)


def write_model(model: GGUFModel, out: Path, dense: type, progress: Progress) -> None:
    """Write an mlx-lm model directory, reading one tensor at a time.

    Args:
        model: what ``open_model`` found.
        out: existing directory.
        dense: dtype of what is dequantised.
        progress: called with (MB done, MB to do).
    """
    plan, config = plan_tensors(model.file, model.config, dense), dict(model.config)
    if quantization := quantization_of(plan):
        config["quantization"] = config["quantization_config"] = quantization
    write_weights({name: array.nbytes for name, array in plan.items()}, lambda names: read(plan, names), out, progress)
    write_json(out / "config.json", config)
    if model.tokenizer is not None:
        write_tokenizer(model.tokenizer, out)


@dataclass(frozen=True)
class PlannedArray:
    """One array of the output.

    Attributes:
        tensor: where its numbers come from.
        part: weight, scales or biases of a matrix whose blocks are kept; None: the numbers themselves.
        dtype: of the numbers themselves.
        heads: whose rows are put back in order; 0: rows stay where they are.
        above: by how much the file's numbers are too large.
    """

    tensor: GGUFTensor
    part: str | None
    dtype: type
    heads: int
    above: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        if self.part is None:
            return self.tensor.size * np.dtype(self.dtype).itemsize
        if self.part == "weight":
            return self.tensor.size * KEPT_BITS[self.tensor.kind] // 8
        return self.tensor.size // GROUP_SIZE * 2


def plan_tensors(file: GGUFFile, config: dict[str, Any], dense: type) -> dict[str, PlannedArray]:
    """Return all arrays of the output by mlx-lm's names.

    Matrices of F32 and F16 stay what they are in a file that has nothing else. Where most of the matrices' numbers are
    Q4_0, Q4_1 or Q8_0, such matrices stay as they are, bit for bit. Everything else is dequantised to ``dense``. Norms
    beside fp16 become fp16: from fp32 ones every activation would be fp32 on a GPU.
    """
    _, architecture = architecture_of(file)
    kinds = Counter[str]()
    for tensor in file.tensors.values():
        kinds[tensor.kind] += tensor.size * (len(tensor.shape) > 1)
    is_plain = all(kind in PLAIN for kind in kinds)
    keeps_blocks = 2 * sum(kinds[kind] for kind in KEPT_BITS) > kinds.total()
    plan: dict[str, PlannedArray] = {}
    for name, tensor in file.tensors.items():
        place = mlx_name(name, architecture)
        if place is None:  # a table of RoPE factors, which is in the config
            continue
        heads = 0
        if architecture.interleaved and name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config["num_attention_heads" if "attn_q" in name else "num_key_value_heads"]
        if keeps_blocks and tensor.kind in KEPT_BITS and len(tensor.shape) > 1:
            module = place[0].removesuffix("weight")
            plan |= {f"{module}{part}": PlannedArray(tensor, part, np.float16, heads) for part in PARTS}
            continue
        dtype = np.float16 if keeps_blocks else dense
        if is_plain:
            dtype = PLAIN[tensor.kind] if len(tensor.shape) > 1 or not kinds["F16"] else np.float16
        above = architecture.norms_above if name.endswith("norm.weight") else 0.0
        plan[place[0]] = PlannedArray(tensor, None, dtype, heads, above)
    return plan


def read(plan: dict[str, PlannedArray], names: list[str]) -> Iterator[tuple[str, mx.array]]:
    """Yield arrays of a plan; those of one matrix are decoded together."""
    blocks: dict[str, np.ndarray] = {}
    decoded: GGUFTensor | None = None
    for name in names:
        wanted = plan[name]
        if wanted.part is None:
            array = read_dense(wanted.tensor, wanted.dtype, above=wanted.above)
        else:
            if decoded is not wanted.tensor:
                blocks, decoded = read_blocks(wanted.tensor), wanted.tensor
            array = blocks[wanted.part]
        yield name, to_mlx(half_split_rows(array, wanted.heads) if wanted.heads else array)


def quantization_of(plan: dict[str, PlannedArray]) -> dict[str, Any] | None:
    """Return mlx-lm's ``quantization`` entry: the commonest scheme, then every module that differs from it."""
    bits_of = {
        name.removesuffix(".weight"): KEPT_BITS[array.tensor.kind]
        for name, array in plan.items()
        if array.part == "weight"
    }
    if not bits_of:
        return None
    common = max(set(bits_of.values()), key=list(bits_of.values()).count)
    others = {module: {"group_size": GROUP_SIZE, "bits": bits} for module, bits in bits_of.items() if bits != common}
    return {"group_size": GROUP_SIZE, "bits": common, **others}
