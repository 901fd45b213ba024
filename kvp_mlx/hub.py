"""Pushing bundles and models to the Hugging Face Hub."""

import sys
from pathlib import Path

from .errors import InputError, KVPError


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
    if repository.count("/") != 1 or not all(repository.split("/")):
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
