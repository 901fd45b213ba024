"""``kvp convert`` and ``kvp push``."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundle.config import read_config
from ..bundle.named import find_model
from ..convert.bundles.kvp import convert_kvp
from ..convert.bundles.verify import verify_conversion
from ..convert.gguf import convert_gguf_file
from ..convert.hf import convert_hf
from ..convert.openelm import convert_openelm
from ..convert.output import Precision
from ..errors import InputError
from ..files import expanded
from ..files.directories import directory_bytes
from ..models.hub import push_directory
from .options import Dtype, DtypeOption, Force, Json, OutDirectory, QBits
from .output import clean_stdout, print_json, progress_bar, progress_lines, say, show

QGroupSize = Annotated[int | None, typer.Option("--q-group-size", help="Numbers per scale: 32, 64 (default) or 128.")]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Llama tokenizer.model, or a directory or Hub id with a tokeniser.")
]
Upload = Annotated[str | None, typer.Option("--upload", help="Afterwards push to this Hub repository (owner/name).")]

app = typer.Typer()


@app.command("openelm")
def openelm(
    source: Annotated[str, typer.Argument(help="CoreNet .pt file, or Hugging Face OpenELM directory or id.")],
    out: OutDirectory,
    dtype: DtypeOption = None,
    q_bits: QBits = None,
    q_group_size: QGroupSize = None,
    tokenizer: Tokenizer = None,
    force: Force = False,
    upload: Upload = None,
    json: Json = False,
) -> None:
    """Convert an OpenELM model.

    Any size, whole or layer-pruned: the dimensions are read off the tensors.
    """
    precision = make_precision(dtype, q_bits, q_group_size)
    with clean_stdout(json), progress_bar("converting, MB") as progress:
        result = convert_openelm(
            source, out, precision, tokenizer=find_tokenizer(tokenizer), force=force, progress=progress
        )
    finish(result, upload, json)


@app.command("kvp")
def kvp(
    source: Annotated[Path, typer.Argument(help="CoreNet KV-prediction checkpoint (.pt).")],
    out: OutDirectory,
    preset: Annotated[str | None, typer.Option("--preset", help="Which published pair it is.")] = None,
    layer_map: Annotated[
        str | None, typer.Option("--layer-map", help="Or the auxiliary layer of each base layer: 0,0,1,...")
    ] = None,
    dtype: DtypeOption = None,
    q_bits: QBits = None,
    q_group_size: QGroupSize = None,
    tokenizer: Tokenizer = None,
    force: Force = False,
    upload: Upload = None,
    json: Json = False,
) -> None:
    """Convert a KV-prediction checkpoint to a bundle.

    Base, auxiliary and maps come out of one file; every tensor has to have its place.
    """
    precision, entries = make_precision(dtype, q_bits, q_group_size), parse_layer_map(layer_map)
    with clean_stdout(json), progress_bar("converting, MB") as progress:
        result = convert_kvp(
            source,
            out,
            precision,
            preset=preset,
            layer_map=entries,
            tokenizer=find_tokenizer(tokenizer),
            force=force,
            progress=progress,
        )
    finish(result, upload, json)


@app.command("hf")
def hf(
    source: Annotated[str, typer.Argument(help="Hugging Face or mlx-lm model directory or id.")],
    out: OutDirectory,
    dtype: DtypeOption = None,
    q_bits: QBits = None,
    q_group_size: QGroupSize = None,
    tokenizer: Tokenizer = None,
    force: Force = False,
    upload: Upload = None,
    json: Json = False,
) -> None:
    """Convert a Hugging Face model of a supported family, through mlx-lm."""
    precision = make_precision(dtype, q_bits, q_group_size)
    with clean_stdout(json), progress_bar("converting, MB") as progress:
        result = convert_hf(
            source,
            out,
            precision,
            directory=find_model(source),
            tokenizer=find_tokenizer(tokenizer),
            force=force,
            progress=progress,
        )
    finish(result, upload, json)


@app.command("gguf")
def gguf(
    source: Annotated[Path, typer.Argument(help="GGUF file, or any part of a split one.")],
    out: OutDirectory,
    dtype: DtypeOption = None,
    q_bits: QBits = None,
    q_group_size: QGroupSize = None,
    tokenizer: Tokenizer = None,
    force: Force = False,
    upload: Upload = None,
    json: Json = False,
) -> None:
    """Convert a GGUF file, in any quantisation, of llama, qwen2, qwen3, qwen3moe, gemma3 or phi3.

    Files in Q4_0, Q4_1 or Q8_0 stay bit for bit, others become fp16 (smaller with --q-bits).
    """
    precision = make_precision(dtype, q_bits, q_group_size)
    with clean_stdout(json), progress_bar("converting, MB") as progress:
        result = convert_gguf_file(
            source, out, precision, tokenizer=find_tokenizer(tokenizer), force=force, progress=progress
        )
    finish(result, upload, json)


@app.command("verify")
def verify(
    model: Annotated[Path, typer.Argument(help="Converted bundle or OpenELM directory.")],
    checkpoint: Annotated[Path, typer.Argument(help="The .pt file that it was converted from.")],
    json: Json = False,
) -> None:
    """Compare a conversion with its checkpoint.

    A few prompts are recomputed from the checkpoint by an independent PyTorch implementation; exit code 1 if the
    logits differ by more than the stored precision explains.
    """
    with clean_stdout(json), progress_bar("prompts") as progress:
        result = verify_conversion(model, checkpoint, progress=progress)
    if json:
        print_json(result)
    else:
        for name, check in result["checks"].items():
            same = f"argmax equal at {check['argmax_equal']} of {check['positions']} positions"
            show(f"{name}: largest difference {check['max_difference']:.2e}, {same}")
        show("OK" if result["ok"] else f"DIFFERENT: more than {result['tolerance']} x the logits' spread")
    if not result["ok"]:
        raise typer.Exit(1)


def push(
    directory: Annotated[Path, typer.Argument(help="Bundle or model directory.")],
    repository: Annotated[str, typer.Argument(help="Hub repository, owner/name; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    json: Json = False,
) -> None:
    """Upload a bundle or model to the Hugging Face Hub."""
    if (directory / "kvp.json").is_file() and Path(place := read_config(directory).base.path or "").is_absolute():
        raise InputError(
            f"{directory} names its base by a path of this machine, {place}, where nobody else finds it; fit it on a "
            "Hub id or a named base."
        )
    with clean_stdout(json), progress_lines(f"uploading {directory} ({directory_bytes(directory) // 10**6} MB)"):
        url = push_directory(directory, repository, private=private)
    if json:
        print_json({"repository": repository, "url": url})
    else:
        say(f"Pushed {directory} to {url}.")


def make_precision(dtype: Dtype | None, q_bits: int | None, q_group_size: int | None) -> Precision:
    """Return the wanted precision of the output.

    Raises:
        InputError: unusable values.
    """
    return Precision(dtype.value if dtype else None, q_bits, q_group_size)


def find_tokenizer(name: str | None) -> str | None:
    """Return the file or directory that ``--tokenizer`` names, the default's alias among them.

    Raises:
        InputError: nothing of that name here, and no Hub to ask.
    """
    return name if name is None or expanded(name).is_file() else str(find_model(name))


def parse_layer_map(text: str | None) -> list[int] | None:
    """Return the numbers of ``0,0,1,...``.

    Raises:
        InputError: something else.
    """
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--layer-map takes numbers such as 0,0,1,1, not '{text}'.") from error


def finish(result: dict[str, Any], upload: str | None, json: bool) -> None:
    """Push what was written where that is wanted, and report."""
    if upload is not None:
        with clean_stdout(json), progress_lines(f"uploading {result['out']}"):
            result["upload"] = push_directory(Path(result["out"]), upload)
    if json:
        print_json(result)
        return
    say(f"Wrote {result['out']}: {result['model']}.")
    for name, part in {"in all": result, **result.get("parts", {})}.items():
        size = f"{part['size_bytes'] / 1e6:,.1f} MB"
        say(f"  {name}: {part['parameters']:,} parameters, {part['bits_per_weight']} bits per weight, {size}")
    if upload is not None:
        say(f"Pushed to {result['upload']}.")
    say(f"Next: {next_step(Path(result['out']))}")


def next_step(out: Path) -> str:
    """Return what can be done with what was written."""
    answer = f"kvp chat --model {shlex.quote(str(out))}"
    if (out / "kvp.json").exists():
        return f"'{answer}' answers with it."
    train = f"kvp train {shlex.quote(str(out))} --layers K --data TEXT --out DIR"
    return f"'{answer}' answers with it by full prefill; '{train}' gives it a predictor."
