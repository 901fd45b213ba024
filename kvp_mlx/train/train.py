"""``kvp train``: from a fitted bundle to a trained one."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import __version__
from ..bundle import KVPModel, bundle_directory, load
from ..errors import InputError
from ..files import atomic_directory, require_free
from .fit import write_predictor
from .loop import TrainOptions, train_predictor
from .text import data_files, token_windows

HELD_BACK_WINDOWS = 6
MIN_TRAINING_TOKENS = 128


def train_bundle(
    start: str,
    data: list[Path],
    out: Path,
    options: TrainOptions,
    *,
    window: int = 512,
    force: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Train the maps of the bundle ``start`` and write the bundle ``out``.

    ``out`` is written whenever validation improves, so a killed run leaves the best bundle so far. The log of
    losses and validations is ``out`` with ``.jsonl`` appended.

    Args:
        start: bundle to start from (``kvp fit``); its base must be known by Hub id, alias or absolute path.
        data: text files or folders.
        out: bundle directory to write.
        options: see ``TrainOptions``.
        window: tokens per window.
        force: replace an existing ``out``.
        progress: called with the share of the budget that is spent.

    Returns:
        The best validation's record: recovery, separation, tokens, minutes.

    Raises:
        InputError: unusable data or output, or a bundle that cannot be copied.
    """
    require_free(out, force)
    files = data_files(data)
    model = load(start)
    if model.config.base.path is not None and not Path(model.config.base.path).is_absolute():
        raise InputError(f"{start} carries its base inside; fit a bundle on the base's own directory to train.")
    windows = endless_windows(files, model, window, options.seed)
    whole = (tokens for tokens in windows if len(tokens) == window)
    held_back = list(itertools.islice(whole, HELD_BACK_WINDOWS))

    def save(record: dict[str, Any]) -> None:
        training = {
            "method": "continuation",
            "kvp_mlx": __version__,
            "start": model.config.training,
            "data": [path.name for path in files],
            "window": window,
            **{name: value for name, value in vars(options).items() if name != "validate_every"},
            "validation": record,
        }
        with atomic_directory(out) as work:
            write_predictor(model.predictor, work / "predictor.safetensors")
            model.config.model_copy(update={"training": training}).save(work)
            if not model.is_prefix:
                shutil.copytree(bundle_directory(start) / "auxiliary", work / "auxiliary")

    log = out.with_name(out.name + ".jsonl")
    return train_predictor(model, windows, held_back, options, log=log, save=save, progress=progress)


def endless_windows(files: list[Path], model: KVPModel, window: int, seed: int) -> Iterator[list[int]]:
    """Yield training windows forever, each pass over the data in another order."""
    for epoch in itertools.count(seed):
        found = False
        for tokens in token_windows(files, model.text_tokenizer, window, epoch):
            if len(tokens) >= min(window, MIN_TRAINING_TOKENS):
                found = True
                yield tokens
        if not found:
            raise InputError(f"the data holds no text of {MIN_TRAINING_TOKENS} tokens or more; give more with --data.")
