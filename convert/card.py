"""The model card (README.md) of a converted model: where it came from, its hashes, its licence, its sizes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .. import __version__
from ..files import expanded, sha256_of, write_text

UNKNOWN_LICENCE = "not stated by the source; look it up before sharing"


def describe_source(path: Path, name: str, files: Sequence[Path] = ()) -> dict[str, Any]:
    """Return what was converted: its name, the SHA-256 of each file with weights, and its licence.

    Args:
        path: a file, or a directory with ``*.safetensors``.
        name: what the user called it: a path, of which only the last part is kept, or a Hub id.
        files: its files, where the path does not tell.
    """
    files = files or ([path] if path.is_file() else sorted(path.glob("*.safetensors")))
    return {
        "source": path.name if expanded(name).exists() else name,
        "source_sha256": {file.name: sha256_of(file) for file in files},
        "licence": _licence(path) or UNKNOWN_LICENCE,
    }


def _licence(path: Path) -> str | None:
    """Return the licence that a directory's own model card states."""
    card = path / "README.md"
    if not card.is_file():
        return None
    try:
        return ModelCard.load(card).data.get("license")
    except Exception:  # a card that cannot be parsed states no licence
        return None


def write_card(directory: Path, title: str, report: dict[str, Any]) -> None:
    """Write README.md.

    Args:
        directory: the converted model or bundle.
        title: its name.
        report: what ``kvp convert`` reports; a bundle's ``parts`` get a line each.
    """
    licence = report["licence"]
    data = ModelCardData(library_name="mlx", tags=["mlx", "kvp-mlx"])
    if licence != UNKNOWN_LICENCE:
        data.license = licence
    parts = report.get("parts") or {"model": report}
    rows = [
        f"| {name} | {part['parameters']:,} | {part['tensors']} | {part['dtype']} | {part['bits_per_weight']} "
        f"| `{part.get('fingerprint', '')}` |"
        for name, part in parts.items()
    ]
    hashes = [f"- `{name}` SHA-256 `{digest}`" for name, digest in report["source_sha256"].items()]
    lines = [
        "---",
        data.to_yaml(),
        "---",
        f"# {title}",
        "",
        f"{report['model']}, converted by kvp-mlx {__version__}.",
        "",
        "| part | parameters | tensors | dtype | bits per weight | fingerprint |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"Source: `{report['source']}`",
        "",
        *hashes,
        "",
        f"Licence: {licence}.",
        "",
    ]
    write_text(directory / "README.md", "\n".join(lines))
