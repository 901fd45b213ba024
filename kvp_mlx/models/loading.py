"""Ordinary mlx-lm models and tokenisers: finding them, loading them, fitting them to the device."""

import logging
import math
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer, TokenizerWrapper
from mlx_lm.utils import _get_classes, dequantize_model
from mlx_lm.utils import load_model as mlx_lm_load_model
from mlx_lm.utils import load_tokenizer as mlx_lm_load_tokenizer
from transformers import PretrainedConfig

from ..device import blas, jit
from ..device.hosts import Hosts
from ..errors import BundleError, InputError
from ..files import expanded, parse_json, read_json
from ..files.directories import recover
from .families import check_architecture, check_cache, is_listed, text_model
from .hub import download
from .pruning import DEPTH_KEYS
from .safetensors import GROUP_SIZES, QUANTISED_BITS, TensorInfo, check_quantised, weight_tensors
from .sharding import shard

MEGABYTE = 10**6
Progress = Callable[[int, int], None]
NO_CODE = {"trust_remote_code": False}
"""For transformers: tokenisers of a directory's own code (``auto_map``) are refused without a question."""
WINDOW_KEYS = ("max_position_embeddings", "max_context_length")
STRETCHING_ROPES = ("yarn", "linear", "dynamic")
NUMBERED = re.compile(r"\.(\d+)\.")


def model_directory(name: str, revision: str | None = None, *, known: str | None = None) -> Path:
    """Return the local directory of a model: a path, or a Hub id (downloaded once).

    Args:
        name: ``owner/name@revision`` pins a Hub id to a branch, tag or commit.
        revision: likewise, and wins over one in the name.
        known: a name that the caller knows besides, one of several, for the message.

    Raises:
        InputError: nothing of that name here, and no Hub to ask.
    """
    if not name.strip():
        raise InputError("the model's name is empty; give a directory or a Hub id.")
    path = expanded(name)
    recover(path)
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        named = f" or '{known}'. 'kvp models ls' lists the other names" if known else ""
        raise InputError(f"{name} is no directory, Hub id (owner/name){named}.")
    hub_id, _, pinned = name.partition("@")
    return download(hub_id, revision or pinned or None)


def load_model(directory: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load an mlx-lm model directory lazily, with its config, checking that it is whole and supported.

    Of a model that has other parts beside a language model (for images), that is what is returned.

    Raises:
        BundleError: missing or damaged files.
        UnsupportedModelError: an architecture that has no row in ``families``, or a layer of no kind that can be
            predicted; no weights have been read then.
    """
    config = read_config(directory)
    check_architecture(config["model_type"], text_config(config).get("model_type"))
    return load_any_model(directory, check_cache)


def load_any_model(
    directory: Path, check: Callable[[nn.Module], None] = lambda model: None
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model directory of any architecture that mlx-lm knows, as ``load_model`` does.

    Args:
        directory: where it is.
        check: what else may refuse the model, before its weights are read.

    Raises:
        BundleError: missing or damaged files, or none of mlx-lm's.
    """
    config = read_config(directory)
    changes = rope_fields(config)
    if text := text_config(config):
        changes["text_config"] = text | rope_fields(text)
    tensors = {name: tensor for name, _, tensor in weight_tensors(directory)}
    check_quantised(tensors, directory)
    check_depth(config, tensors, directory)
    check_quantisation(config, directory)
    check_ropes(config, directory)

    def classes(config: dict[str, Any]) -> Any:
        model_class, arguments_class = _get_classes(config)

        def build(arguments: Any) -> nn.Module:
            check_arguments(arguments, directory)
            model: nn.Module = model_class(arguments)
            text = getattr(text_model(model), "args", arguments)
            check_arguments(text, directory)
            own = config if text is arguments else text_config(config)
            if _ropes_by_layer(own) and "rope_parameters" not in vars(text):
                raise BundleError(
                    f"{directory}/config.json: mlx-lm's {own['model_type']} does not read rope_parameters by kind "
                    "of layer; convert the model with mlx-lm."
                )
            check(model)
            _check_groups(model, tensors, directory)
            return model

        return build, arguments_class

    try:
        model, config = mlx_lm_load_model(directory, lazy=True, model_config=changes, get_model_classes=classes)
        return (text_model(model), text_config(config) | config) if is_listed(model) else (model, config)
    except InputError:
        raise
    except Exception as error:  # mlx-lm raises whatever its model files raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__  # the names are on the second line
        raise BundleError(f"mlx-lm cannot load {directory}: {reason}") from error


def read_config(directory: Path) -> dict[str, Any]:
    """Return a model directory's config.json.

    Raises:
        BundleError: missing, unreadable, without an architecture, or one that wants code of the directory to run.
    """
    path = directory / "config.json"
    try:
        config: dict[str, Any] = read_json(path)
        if not isinstance(config["model_type"], str):
            raise TypeError("model_type is no text")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(f"{directory} holds no config.json; it is not an mlx-lm model directory.") from error
    except InputError as error:
        raise BundleError(f"config.json states no model_type; convert or download the model again: {error}") from error
    except (OSError, KeyError, TypeError) as error:
        raise BundleError(f"{path} states no model_type; convert or download the model again.") from error
    if config.get("model_file") is not None:
        raise BundleError(
            f"{path} names Python code to run (model_file), and code of a model directory never runs here; take a "
            "model of an architecture that mlx-lm knows."
        )
    return config


def check_depth(config: dict[str, Any], tensors: dict[str, TensorInfo], where: Path) -> None:
    """Refuse a config of more layers than there are weights for, before anybody builds them.

    Raises:
        BundleError: such a one, or a number of layers that is none.
    """
    numbers = [int(number) for name in tensors for number in NUMBERED.findall(name)]
    most = max(numbers, default=-1) + 1
    for key, depth in ((key, part.get(key)) for part in (config, text_config(config)) for key in DEPTH_KEYS):
        if depth is not None and (type(depth) is not int or not 0 < depth <= most):
            raise BundleError(
                f"{where}: Missing layers: config.json's {key} is {str(depth)[:40]}, the weights are of {most}; get "
                "the model again."
            )


def check_quantisation(config: dict[str, Any], where: Path) -> None:
    """Refuse quantisation settings that mlx has no kernels for; a group size of 0 would crash it.

    Raises:
        BundleError: such a ``group_size`` or number of ``bits``, anywhere in the settings.
    """
    settings = [config.get("quantization"), config.get("quantization_config")]
    if (where / "hf_quant_config.json").is_file():
        try:
            settings.append(read_json(where / "hf_quant_config.json"))
        except OSError as error:
            raise BundleError(f"{where}/hf_quant_config.json cannot be read ({error.strerror}).") from error
    while settings:
        part = settings.pop()
        if not isinstance(part, dict):
            continue
        settings += part.values()
        for key, known in (("group_size", GROUP_SIZES), ("bits", QUANTISED_BITS)):
            value = part.get(key)
            if value is not None and (type(value) is not int or value not in known):
                raise BundleError(
                    f"{where}: the quantisation's {key} is {str(value)[:40]}, mlx knows {', '.join(map(str, known))}; "
                    "take another quantisation of the model."
                )


def check_ropes(config: dict[str, Any], where: Path) -> None:
    """Refuse RoPE parameters that are infinite or no number (Python's JSON reads these), and bases and factors below 0.

    Raises:
        BundleError: such a one, anywhere in them.
    """
    found = [(key, value) for part in (config, text_config(config)) for key, value in part.items() if "rope" in key]
    while found:
        name, value = found.pop()
        if isinstance(value, dict):
            found += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            found += [(name, inner) for inner in value]
        elif type(value) in (int, float):
            is_scale = name.endswith(("theta", "freq", "base", "constant", "factor"))
            if not math.isfinite(value) or (is_scale and value <= 0):
                raise BundleError(f"{where}/config.json: {name} is {str(value)!r}; get the model again.")


def check_arguments(arguments: Any, where: Path) -> None:
    """Compare the fields of a config with the types that mlx-lm's model file gives them.

    Raises:
        BundleError: a number that is none, not finite, or negative where it counts something; heads that cannot share.
    """
    for name, kinds in _plain_types(type(arguments)).items():
        value = getattr(arguments, name)
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        is_right = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
        if float in kinds or int in kinds:
            is_right = is_number and (float in kinds or value == int(value) >= 0)
        elif kinds == (bool,):
            is_right = value in (True, False)
        if not is_right:
            raise BundleError(f"{where}/config.json: {name} is {str(value)[:40]!r}; get the model again.")
    heads, shared = (getattr(arguments, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if type(heads) is type(shared) is int and (not shared or heads % shared):
        raise BundleError(f"{where}/config.json: {heads} heads cannot share {shared} key/value heads.")


def _plain_types(arguments: type) -> dict[str, tuple[type, ...]]:
    """Return the fields of a model file's arguments that are numbers, truth values or text, perhaps optional."""
    plain = {}
    for name, hint in get_type_hints(arguments).items():
        choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kinds = tuple(kind for kind in choices if kind is not type(None))
        if kinds and all(kind in (int, float, bool, str) for kind in kinds):
            plain[name] = kinds
    return plain


def _check_groups(model: nn.Module, tensors: dict[str, TensorInfo], where: Path) -> None:
    """Refuse scales that do not fit the width of their module: mlx-lm would infer a group of 0, which crashes mlx."""
    for name, module in model.named_modules():
        scales, weight = (tensors.get(f"{name}.{part}") for part in ("scales", "weight"))
        if scales is None or weight is None or not hasattr(module, "to_quantized"):
            continue
        width, groups, bits = module.weight.shape[-1], scales.shape[-1], 32 * weight.shape[-1]
        if width % groups or width // groups not in GROUP_SIZES or bits % width or bits // width not in QUANTISED_BITS:
            raise BundleError(
                f"{where}: {name} is quantised with scales of shape {scales.shape}, which do not fit its width "
                f"{width}; get the model again."
            )


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a config says of the language model within a model; nothing where that is all there is."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else {}


def _ropes_by_layer(config: dict[str, Any]) -> bool:
    """Return whether a config has RoPE parameters for each kind of layer."""
    parameters = config.get("rope_parameters")
    return isinstance(parameters, dict) and any(isinstance(value, dict) for value in parameters.values())


def rope_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return ``rope_theta`` and ``rope_scaling`` for a config that has them as ``rope_parameters`` alone.

    transformers 5 writes these; mlx-lm's model files of the supported architectures read the former two.

    Raises:
        BundleError: RoPE parameters that are none.
    """
    parameters = config.get("rope_parameters")
    if parameters is None or _ropes_by_layer(config):
        return {}
    if not isinstance(parameters, dict):
        raise BundleError("config.json: rope_parameters is no object; get the model again.")
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    found = {"rope_theta": parameters.get("rope_theta"), "rope_scaling": scaling}
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        found["rope_scaling"] = None
    return {name: value for name, value in found.items() if value is not None and config.get(name) is None}


def fit_to_device(model: nn.Module, progress: Progress | None = None, hosts: Hosts | None = None) -> None:
    """Bring weights into the form that the device computes fast, in place, and evaluate them.

    CPUs have fast matmuls for fp32 only, so there everything is dequantised to fp32; GPUs run what is stored.

    Args:
        model: an mlx-lm model.
        progress: called with (MB done, MB in all).
        hosts: keep of the model this host's part, before anything is read; see ``sharding.shard``.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        if not blas.load_fast_blas():
            warnings.warn(f"{blas.OPENBLAS} not found, so matmuls run 30 times slower; {blas.REMEDY}", stacklevel=1)
        jit.secure_folder()
        model.set_dtype(mx.float32)  # the scales too: dequantising is then exact, and much faster than in fp16
        dequantize_model(model)
    if hosts is not None:
        shard(model, hosts)
    arrays = [array for _, array in tree_flatten(model.parameters())]
    done, total = 0, sum(array.nbytes for array in arrays)
    for array in arrays:
        mx.eval(array)
        done += array.nbytes
        if progress:
            progress(done // MEGABYTE, total // MEGABYTE)


def compute_dtype(model: nn.Module) -> mx.Dtype:
    """Return the dtype that the model's activations have."""
    return next(module.weight for module in model.modules() if is_norm(module)).dtype


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm with a weight; some model files have norms of their own."""
    weight = module.get("weight")
    return isinstance(weight, mx.array) and weight.ndim == 1


def load_tokenizer(directory: Path, config: dict[str, Any]) -> TokenizerWrapper | None:
    """Load the tokeniser of a model directory, or None where it has none.

    Raises:
        BundleError: tokeniser files that the library cannot read, or end tokens that are none of the model's.
    """
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    eos_token_ids = config.get("eos_token_id")
    _check_end_tokens(eos_token_ids, config, directory)
    plain = NO_CODE | {"config": PretrainedConfig()}
    try:
        try:
            how = plain if _is_whole(directory) else NO_CODE
            tokenizer = mlx_lm_load_tokenizer(directory, how, eos_token_ids=eos_token_ids)
        except TypeError:  # of transformers' own class for config.json (EXAONE 4's), which it does not need here
            tokenizer = mlx_lm_load_tokenizer(directory, plain, eos_token_ids=eos_token_ids)
    except BaseException as error:  # tokenizers and transformers raise plain Exception, or panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"the tokeniser in {directory} cannot be loaded ({error}); get the model again.") from error
    _pad_token_map(tokenizer.detokenizer, config.get("vocab_size"))
    return tokenizer


def _is_whole(directory: Path) -> bool:
    """Return whether tokenizer.json is the tokeniser, and no class that transformers knows for some model types.

    Of some (qwen2) it takes their own class whatever tokenizer_config.json names, with other rules and tokens.
    """
    try:
        named = parse_json((directory / "tokenizer_config.json").read_bytes(), "tokenizer_config.json")
    except (OSError, InputError):
        return False
    is_named = isinstance(named, dict) and named.get("tokenizer_class") == "PreTrainedTokenizerFast"
    return is_named and (directory / "tokenizer.json").exists()


def _check_end_tokens(ids: Any, config: dict[str, Any], where: Path) -> None:
    """Refuse ids, of config.json or generation_config.json, that the model never generates."""
    rows = config.get("vocab_size", text_config(config).get("vocab_size"))
    words = range(rows if type(rows) is int else 2**31)
    for token in ids if isinstance(ids, list) else [] if ids is None else [ids]:
        if type(token) is not int or token not in words:
            raise BundleError(
                f"{where}: eos_token_id is {str(token)[:40]}, the model's tokens are 0 to {len(words) - 1}; get the "
                "model again."
            )


def _pad_token_map(detokenizer: Any, vocabulary: Any) -> None:
    """Give ids beyond the tokeniser's (rows that pad a vocabulary) an empty text; mlx-lm's SPM detokeniser has none."""
    if isinstance(detokenizer, SPMStreamingDetokenizer) and isinstance(vocabulary, int):
        detokenizer.tokenmap += [b""] * (vocabulary - len(detokenizer.tokenmap))


def context_length(config: dict[str, Any]) -> int | None:
    """Return the context window in tokens that a model's config states, if any, RoPE's stretching included.

    YaRN, linear and dynamic scaling stretch the window that the model was trained with
    (``original_max_position_embeddings``, else ``max_position_embeddings``) by their factor; of the other kinds
    ``max_position_embeddings`` is the stretched one.
    """
    stated = next((config[key] for key in WINDOW_KEYS if isinstance(config.get(key), int)), None)
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if stated is None or not isinstance(scaling, dict):
        return stated
    factor, trained = scaling.get("factor"), scaling.get("original_max_position_embeddings") or stated
    is_stretched = scaling.get("rope_type", scaling.get("type")) in STRETCHING_ROPES
    if not is_stretched or not isinstance(factor, int | float) or not isinstance(trained, int):
        return stated
    return max(stated, int(factor * trained))
