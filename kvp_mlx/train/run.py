"""``kvp train``: from a bundle as it was fitted to a trained one."""

import contextlib
import itertools
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import __version__
from ..bundle.adapter import adapted_prefix, adapter_weights, add_adapter, fused_weights
from ..bundle.config import AuxiliaryConfig, read_config
from ..bundle.loading import KVPModel, base_directory, bundle_directory, load
from ..bundle.named import find_model
from ..engine.prefill import Progress
from ..errors import InputError, KVPError
from ..files import read_json, write_json
from ..files.directories import atomic_directory, require_free
from ..models.description import model_without_weights
from ..models.families import layers_of
from ..models.loading import read_config as read_model_config
from ..models.pruning import prune_config
from ..models.safetensors import fingerprint
from .capacity import require_memory
from .deviation import DEVIATION_TOKENS, fit_deviation, with_estimator
from .directory import begin, check_begun, sole_run, starting_bundle, training_directory
from .fit import budgeted, write_float16, write_predictor
from .loop import Trained, TrainOptions, train
from .picture import draw_training
from .recovery import RecoveryMeasurement
from .text import (
    PromptWindow,
    bucketed,
    check_apart,
    data_files,
    full_pieces,
    is_answered,
    token_windows,
)
from .work import flops_per_token

HELD_BACK_WINDOWS = 6
MIN_TRAINING_TOKENS = 128

Phase = Callable[[str], AbstractContextManager[Progress]]
"""Tells what is being done while a block lasts; yields what is told how far it is."""


@contextlib.contextmanager
def silent(label: str) -> Iterator[Progress]:
    """Tell nothing."""
    del label
    yield lambda done, total: None


def train_bundle(
    start: str | Callable[[], str],
    data: list[str],
    out: Path,
    options: TrainOptions,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Callable[[float, dict[str, Any]], None] = lambda share, entry: None,
    phase: Phase = silent,
) -> dict[str, Any]:
    """Train the bundle ``start`` and write the bundle ``out``.

    ``out`` is written whenever validation improves, so a killed run leaves the best bundle so far.

    Args:
        start: bundle to start from (``kvp fit``), or what makes one once ``out`` is known to be free; its base must be
            known by Hub id, alias or absolute path.
        data: see ``text.data_files``.
        out: bundle directory to write.
        options: see ``TrainOptions``.
        resume: go on with the run that was writing ``out``; ``start`` is not used.
        force: replace an existing ``out``.
        progress: see ``loop.train``.
        phase: tells validations and savings.

    Returns:
        The record of the best validation, the one of the least divergence: recovery, separation, divergence, step,
        tokens, minutes; tokens_per_second, the median over steps; flops_per_token, see ``work``; steps_taken,
        tokens_taken and minutes_taken of the whole run, and steps_now of this call; kept, ``start`` where no step made
        it better, else ``trained``; and rewritten, whether the bundle of a resumed run was gone and the last state
        took its place.

    Raises:
        InputError: unusable data or output, a bundle that cannot be copied, or another process training into ``out``.
    """
    files = data_files(data)
    check_apart(out, data)
    check_begun(out, resume, force)
    with sole_run(out):
        check_begun(out, resume, force)  # another run may have ended meanwhile
        place = "" if resume else start if isinstance(start, str) else start()
        return _train(place, files, out, options, resume=resume, force=force, progress=progress, phase=phase)


def _train(
    start: str,
    files: list[Path],
    out: Path,
    options: TrainOptions,
    *,
    resume: bool,
    force: bool,
    progress: Callable[[float, dict[str, Any]], None],
    phase: Phase,
) -> dict[str, Any]:
    directory = training_directory(out)
    with phase("loading the bundle to start from"):
        model = open_start(start, out, resume, force, options)
    begun = model.config.training
    is_kept = not resume or all((out / name).is_file() for name in ("kvp.json", "predictor.safetensors"))
    kept = read_config(out).training.get("validation") if resume and is_kept else None
    options = options.settled(model)
    model = with_estimator(make_trainable(model, options))
    trained = Trained(model, options)
    require_memory(model, trained, options)
    held_back = hold_back(files, model, options)
    measurement = RecoveryMeasurement(model, list(held_back.values()), options.window // 4)

    def estimate() -> float | None:
        windows = list(budgeted(endless_windows(files, model, options, held_back), DEVIATION_TOKENS))
        with phase("saving the best so far, windows") as told:
            return fit_deviation(model, windows, told)

    def save(record: dict[str, Any]) -> None:
        known = begun.get("deviation_explained") if record["step"] == 0 else None  # the maps are the start's own
        explained = estimate() if known is None else known
        training = training_record(files, options, begun) | {"deviation_explained": explained, "validation": record}
        write_trained(model, trained, training, starting_bundle(out), out)

    if not resume and mx.distributed.init().rank() == 0:
        begin(bundle_directory(start), directory)
    try:
        state = train(
            model,
            trained,
            partial(batches_from, files, model, options, held_back),
            options,
            directory,
            resume=resume,
            kept=kept,
            data=[f"{path.resolve()} {path.stat().st_size}" for path in files],
            validate=partial(validate, measurement, phase),
            save=save,
            progress=progress,
        )
    finally:
        if mx.distributed.init().rank() == 0:
            with contextlib.suppress(KVPError, OSError):  # whatever ended the training is what is told
                draw_training(directory / "log.jsonl", directory / "loss.png")
    speed = {"tokens_per_second": round(median(state.speeds), 1)} if state.speeds else {}
    taken = {"steps_taken": state.step, "tokens_taken": state.tokens, "minutes_taken": round(state.minutes, 2)}
    return {
        **state.best,
        **speed,
        "flops_per_token": round(flops_per_token(model, trained, options)),
        **taken,
        "steps_now": len(state.speeds),
        "kept": "trained" if state.best.get("step") else "start",
        "rewritten": not is_kept,
    }


def batches_from(
    files: list[Path], model: KVPModel, options: TrainOptions, held_back: Collection[str], number: int
) -> Iterator[list[list[int]]]:
    """Yield this process's batches of windows, forever, from the given batch number on."""
    group = mx.distributed.init()
    stream = bucketed(endless_windows(files, model, options, held_back), options.batch_size, options.seed)
    return itertools.islice(stream, number + group.rank(), None, group.size())


def validate(measurement: RecoveryMeasurement, phase: Phase) -> dict[str, Any]:
    """Measure what a validation's record holds."""
    with phase("validation, documents") as told:
        result = measurement.measure(told)
    kept = {name: result[name] for name in ("separation", "divergence")}
    return {"recovery": result["arms"]["kvp"]["recovery"], **kept}


def training_record(files: list[Path], options: TrainOptions, begun: dict[str, Any]) -> dict[str, Any]:
    """Return what kvp.json keeps of how a bundle was trained, ``begun`` of how the one before it was."""
    return {
        "method": "gradient",
        "kvp_mlx": __version__,
        "start": begun,
        "data": [path.name for path in files],
        "processes": mx.distributed.init().size(),
        **asdict(options),
    }


def check_kinds(base: Path, options: TrainOptions, prefix: int) -> None:
    """Refuse, before weights are read, what layers cannot be trained with that keep a state in place of entries.

    Args:
        base: model directory.
        options: of the training.
        prefix: layers of it that read the prompt, 0 for another auxiliary.

    Raises:
        InputError: a loss on predicted entries alone, recomputation, or a prefix of such layers with low-rank updates.
    """
    layers = layers_of(model_without_weights(read_model_config(base), base))
    titles = [None if kind is None or kind.keeps_entries else kind.title for kind, _ in layers]
    refused = {"--objective paper (--base-weight)": titles if options.weights.base else []}
    refused["--recompute"] = titles if options.recompute else []
    refused["--lora-rank"] = titles[: prefix + 1] if prefix and options.lora_rank is not None else []
    for option, found in refused.items():
        if kinds := sorted({title for title in found if title is not None}):
            raise InputError(
                f"{option} cannot be had with layers of {' and '.join(kinds)}, which keep a state in place of entries; "
                "leave it out."
            )


def open_start(start: str, out: Path, resume: bool, force: bool, options: TrainOptions) -> KVPModel:
    """Load the bundle that training starts from, or started from.

    Raises:
        InputError: an output that is taken, or a bundle that cannot be trained into another.
    """
    bundle = bundle_directory(str(starting_bundle(out)) if resume else start)
    config = read_config(bundle)
    prefix = config.auxiliary.layers if config.auxiliary.kind == "prefix" else 0
    check_kinds(base_directory(config.base, bundle), options, prefix)
    model = load(str(bundle))
    base_path = model.config.base.path
    if base_path is not None and not Path(base_path).is_absolute():
        raise InputError(f"{start} carries its base inside; fit a bundle on the base's own directory to train.")
    if not model.predictor.blocks:
        raise InputError("every layer of this prefix is exact, there is nothing to train; use fewer --layers.")
    if options.recompute and model.config.recompute is None:
        raise InputError(f"{start} cannot tell which tokens are recomputed; leave --recompute out, or fit it anew.")
    if not resume:
        require_free(out, force, sources=[base_directory(model.config.base, bundle_directory(start))])
    return model


def make_trainable(model: KVPModel, options: TrainOptions) -> KVPModel:
    """Put the maps into fp32 and make the auxiliary trainable where the options ask for it.

    Raises:
        InputError: the kind of auxiliary cannot be trained that way.
    """
    model.predictor.set_dtype(mx.float32)
    if options.lora_rank is None and not options.train_auxiliary:
        return model
    if options.lora_rank is not None and options.train_auxiliary:
        raise InputError("choose one of --lora-rank and --train-auxiliary.")
    mx.random.seed(options.seed)
    if not model.is_prefix:
        if options.lora_rank is not None:
            add_adapter(model.auxiliary, options.lora_rank)
        elif any(array.dtype == mx.uint32 for _, array in tree_flatten(model.auxiliary.parameters())):
            raise InputError("a quantised auxiliary cannot be trained whole; use --lora-rank 16.")
        else:
            model.auxiliary.set_dtype(mx.float32)
        return model
    if options.lora_rank is None:
        raise InputError("a prefix shares its weights with the base, which stays as it is; use --lora-rank 16.")
    layers = model.config.auxiliary.layers
    if model.has_exact_prefix:
        auxiliary = model.config.auxiliary.model_copy(update={"adapter_rank": options.lora_rank})
        config = model.config.model_copy(update={"auxiliary": auxiliary})
        return replace(model, auxiliary=adapted_prefix(model.base, layers, options.lora_rank), config=config)
    if model.config.auxiliary.adapter_rank != options.lora_rank:
        raise InputError(f"this prefix has updates of rank {model.config.auxiliary.adapter_rank} already; use that.")
    return model


def write_trained(model: KVPModel, trained: Trained, training: dict[str, Any], start: Path, out: Path) -> None:
    """Write the bundle ``out`` as training has made it so far.

    Args:
        model: the bundle.
        trained: its trained parts.
        training: the record for kvp.json.
        start: the bundle that training began with.
        out: bundle directory to write.
    """
    config = model.config.model_copy(update={"training": training, "dials": ()})  # measured on other maps
    with atomic_directory(out) as work:
        write_predictor(model.predictor, work / "predictor.safetensors")
        auxiliary = _write_auxiliary(model, "auxiliary" in trained, start, work)
        config.model_copy(update={"auxiliary": auxiliary}).save(work)


def _write_auxiliary(model: KVPModel, is_trained: bool, start: Path, work: Path) -> AuxiliaryConfig:
    """Write what a bundle holds of its auxiliary into ``work``, and return what kvp.json says of it."""
    config = model.config.auxiliary
    if model.is_prefix:
        if config.adapter_rank is not None:
            write_float16(adapter_weights(model.auxiliary), work / "adapter.safetensors")
        return config
    if config.alias is None:
        shutil.copytree(start / "auxiliary", work / "auxiliary")
    elif config.adapter_rank is not None and not is_trained:
        shutil.copy(start / "adapter.safetensors", work)
    if not is_trained:
        return config
    if config.alias is not None:
        whole = read_json(find_model(config.alias) / "config.json")
        write_json(work / "auxiliary" / "config.json", prune_config(whole, list(range(config.layers))))
    rewrite_weights(work / "auxiliary", fused_weights(model.auxiliary))
    own = {"alias": None, "adapter_rank": None, "fingerprint": fingerprint(work / "auxiliary")}
    return config.model_copy(update=own)


def rewrite_weights(directory: Path, weights: dict[str, mx.array]) -> None:
    """Replace the weights of an mlx-lm model directory, which are then no longer quantised."""
    for path in [*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")]:
        path.unlink()
    write_float16(weights, directory / "model.safetensors")
    config = read_json(directory / "config.json")
    write_json(directory / "config.json", {k: v for k, v in config.items() if not k.startswith("quantization")})


def hold_back(files: list[Path], model: KVPModel, options: TrainOptions) -> dict[str, list[int]]:
    """Return the first pieces of the data that fill a window, for validation, each with its window.

    That many of text, and as many prompts with their completions, where the data has such.

    Raises:
        InputError: fewer than that.
    """
    tokenizer = model.text_tokenizer
    held_back: dict[str, list[int]] = {}
    answered = [path for path in files if is_answered(path, tokenizer)]
    for kind in ([path for path in files if path not in answered], answered):
        own: dict[str, list[int]] = {}
        for piece, ids in full_pieces(kind, tokenizer, options.window, options.seed):
            own[piece] = ids  # the same one may come again
            if len(own) == HELD_BACK_WINDOWS:
                break
        held_back |= own
    if len(held_back) < HELD_BACK_WINDOWS:
        raise InputError(
            f"the data holds {len(held_back)} passages of {options.window} tokens, validation alone needs "
            f"{HELD_BACK_WINDOWS}; give more --data, or a smaller --window."
        )
    return held_back


def endless_windows(
    files: list[Path], model: KVPModel, options: TrainOptions, held_back: Collection[str]
) -> Iterator[list[int]]:
    """Yield training windows forever, each pass over the data in another order, never of the held-back pieces.

    Raises:
        InputError: nothing is left to train on.
    """
    for epoch in itertools.count(options.seed):
        windows = token_windows(
            files, model.text_tokenizer, options.window, epoch, packed=options.packed, without=held_back
        )
        found = False
        for ids in windows:
            if isinstance(ids, PromptWindow) or len(ids) >= min(options.window, MIN_TRAINING_TOKENS):
                found = True
                yield ids
        if not found:
            raise InputError("the data holds nothing to train on beside what validation needs; give more --data.")
