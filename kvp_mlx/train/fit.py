"""``kvp fit``: a bundle with closed-form maps, for any base and each kind of auxiliary."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import __version__
from ..bundle.config import AuxiliaryConfig, BaseConfig, BundleConfig, ModelMark, PredictorConfig, RecomputeConfig
from ..bundle.layer_map import LayerMap, prefix_layer_map, pruned_layer_map, spread_layer_map, widened
from ..bundle.loading import KVPModel, build_predictor, load_auxiliary
from ..bundle.mark import mark_of
from ..bundle.named import NAMED, find_model
from ..bundle.predictor import HIDDEN_STATE, KEYS_VALUES, Predictor
from ..device.hosts import joined
from ..errors import InputError, KVPError
from ..files import expanded
from ..files.directories import atomic_directory, copy_ours, require_free
from ..models.description import check_pruned
from ..models.families import fixed_kinds, kinds_of, targets_of
from ..models.kinds import Target
from ..models.loading import fit_to_device, load_model, load_tokenizer
from ..models.pruning import retained_layers, write_pruned
from ..models.safetensors import fingerprint, write_tensors
from .deviation import DEVIATION_TOKENS, fit_deviation
from .ridge import fit_predictors
from .text import MIN_WINDOW_TOKENS, check_apart, data_files, token_windows


@dataclass(frozen=True)
class FitOptions:
    """What ``kvp fit`` does; exactly one of ``layers``, ``auxiliary`` and ``prune`` chooses the kind.

    Attributes:
        layers: prefix of this many base layers.
        auxiliary: mlx-lm model of the same tokeniser: a directory, which the bundle gets a copy of, or a named base.
        prune: fraction of base layers that a layer-pruned auxiliary keeps.
        sources: auxiliary layers that each base layer reads (kinds ``model`` and ``pruned``).
        preceding: tokens before each one that the maps read as well; None: one for a prefix, else none.
        tokens: how much text to read.
        window: tokens per window.
        penalty: ridge penalty relative to the mean square of the inputs.
        seed: of the shuffle.
    """

    layers: int | None = None
    auxiliary: str | None = None
    prune: float | None = None
    sources: int = 1
    preceding: int | None = None
    tokens: int = 200_000
    window: int = 512
    penalty: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options against each other."""
        if sum(choice is not None for choice in (self.layers, self.auxiliary, self.prune)) != 1:
            raise InputError("choose the auxiliary with exactly one of --layers K, --auxiliary DIR and --prune 0.5.")
        if self.layers is not None and self.sources != 1:
            raise InputError("--sources belongs to --auxiliary and --prune; a prefix reads one hidden state.")
        if self.window < MIN_WINDOW_TOKENS:
            raise InputError(
                f"windows of {self.window} tokens are too short; give --window {MIN_WINDOW_TOKENS} or more."
            )
        for name, value in (("--tokens", self.tokens), ("--window", self.window), ("--penalty", self.penalty)):
            if not 0 < value < math.inf:
                raise InputError(f"{name} must be positive, not {value}.")


def fit_bundle(base_name: str, data: list[str], out: Path, options: FitOptions, **how: Any) -> dict[str, Any]:
    """Fit a predictor and write the bundle ``out``; see ``fit_bundles``."""
    return fit_bundles(base_name, data, {out: options}, **how)


def fit_bundles(
    base_name: str,
    data: list[str],
    wanted: Mapping[Path, FitOptions],
    *,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Fit predictors for one base in one pass over the text, and write a bundle for each.

    Args:
        base_name: the base: alias, directory or Hub id of an mlx-lm model.
        data: text files or folders.
        wanted: the bundle directories to write, each with its options; these differ in the auxiliary alone.
        force: replace existing bundles.
        progress: called with (tokens read, tokens to read).

    Returns:
        What was done: ``tokens``, ``seconds``, ``predictor_bytes`` (of all together).

    Raises:
        InputError: unusable data, options or output.
    """
    files = data_files(data)
    for out in wanted:
        check_apart(out, data)
    start = time.perf_counter()
    base_path = find_model(base_name)
    for out, options in wanted.items():
        sources = [base_path] if options.auxiliary is None else [base_path, find_model(options.auxiliary)]
        require_free(out, force, sources=sources)
    base, base_config = load_model(base_path)
    tokenizer = load_tokenizer(base_path, base_config)
    if tokenizer is None:
        raise InputError(f"{base_path} has no tokeniser; text cannot be read for it.")
    layer_maps = [layer_map_of(base, base_path, options) for options in wanted.values()]
    fit_to_device(base)
    with ExitStack() as stack:
        places, works, models = [], [], []
        for (out, options), layer_map in zip(wanted.items(), layer_maps, strict=True):
            places.append(stack.enter_context(ExitStack()))  # closed one by one: a finished bundle is not lost
            work = places[-1].enter_context(atomic_directory(out))
            auxiliary_config = write_auxiliary(base, base_path, options, work)
            reference = base_reference(base_name, base_path, mark_of(base, tokenizer))
            preceding = int(options.layers is not None) if options.preceding is None else options.preceding
            config = bundle_config(reference, base, auxiliary_config, layer_map, preceding)
            auxiliary = load_auxiliary(base, config, work)
            predictor = build_predictor(base, auxiliary, config)
            if auxiliary_config.kind != "prefix":
                fit_to_device(auxiliary)
            works.append(work)
            models.append(KVPModel(base, auxiliary, predictor, tokenizer, config, base_config))
        size = 0
        common = next(iter(wanted.values()))
        for place, work, model, record in zip(
            places, works, models, fit_maps(models, files, common, progress), strict=True
        ):
            write_predictor(model.predictor, work / "predictor.safetensors")
            size += (work / "predictor.safetensors").stat().st_size
            model.config.model_copy(update={"training": record}).save(work)
            place.close()
    return {"tokens": record["tokens"], "seconds": round(time.perf_counter() - start, 1), "predictor_bytes": size}


def fit_maps(
    models: Sequence[KVPModel], files: list[Path], options: FitOptions, progress: Callable[[int, int], None]
) -> Iterator[dict[str, Any]]:
    """Set bundles' maps, then one estimator of deviation after the other; hosts share the windows.

    Yields what the bundle's kvp.json keeps of how that was done.
    """

    def windows(tokens: int) -> Iterator[list[int]]:
        own = budgeted(token_windows(files, models[0].text_tokenizer, options.window, options.seed), tokens)
        return own if hosts is None else islice(own, hosts.rank, None, hosts.size)

    hosts = joined()
    share = hosts.size if hosts else 1
    judged_tokens = min(options.tokens, DEVIATION_TOKENS)
    in_all = options.tokens + judged_tokens * len(models)
    tokens = fit_predictors(
        models, windows(options.tokens), penalty=options.penalty, progress=lambda done: progress(done * share, in_all)
    )
    judged = list(windows(judged_tokens))

    for number, model in enumerate(models):
        done = options.tokens + judged_tokens * number
        explained = fit_deviation(model, judged, _counting(progress, done, judged_tokens, in_all), hosts)
        yield {
            "method": "ridge",
            "kvp_mlx": __version__,
            "tokens": tokens,
            "deviation_explained": explained,
            "data": [path.name for path in files],
            "window": options.window,
            "penalty": options.penalty,
            "seed": options.seed,
            "sources": options.sources,
        }


def _counting(progress: Callable[[int, int], None], done: int, tokens: int, in_all: int) -> Callable[[int, int], None]:
    """Return what counts on from ``done`` to ``done + tokens``, given the part of a whole."""
    return lambda part, whole: progress(done + tokens * part // whole, in_all)


def layer_map_of(base: nn.Module, base_path: Path, options: FitOptions) -> LayerMap:
    """Return which auxiliary layers each base layer reads, told before any weights are read.

    Raises:
        InputError: an auxiliary that does not fit, or lacks what a layer of the base is predicted from.
    """
    depth = len(base.layers)
    if options.layers is not None:
        return prefix_layer_map(depth, options.layers)
    if options.prune is not None:
        retained = retained_layers(depth, options.prune)
        check_pruned(base_path, retained)
        layer_map, targets = pruned_layer_map(depth, retained), [targets_of(base)[layer] for layer in retained]
    else:
        targets = targets_of(load_model(find_model(str(options.auxiliary)))[0])
        layer_map = spread_layer_map(depth, len(targets))
    return served(widened(layer_map, options.sources, len(targets)), base, targets)


def served(layer_map: LayerMap, base: nn.Module, auxiliary: Sequence[tuple[Target, ...]]) -> LayerMap:
    """Let layers read, in place of a source without what is predicted of them, the nearest one that has it.

    Raises:
        InputError: no layer has it, by the kind of the base's.
    """
    needed, kinds = [{target.name for target in targets} for targets in targets_of(base)], kinds_of(base)
    found = [{target.name for target in targets} for targets in auxiliary]

    def nearest(layer: int, source: int) -> int:
        able = [other for other, names in enumerate(found) if needed[layer] <= names]
        if not able:
            raise InputError(
                f"the base's layers of {kinds[layer].title} are predicted from {', '.join(sorted(needed[layer]))}, and "
                "no layer of the auxiliary has these; take one of the base's architecture, or use --layers K."
            )
        return min(able, key=lambda other: (abs(other - source), other))

    return tuple(
        None if sources is None else tuple(sorted({nearest(layer, source) for source in sources}))
        for layer, sources in enumerate(layer_map)
    )


def write_auxiliary(base: nn.Module, base_path: Path, options: FitOptions, work: Path) -> AuxiliaryConfig:
    """Put the auxiliary into the bundle ``work`` (nothing to put for a prefix or a named base) and describe it."""
    if options.layers is not None:
        return AuxiliaryConfig(kind="prefix", layers=options.layers)
    if options.prune is not None:
        retained = retained_layers(len(base.layers), options.prune)
        (work / "auxiliary").mkdir()
        write_pruned(base_path, retained, work / "auxiliary")
        mark = fingerprint(work / "auxiliary")
        return AuxiliaryConfig(kind="pruned", layers=len(retained), retained_layers=tuple(retained), fingerprint=mark)
    name = str(options.auxiliary)
    source = find_model(name)
    auxiliary, _ = load_model(source)
    if name not in NAMED:
        copy_ours(source, work / "auxiliary")
    return AuxiliaryConfig(
        kind="model",
        layers=len(auxiliary.layers),
        fingerprint=fingerprint(source),
        alias=name if name in NAMED else None,  # type: ignore[arg-type] # as a base's
    )


def base_reference(name: str, path: Path, mark: ModelMark) -> BaseConfig:
    """Say where a bundle's base lives, and what tells it from others."""
    what: dict[str, Any] = {"fingerprint": fingerprint(path), "mark": mark}
    if name in NAMED:
        return BaseConfig(**what, alias=name)  # type: ignore[arg-type] # the table and the literal are one, by a test
    if expanded(name).is_dir():
        return BaseConfig(**what, path=str(path.resolve()))
    return BaseConfig(**what, hub_id=name, revision=path.name)


def bundle_config(
    reference: BaseConfig, base: nn.Module, auxiliary: AuxiliaryConfig, layer_map: LayerMap, preceding: int = 0
) -> BundleConfig:
    """Describe the bundle: its base, its auxiliary, which layers the maps read, and what can be recomputed."""
    recompute = None if fixed_kinds(base) else RecomputeConfig()
    reads: Any = HIDDEN_STATE if auxiliary.kind == "prefix" else KEYS_VALUES
    predictor = PredictorConfig(input=reads, layer_map=layer_map, preceding=preceding)
    return BundleConfig(base=reference, auxiliary=auxiliary, predictor=predictor, recompute=recompute)


def write_predictor(predictor: Predictor, path: Path) -> None:
    """Write the maps in fp16."""
    write_float16(dict(tree_flatten(predictor.parameters())), path)


def write_float16(arrays: dict[str, mx.array], path: Path) -> None:
    """Write arrays as a safetensors file in fp16, but for those with numbers that are too large for it.

    Raises:
        KVPError: numbers that are not finite; or as ``write_tensors``.
    """
    if odd := [name for name, array in arrays.items() if not mx.isfinite(array).all().item()]:
        raise KVPError(f"{odd[0]} came out with numbers that are not finite; does the base model work at all?")
    halved = {name: array.astype(mx.float16) for name, array in arrays.items()}
    write_tensors({name: one if mx.isfinite(one).all().item() else arrays[name] for name, one in halved.items()}, path)


def budgeted(windows: Iterable[list[int]], tokens: int) -> Iterator[list[int]]:
    """Cut a stream of windows off once it has yielded ``tokens`` tokens, shortening the last one."""
    left = tokens
    for window in windows:
        yield window[:left]
        left -= len(window)
        if left <= 0:
            return
