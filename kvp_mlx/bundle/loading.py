"""A bundle: base, auxiliary and predictor, loaded from a directory and checked before anything is computed."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model

from ..device.hosts import Hosts
from ..errors import BundleError, InputError
from ..models.description import describe_model
from ..models.families import fixed_kinds, hidden_size, kinds_of, targets_of
from ..models.hub import download
from ..models.loading import (
    Progress,
    compute_dtype,
    context_length,
    fit_to_device,
    load_any_model,
    load_model,
    load_tokenizer,
)
from ..models.safetensors import GROUP_SIZES, QUANTISED_BITS, TensorInfo, fingerprint, read_header
from ..models.sections import only_layers, prefix_model
from .adapter import adapted_prefix, adapter_weights, add_adapter, take_up
from .config import AuxiliaryConfig, BaseConfig, BundleConfig, PredictorConfig, read_config
from .mark import check_mark
from .named import ALIAS, find_model, shipped_bundle
from .predictor import HIDDEN_STATE, KEYS_VALUES, Predictor, plan_blocks

FLOAT_DTYPES = ("F16", "BF16", "F32")


@dataclass
class KVPModel:
    """What the pipeline runs.

    Attributes:
        base: the mlx-lm model that answers.
        auxiliary: the mlx-lm model that reads the prompt; for a prefix, the base's own first layers.
        predictor: the maps from the auxiliary's reading to the base's raw keys and values.
        tokenizer: mlx-lm's tokeniser, or None where the base brings none.
        config: kvp.json.
        base_config: the base's config.json.
        base_path: where the base was read from.
        hosts: among which base and predictor are spread, so that this is one host's part of them.
    """

    base: nn.Module
    auxiliary: nn.Module
    predictor: Predictor
    tokenizer: TokenizerWrapper | None
    config: BundleConfig
    base_config: dict[str, Any]
    base_path: Path = Path()
    hosts: Hosts | None = None

    @property
    def is_prefix(self) -> bool:
        """Whether the auxiliary is a part of the base and shares its cache."""
        return self.config.auxiliary.kind == "prefix"

    @property
    def has_exact_prefix(self) -> bool:
        """Whether the layers shared with the base read the prompt just as the base would."""
        return self.is_prefix and self.config.auxiliary.adapter_rank is None

    @property
    def text_tokenizer(self) -> TokenizerWrapper:
        """The tokeniser, for callers that cannot do without.

        Raises:
            InputError: the base brings none.
        """
        if self.tokenizer is None:
            raise InputError("this bundle's base has no tokeniser; pass token ids from Python instead.")
        return self.tokenizer

    @property
    def vocabulary_size(self) -> int:
        """How many token ids there are; of some models' arguments, which name none, as many as the tokeniser has."""
        return getattr(self.base.args, "vocab_size", None) or len(self.text_tokenizer.vocab)

    @property
    def context_length(self) -> int | None:
        """The context window in tokens that base and auxiliary share, where their configs state one."""
        stated = [context_length(self.base_config), context_length(vars(self.auxiliary.args))]
        return min((length for length in stated if length is not None), default=None)


def load(
    name: str = ALIAS,
    *,
    base_name: str | None = None,
    allow_base_mismatch: bool = False,
    progress: Progress | None = None,
    hosts: Hosts | None = None,
) -> KVPModel:
    """Load a bundle from a directory, a Hub id or the alias ``smollm2-135m``.

    Args:
        name: where the bundle is.
        base_name: run on this copy of the base, in another precision say (default: the one that kvp.json names).
        allow_base_mismatch: run on another base than the maps were made for.
        progress: called with (done, in all), of tensors where a named base is made, then of the base's MB.
        hosts: keep this host's part of the base and of the maps; an auxiliary that is no prefix stays whole.

    Raises:
        InputError: nothing of that name (or a subclass, for what is wrong with a bundle that is there), or what cannot
            be spread over hosts.
        BundleError: a missing, damaged, newer or ill-fitting part.
        UnsupportedModelError: a base or auxiliary that cannot be predicted.
    """
    directory = bundle_directory(name)
    config = read_config(directory)
    if hosts is not None:
        _check_spreadable(config)
    weights = directory / "predictor.safetensors"
    tensors = read_header(weights)
    base_path = base_directory(config.base, directory, progress) if base_name is None else find_model(base_name)
    is_known = allow_base_mismatch or fingerprint(base_path) == config.base.fingerprint
    if not is_known and config.base.mark is None:
        _check_fingerprint(base_path, config.base.fingerprint)
    base, base_config = load_model(base_path)
    if not allow_base_mismatch and config.base.mark is not None:
        _check_architecture(config.base.mark.arguments.get("model_type"), base, base_path)
    auxiliary = load_auxiliary(base, config, directory)
    predictor = build_predictor(base, auxiliary, config)
    _match_quantisation(predictor, tensors, weights)
    _check_tensors(tree_flatten(predictor.parameters()), tensors, weights)
    tokenizer = load_tokenizer(base_path, base_config)
    if not is_known and config.base.mark is not None:
        check_mark(config.base.mark, base, tokenizer)
    fit_to_device(base, progress, hosts)
    if config.auxiliary.kind != "prefix":
        fit_to_device(auxiliary)
    elif config.auxiliary.adapter_rank is not None:
        auxiliary = adapted_prefix(base, config.auxiliary.layers, config.auxiliary.adapter_rank)
        _load_adapter(auxiliary, compute_dtype(base), directory / "adapter.safetensors")
    else:
        auxiliary = prefix_model(base, config.auxiliary.layers)  # again, now that the base has its final weights
    predictor.load_weights(str(weights))
    dequantize_model(predictor)  # the maps are small, and prefill computes with them what it computes with
    predictor.set_dtype(compute_dtype(base))
    if hosts is not None:
        targets = enumerate(targets_of(base))
        predictor.keep_part({(layer, each.name): each.width for layer, own in targets for each in own}, hosts.rank)
    mx.eval(predictor.parameters())
    _check_finite(predictor.parameters(), weights)
    config.check_files(directory)
    return KVPModel(base, auxiliary, predictor, tokenizer, config, base_config, base_path, hosts)


def load_any(
    name: str = ALIAS,
    *,
    base_name: str | None = None,
    allow_base_mismatch: bool = False,
    progress: Progress | None = None,
    hosts: Hosts | None = None,
) -> KVPModel:
    """Load a bundle, or any other model that mlx-lm runs: it reads every prompt in full (``config.has_predictor``).

    Args:
        name: see ``load``.
        base_name: see ``load``; of a bundle only.
        allow_base_mismatch: see ``load``.
        progress: see ``load``.
        hosts: see ``load``.

    Raises:
        InputError: see ``load``.
    """
    directory = bundle_directory(name)
    if (directory / "kvp.json").exists() or not (directory / "config.json").exists():
        how: dict[str, Any] = {"base_name": base_name, "allow_base_mismatch": allow_base_mismatch}
        return load(name, **how, progress=progress, hosts=hosts)
    if base_name is not None:
        raise InputError(f"{name} is no bundle, so there is no base to exchange; leave out --base.")
    base, base_config = load_any_model(directory)
    tokenizer = load_tokenizer(directory, base_config)
    fit_to_device(base, progress, hosts)
    layers = len(base.layers)
    config = BundleConfig(
        base=BaseConfig(fingerprint=fingerprint(directory), path=str(directory)),
        auxiliary=AuxiliaryConfig(kind="prefix", layers=layers),
        predictor=PredictorConfig(input="hidden_state", layer_map=(None,) * layers),
    )
    return KVPModel(base, base, Predictor([]), tokenizer, config, base_config, directory, hosts)


def describe(name: str) -> dict[str, Any]:
    """Return what ``kvp info`` shows: kvp.json and the sizes of the parts; no weights are loaded.

    Of a model without a bundle, what its layers are and whether they can be predicted (``describe_model``).
    """
    directory = bundle_directory(name)
    if (directory / "config.json").exists() and not (directory / "kvp.json").exists():
        return describe_model(directory)
    config = read_config(directory)
    tensors = read_header(directory / "predictor.safetensors")
    sizes = {
        part: sum(file.stat().st_size for file in files)
        for part, files in {
            "predictor": [directory / "predictor.safetensors"],
            "auxiliary": list((directory / "auxiliary").glob("*.safetensors")),
            "adapter": list(directory.glob("adapter.safetensors")),
        }.items()
    }
    return {
        "path": str(directory),
        **config.model_dump(mode="json", exclude={"predictor"}),
        "predictor": {
            "input": config.predictor.input,
            "layer_map": [None if s is None else list(s) for s in config.predictor.layer_map],
            "recompute": None if config.recompute is None else config.recompute.share,
            "preceding": config.predictor.preceding,
            "parameters": _parameters(config, tensors),
        },
        "size_bytes": sizes,
    }


def _parameters(config: BundleConfig, tensors: dict[str, TensorInfo]) -> int | None:
    """Count what a predictor holds; None where maps are quantised and nothing tells how wide they were."""
    hidden = config.base.mark.arguments.get("hidden_size") if config.base.mark else None
    width = None
    if isinstance(hidden, int) and config.predictor.input == HIDDEN_STATE:
        width = hidden * (1 + config.predictor.preceding)
    count = 0
    for name, tensor in tensors.items():
        if name.endswith((".scales", ".biases")):
            continue
        if f"{name.removesuffix('weight')}scales" not in tensors:
            count += math.prod(tensor.shape)
        elif width is None or config.auxiliary.kind != "prefix":
            return None
        else:
            count += tensor.shape[0] * width
    return count


def bundle_directory(name: str) -> Path:
    """Return the local directory of a bundle: the shipped default, a path, or a Hub id (downloaded once)."""
    return shipped_bundle(name) or find_model(name)


def base_directory(base: BaseConfig, bundle: Path, progress: Progress | None = None) -> Path:
    """Return the local directory of a bundle's base."""
    if base.path is not None:
        return bundle / base.path
    if base.hub_id is not None:  # never a folder of that name where one happens to stand
        hub_id, _, pinned = base.hub_id.partition("@")
        return download(hub_id, base.revision or pinned or None)
    return find_model(str(base.alias), progress=progress)


def load_auxiliary(base: nn.Module, config: BundleConfig, bundle: Path) -> nn.Module:
    """Cut the prefix off the base, or load the bundle's ``auxiliary/`` or a named base with the bundle's updates.

    Raises:
        BundleError: an auxiliary with other weights than kvp.json says, or that cannot read the base's token ids.
    """
    if config.auxiliary.kind == "prefix":
        return prefix_model(base, config.auxiliary.layers)
    place = bundle / "auxiliary" if config.auxiliary.alias is None else find_model(config.auxiliary.alias)
    if config.auxiliary.fingerprint is not None:
        _check_fingerprint(place, config.auxiliary.fingerprint)
    auxiliary, _ = load_model(place)
    if base.args.vocab_size != auxiliary.args.vocab_size:
        raise BundleError(
            f"the auxiliary's vocabulary ({auxiliary.args.vocab_size}) is not the base's ({base.args.vocab_size}); "
            "choose an auxiliary of the same tokeniser."
        )
    if config.auxiliary.alias is not None and config.auxiliary.layers < len(auxiliary.layers):
        auxiliary = only_layers(auxiliary, range(len(auxiliary.layers))[: config.auxiliary.layers])
    if config.auxiliary.adapter_rank is not None:
        add_adapter(auxiliary, config.auxiliary.adapter_rank)
        _load_adapter(auxiliary, compute_dtype(auxiliary), bundle / "adapter.safetensors")
        take_up(auxiliary)
    return auxiliary


def build_predictor(base: nn.Module, auxiliary: nn.Module, config: BundleConfig) -> Predictor:
    """Return a predictor with untrained maps of the shapes that a configuration asks for.

    Raises:
        BundleError: the layer map does not fit the models, or the base cannot recompute what kvp.json says.
    """
    config.check_layers(len(base.layers), len(auxiliary.layers))
    if config.recompute is not None and (fixed := fixed_kinds(base)):
        raise BundleError(
            f"kvp.json has a section recompute, but layers of {' and '.join(fixed)} keep no entries that could be "
            "recomputed; fit or train the bundle again."
        )
    return Predictor(
        plan_blocks(
            config.predictor.layer_map,
            config.predictor.input,
            targets_of(auxiliary),
            hidden_size(base if config.auxiliary.kind == "prefix" else auxiliary),
            targets_of(base),
            config.predictor.preceding,
        ),
        has_deviation=config.recompute is not None,
    )


def _check_spreadable(config: BundleConfig) -> None:
    """Refuse a prefix that hosts could not read alike without asking each other."""
    if config.auxiliary.adapter_rank is not None and config.auxiliary.kind == "prefix":
        raise InputError("a prefix with low-rank updates is not spread over hosts; use one host.")
    if config.auxiliary.kind == "prefix" and config.predictor.input == KEYS_VALUES:
        raise InputError("a predictor that reads the prefix's keys and values is not spread over hosts; use one host.")


def _check_fingerprint(model: Path, expected: str) -> None:
    found = fingerprint(model)
    if found != expected:
        raise BundleError(
            f"{model} is not the model that this bundle was made with (fingerprint {found[7:19]}, expected "
            f"{expected[7:19]}); restore it, fit a bundle for it, or (for the base) pass --allow-base-mismatch."
        )


def _check_architecture(expected: Any, base: nn.Module, path: Path) -> None:
    """Refuse a base of another architecture, by its kinds of layer, before its tensors are compared."""
    found = getattr(base.args, "model_type", None)
    if None not in (expected, found) and found != expected:
        kinds = " and ".join(sorted({kind.title for kind in kinds_of(base)}))
        raise BundleError(
            f"the bundle was made for a {expected} model, and {path} is a {found} one (layers of {kinds}); fit a "
            "bundle for it, or pass --allow-base-mismatch."
        )


def _load_adapter(model: nn.Module, dtype: mx.Dtype, path: Path) -> None:
    """Load the low-rank updates of ``adapter.safetensors``, plain or quantised, into an adapted model."""
    found, needed = read_header(path), adapter_weights(model)
    schemes: dict[str, tuple[int, int]] = {}
    stored_as: list[tuple[str, mx.array]] = []
    for name, array in needed.items():
        if name not in found or f"{name}.scales" not in found:
            stored_as.append((name, array))
            continue
        try:
            size, bits = schemes[name] = _scheme(array, found[name], found[f"{name}.scales"])
            parts = mx.quantize(mx.zeros(array.shape), group_size=size, bits=bits)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise BundleError(f"{path} is quantised in a way that mlx does not know; get the bundle again.") from error
        stored_as += zip((name, f"{name}.scales", f"{name}.biases"), parts, strict=True)
    _check_tensors(stored_as, found, path)
    stored: Any = mx.load(str(path))
    updates: dict[str, mx.array] = {name: stored[name] for name in needed}
    for name, (size, bits) in schemes.items():
        scales, biases = stored[f"{name}.scales"], stored[f"{name}.biases"]
        updates[name] = mx.dequantize(stored[name], scales, biases, group_size=size, bits=bits)
    _check_finite(updates, path)
    model.load_weights([(name, array.astype(dtype)) for name, array in updates.items()], strict=False)


def _check_finite(parameters: Any, path: Path) -> None:
    if not all(mx.isfinite(array).all().item() for _, array in tree_flatten(parameters)):
        raise BundleError(f"{path} holds numbers that are not finite; get the bundle again.")


def _scheme(array: mx.array, weight: TensorInfo, scales: TensorInfo) -> tuple[int, int]:
    """Return the group size and bits that a matrix (.., width) was quantised with, from what is stored of it.

    Raises:
        ValueError: none that mlx knows, or no numbers at all (IndexError, ZeroDivisionError).
    """
    width = array.shape[-1]
    size, bits = width // scales.shape[-1], 32 * weight.shape[-1] // width
    if size not in GROUP_SIZES or bits not in QUANTISED_BITS:
        raise ValueError(f"groups of {size} in {bits} bits")
    return size, bits


def _match_quantisation(predictor: Predictor, found: dict[str, TensorInfo], path: Path) -> None:
    """Quantise the maps that are stored quantised, which their scales tell, as mlx-lm does."""

    def scheme(name: str, module: nn.Module) -> dict[str, int] | bool:
        if f"{name}.scales" not in found or f"{name}.weight" not in found:
            return False
        size, bits = _scheme(module.weight, found[f"{name}.weight"], found[f"{name}.scales"])
        return {"group_size": size, "bits": bits}

    try:
        nn.quantize(predictor, class_predicate=scheme)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise BundleError(f"{path} is quantised in a way that mlx does not know; get the bundle again.") from error


def _check_tensors(needed: list[tuple[str, mx.array]], found: dict[str, TensorInfo], path: Path) -> None:
    arrays = dict(needed)
    expected = {name: tuple(array.shape) for name, array in needed}
    if missing := sorted(expected.keys() - found.keys()):
        raise BundleError(f"{path} lacks the tensor {missing[0]}; get the bundle again.")
    if unknown := sorted(found.keys() - expected.keys()):
        raise BundleError(f"{path} has an unknown tensor {unknown[0]}; get the bundle again or upgrade kvp-mlx.")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise BundleError(f"{path}: {name} has shape {found[name].shape}, the base needs {shape}; get it again.")
        dtypes = ("U32",) if arrays[name].dtype == mx.uint32 else FLOAT_DTYPES
        if found[name].dtype not in dtypes:
            raise BundleError(f"{path}: {name} is {found[name].dtype}, not one of {', '.join(dtypes)}.")
