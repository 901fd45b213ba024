"""Where mlx keeps the code that it compiles on CPUs: shared libraries, which it loads again by their names.

mlx takes the system's temporary directory (``mlx/VERSION/cpu`` in it, and no setting of its own). Where that is shared,
whoever makes the folder first could plant libraries in it. So it is made in time, for the user alone; where it is
somebody else's already, mlx gets another temporary directory, in the user's cache.
"""

import importlib.metadata
import os
import stat
import tempfile
from pathlib import Path

from ..files import cache_dir, private_directory

VARIABLES = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")  # in the order in which C++ asks for them


def secure_folder() -> Path:
    """Let mlx compile where nobody else can write, and return the folder.

    Raises:
        InputError: neither the temporary directory nor the user's cache has room for it.
    """
    folder = compile_folder()
    if not is_secure(folder):
        tempfile.gettempdir()  # remembered, so that other temporary files stay where they were
        os.environ["TMPDIR"] = str(private_directory(cache_dir() / "compiled"))
        folder = compile_folder()
    return folder


def compile_folder() -> Path:
    """Return where mlx compiles to."""
    temporary = next((os.environ[name] for name in VARIABLES if os.environ.get(name)), "/tmp")
    return Path(temporary) / "mlx" / importlib.metadata.version("mlx") / "cpu"


def is_secure(folder: Path) -> bool:
    """Return whether only the user can put files into a compile folder, which is made if it is missing."""
    temporary = folder.parents[2]
    try:
        mode = temporary.stat().st_mode
        if mode & 0o022 and not mode & stat.S_ISVTX:  # anybody could put another folder in the place of ours
            return False
        return all(_is_own(place) for place in (folder.parents[1], folder.parents[0], folder))
    except OSError:
        return False


def _is_own(place: Path) -> bool:
    place.mkdir(mode=0o700, exist_ok=True)
    found = place.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
