"""OpenELM: CoreNet checkpoints and Hugging Face directories, as mlx-lm model directories.

Every dimension is read off the tensors' shapes, so the four published sizes, their layer-pruned forms and anyone's
own are one case.
"""

import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import openelm

from ..errors import InputError
from ..files import expanded, write_json
from ..models.openelm import CONTEXT_LENGTH, SIZES, openelm_config
from ..models.pruning import prune_config, retained_layers
from .checkpoint import Checkpoint, Shapes, open_checkpoint
from .hf import convert_hf
from .output import NO_PROGRESS, Precision, Progress, finish_model, output_directory, quantised_into, write_weights
from .tokenizer import write_tokenizer

PREFIX = "transformer."  # mlx-lm's and Hugging Face's, before CoreNet's names
EMBEDDING = "token_embeddings.weight"
LAYER = re.compile(r"layers\.(0|[1-9]\d{0,5})\.")
NAMED = 16  # tensors that an error names at most, of each kind of problem


def convert_openelm(
    source: str,
    out: Path,
    precision: Precision,
    *,
    tokenizer: str | None = None,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Write an OpenELM checkpoint as an mlx-lm model directory.

    Args:
        source: CoreNet ``.pt`` file, or Hugging Face directory or id.
        out: directory to write.
        precision: dtype and quantisation of the output.
        tokenizer: Llama ``tokenizer.model``, directory or Hub id; default: none, or the directory's own.
        force: replace an existing model directory.
        progress: called with (MB done, MB to do) for each stage.

    Returns:
        What was written: ``out``, ``model``, source, parameters, ``bits_per_weight``, ``size_bytes``, ...

    Raises:
        InputError: an unusable source or output.
        KVPError: the output cannot be written.
    """
    path = expanded(source)
    if not path.is_file():
        return convert_hf(
            source, out, precision, tokenizer=tokenizer, force=force, progress=progress, architecture="openelm"
        )
    with output_directory(out, force, [path], marker="config.json") as work:
        if tokenizer is not None:
            write_tokenizer(tokenizer, work)
        checkpoint = open_checkpoint(path)
        names = {name: name.removeprefix(PREFIX) for name in checkpoint.shapes}
        config = openelm_config_of({short: checkpoint.shapes[name] for name, short in names.items()}, str(path))
        write_openelm(checkpoint, names, config, work, precision, progress)
        return finish_model(work, out, model_name(config), path, source)


def write_openelm(
    checkpoint: Checkpoint,
    names: dict[str, str],
    config: dict[str, Any],
    out: Path,
    precision: Precision,
    progress: Progress,
) -> None:
    """Write the tensors of one OpenELM as an mlx-lm model directory.

    Args:
        checkpoint: where the numbers are.
        names: the checkpoint's name of each tensor, to CoreNet's.
        config: mlx-lm's config.json, see ``openelm_config_of``.
        out: existing directory.
        precision: of the output.
        progress: called with (MB done, MB to do).
    """
    dtype = precision.dtype or checkpoint.dtype
    if dtype == "float16" and config["model_dim"] >= SIZES["3b"].model_dim:
        warnings.warn("OpenELM-3B's activations overflow float16; use --dtype bfloat16.", stacklevel=1)

    def read(wanted: list[str]) -> Iterator[tuple[str, mx.array]]:
        for stored, array in checkpoint.read(wanted):
            yield PREFIX + names[stored], array.astype(getattr(mx, dtype))

    itemsize = getattr(mx, dtype).size
    sizes = {stored: itemsize * math.prod(checkpoint.shapes[stored]) for stored in names}
    with quantised_into(out, precision, progress) as plain:
        write_weights(sizes, read, plain, progress)
        write_json(plain / "config.json", config)


def openelm_config_of(shapes: Shapes, where: str) -> dict[str, Any]:
    """Return mlx-lm's config.json for tensors under CoreNet's names.

    Args:
        shapes: of every tensor of the model and of nothing else.
        where: what an error calls the model.

    Raises:
        InputError: a missing, unknown or ill-shaped tensor, named.
    """
    if any(name.startswith("base.") for name in shapes):
        raise InputError(f"{where} is a KV-prediction checkpoint; use 'kvp convert kvp'.")
    layers = max(1, len({match[1] for name in shapes if (match := LAYER.match(name))}))
    names = tensor_shapes(_config(1, 2, 2, [1] * layers, [1] * layers, [2] * layers))
    if problems := shape_problems(dict.fromkeys(shapes, ()), dict.fromkeys(names, ())):  # the names alone
        raise InputError(f"{where} is not an OpenELM: {problems}.")
    config = _derived_config(shapes, layers, where)
    if problems := shape_problems(shapes, tensor_shapes(config)):
        raise InputError(f"{where} is not an OpenELM: {problems}.")
    for layer, (heads, kv_heads) in enumerate(zip(config["num_query_heads"], config["num_kv_heads"], strict=True)):
        if heads % kv_heads:
            raise InputError(f"{where} is not an OpenELM: layer {layer} has {heads} query for {kv_heads} key heads.")
    return config


def shape_problems(found: Shapes, expected: Shapes) -> str:
    """Return what is wrong with the tensors found, by name; empty where nothing is."""
    wrong = [
        f"{name} is {_words(found[name])}, not {_words(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = {
        "it lacks ": sorted(expected.keys() - found.keys()),
        "it has no place for ": sorted(found.keys() - expected.keys()),
        "": wrong,
    }
    return "; ".join(f"{what}{listed(names)}" for what, names in problems.items() if names)


def listed(names: list[str]) -> str:
    """Join names for an error, which is one line and no book."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _derived_config(shapes: Shapes, layers: int, where: str) -> dict[str, Any]:
    """Derive what the fewest tensors tell; whether all others agree is for the caller to check."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if len(shapes[name]) != dimensions:
            raise InputError(f"{where} is not an OpenELM: {name} is {_words(shapes[name])}.")
        return shapes[name]

    vocab_size, model_dim = shape(EMBEDDING, 2)
    (head_dim,) = shape("layers.0.attn.q_norm.weight", 1)
    heads, kv_heads, widths = [], [], []
    for layer in range(layers):
        heads.append(max(1, shape(f"layers.{layer}.attn.out_proj.weight", 2)[1] // head_dim))
        rows = shape(f"layers.{layer}.attn.qkv_proj.weight", 2)[0] // head_dim
        kv_heads.append(max(1, (rows - heads[layer]) // 2))
        widths.append(shape(f"layers.{layer}.ffn.proj_2.weight", 2)[1])
    return _config(vocab_size, model_dim, head_dim, heads, kv_heads, widths)


def _config(
    vocab_size: int, model_dim: int, head_dim: int, heads: list[int], kv_heads: list[int], widths: list[int]
) -> dict[str, Any]:
    """Return mlx-lm's config.json; it takes FFN widths as multiples of the model's, rounded to a divisor."""
    return {
        "model_type": "openelm",
        "head_dim": head_dim,
        "num_transformer_layers": len(heads),
        "model_dim": model_dim,
        "vocab_size": vocab_size,
        "ffn_dim_divisor": math.gcd(*widths),
        "num_query_heads": heads,
        "num_kv_heads": kv_heads,
        "ffn_multipliers": [width / model_dim for width in widths],
        "max_context_length": CONTEXT_LENGTH,
    }


def tensor_shapes(config: dict[str, Any]) -> Shapes:
    """Return the shapes of mlx-lm's own model under CoreNet's names; nothing is computed."""
    model = openelm.Model(openelm.ModelArgs.from_dict(config))
    return {name.removeprefix(PREFIX): tuple(array.shape) for name, array in tree_flatten(model.parameters())}


def model_name(config: dict[str, Any]) -> str:
    """Return which published OpenELM, whole or layer-pruned, has these shapes; otherwise its size in words."""
    for size in SIZES:
        whole, name = openelm_config(size), f"OpenELM-{size.replace('_', '.').upper()}"
        if same_shapes(whole, config):
            return name
        depth = whole["num_transformer_layers"]
        for fraction in (0.75, 0.5, 0.25):
            pruned = prune_config(whole, retained_layers(depth, fraction))
            if same_shapes(pruned, config):
                return f"{name}, {pruned['num_transformer_layers']} of {depth} layers"
    return f"OpenELM, {config['num_transformer_layers']} layers, {config['model_dim']} wide"


def same_shapes(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return whether two configs describe the same tensors, the vocabulary (padded or not) aside."""
    quick = ("num_transformer_layers", "model_dim")
    if any(first[key] != second[key] for key in quick):
        return False
    return tensor_shapes(first) | {EMBEDDING: ()} == tensor_shapes(second) | {EMBEDDING: ()}


def _words(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) if shape else "a scalar"
