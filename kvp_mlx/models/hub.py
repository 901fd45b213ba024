"""Bundles and models from and to the Hugging Face Hub."""

import re
import sys
from pathlib import Path

from ..errors import InputError, KVPError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def download(hub_id: str, revision: str | None) -> Path:
    """Return the local snapshot of a repository's model or bundle files (downloaded once).

    Raises:
        InputError: neither here nor to be had.
    """
    from huggingface_hub import snapshot_download

    if not HUB_ID.fullmatch(hub_id):
        raise InputError(f"'{hub_id}' is no Hub id; they read owner/name.")
    no_bars_off_terminal()
    patterns = [
        "*.json",
        "model*.safetensors",
        "predictor.safetensors",
        "adapter.safetensors",
        "*.model",
        "*.txt",
        "*.jinja",
    ]
    patterns += [f"{part}/{pattern}" for part in ("auxiliary", "base") for pattern in patterns]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub and its HTTP client raise dozens of types, none worth telling apart
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{hub_id} is neither a local directory nor available from the Hub ({reason}); check the name, the "
            "network and your login (hf auth login)."
        ) from error


def push_directory(directory: Path, repository: str, *, private: bool = False) -> str:
    """Upload a directory as it is, making the repository first if need be.

    Args:
        directory: a bundle or mlx-lm model directory.
        repository: ``owner/name``.
        private: of a new repository.

    Returns:
        The repository's address.

    Raises:
        InputError: nothing to push there, or no repository name.
        KVPError: the Hub cannot be reached or refuses.
    """
    if not any((directory / name).is_file() for name in ("kvp.json", "config.json")):
        raise InputError(f"{directory} is neither a bundle nor a model directory; convert or fit one first.")
    if not HUB_ID.fullmatch(repository):
        raise InputError(f"'{repository}' is no Hub repository; give it as owner/name.")
    from huggingface_hub import HfApi

    no_bars_off_terminal()
    try:
        url = HfApi().create_repo(repository, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=directory, commit_message="Uploaded by kvp")
    except Exception as error:  # huggingface_hub and its HTTP client raise dozens of types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KVPError(
            f"{repository} could not be pushed ({reason}); check the network and 'hf auth login'."
        ) from error
    return str(url)


def no_bars_off_terminal() -> None:
    """Keep huggingface_hub's progress bars out of logs and pipes."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
