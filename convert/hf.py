"""Hugging Face and mlx-lm model directories: mlx-lm's own conversion, with our checks around it."""

from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json
from ..models.loading import model_directory
from .output import NO_PROGRESS, Precision, Progress, finish_model, output_directory, rewrite_model
from .tokenizer import copy_tokenizer, write_tokenizer


def convert_hf(
    source: str,
    out: Path,
    precision: Precision,
    *,
    directory: Path | None = None,
    tokenizer: str | None = None,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
    architecture: str | None = None,
) -> dict[str, Any]:
    """Write a model of a supported family as an mlx-lm model directory.

    Args:
        source: directory with safetensors weights, or Hub id.
        out: directory to write.
        precision: dtype and quantisation of the output.
        directory: where the source is, if the caller knows.
        tokenizer: Llama ``tokenizer.model``, directory or Hub id; default: the source's own.
        force: replace an existing model directory.
        progress: called with (MB done, MB to do).
        architecture: refuse any other.

    Returns:
        What was written: ``out``, ``model``, source, parameters, ``bits_per_weight``, ``size_bytes``, ...

    Raises:
        InputError: an unusable source or output.
        KVPError: the output cannot be written.
    """
    directory = directory or model_directory(source)
    with output_directory(out, force, [directory], marker="config.json") as work:
        if architecture is not None:
            _check_architecture(directory, architecture)
        if tokenizer is None:
            copy_tokenizer(directory, work)
        else:
            write_tokenizer(tokenizer, work)
        rewrite_model(directory, work, precision, progress)
        model = read_json(work / "config.json")["model_type"]
        return finish_model(work, out, model, directory, source)


def _check_architecture(directory: Path, wanted: str) -> None:
    try:
        found = read_json(directory / "config.json").get("model_type")
    except (InputError, OSError, AttributeError) as error:
        raise InputError(f"{directory} holds no readable config.json; name a model directory or a .pt file.") from error
    if found != wanted:
        raise InputError(f"{directory} is a {found} model, not {wanted}; use 'kvp convert hf'.")
