"""``kvp train``: from a fitted bundle to a trained one."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import __version__
from ..bundle import KVPModel, base_directory, bundle_directory, load
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
    files = data_files(data)
    model = load(start)
    require_free(out, force, sources=[base_directory(model.config.base, bundle_directory(start))])
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    if model.config.base.path is not None and not Path(model.config.base.path).is_absolute():
        raise InputError(f"{start} carries its base inside; fit a bundle on the base's own directory to train.")
    held_back = hold_back(files, model, window, options.seed)
    windows = endless_windows(files, model, window, options.seed, held_back)

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


def hold_back(files: list[Path], model: KVPModel, window: int, seed: int) -> list[list[int]]:
    """Return the first full windows of the data, for validation.

    Raises:
        InputError: fewer full windows than that.
    """
    windows = token_windows(files, model.text_tokenizer, window, seed)
    full = list(itertools.islice((tokens for tokens in windows if len(tokens) == window), HELD_BACK_WINDOWS))
    if len(full) < HELD_BACK_WINDOWS:
        raise InputError(f"the data holds {len(full)} passages of {window} tokens; give more, or a smaller --window.")
    return full


def endless_windows(
    files: list[Path], model: KVPModel, window: int, seed: int, held_back: list[list[int]]
) -> Iterator[list[int]]:
    """Yield training windows forever, each pass over the data in another order, never the held-back ones.

    Raises:
        InputError: nothing is left to train on.
    """
    kept_out = set(map(tuple, held_back))
    for epoch in itertools.count(seed):
        found = False
        for tokens in token_windows(files, model.text_tokenizer, window, epoch):
            if len(tokens) >= min(window, MIN_TRAINING_TOKENS) and tuple(tokens) not in kept_out:
                found = True
                yield tokens
        if not found:
            raise InputError("the data holds nothing to train on beside what validation needs; give more with --data.")
