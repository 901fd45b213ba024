"""CoreNet's KV-prediction checkpoints, as bundles: base, auxiliary and maps of one file (method.md section 4)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import openelm

from ... import __version__
from ...bundle.config import AuxiliaryConfig, BaseConfig, BundleConfig, PredictorConfig
from ...bundle.layer_map import LayerMap
from ...bundle.loading import build_predictor
from ...bundle.predictor import KEYS_VALUES, Predictor
from ...bundle.presets import PRESETS, preset_parts
from ...errors import InputError
from ...models.families import kv_shapes
from ...models.safetensors import write_tensors
from ..card import describe_source, write_card
from ..checkpoint import Checkpoint, Shapes, open_checkpoint
from ..openelm import listed, model_name, openelm_config_of, same_shapes, shape_problems, write_openelm
from ..output import (
    NO_PROGRESS,
    Precision,
    Progress,
    check_finite,
    describe_model,
    describe_module,
    output_directory,
)
from ..tokenizer import check_tokenizer, write_tokenizer

PARTS = ("base", "auxiliary")
MAPS = "predicter.auxkv_to_basekv."  # the spelling is CoreNet's
KINDS = {"keys": "key_transforms", "values": "value_transforms"}


def convert_kvp(
    source: Path,
    out: Path,
    precision: Precision,
    *,
    preset: str | None = None,
    layer_map: Sequence[int] | None = None,
    tokenizer: str | None = None,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Write a CoreNet KV-prediction checkpoint as a bundle.

    Args:
        source: the ``.pt`` file.
        out: bundle directory to write.
        precision: dtype and quantisation of all three parts.
        preset: which published pair it is; or
        layer_map: the auxiliary layer that each base layer reads, for any other pair.
        tokenizer: Llama ``tokenizer.model``, directory or Hub id; default: none.
        force: replace an existing bundle.
        progress: called with (MB done, MB to do), for each part anew.

    Returns:
        What was written: ``out``, ``model``, source, and ``parts`` with the sizes of each.

    Raises:
        InputError: an unusable file or output, or tensors that do not fit the preset or the map.
        KVPError: the output cannot be written.
    """
    if (preset is None) == (layer_map is None):
        raise InputError("choose the layer map with exactly one of --preset NAME and --layer-map 0,0,1,...")
    if preset is not None:
        preset_parts(preset)  # refuses an unknown name before gigabytes are read
    with output_directory(out, force, [source], marker="kvp.json") as work:
        for part in PARTS:
            (work / part).mkdir()
            if tokenizer is not None:
                write_tokenizer(tokenizer, work / part)
        checkpoint = open_checkpoint(source)
        names = split_names(checkpoint.shapes)
        configs = {part: openelm_config_of(_shapes(checkpoint, names[part]), f"{part}.*") for part in PARTS}
        auxiliary, entries = layout_of(preset, layer_map, configs)
        models = {part: openelm.Model(openelm.ModelArgs.from_dict(configs[part])) for part in PARTS}
        check_maps(_shapes(checkpoint, names[MAPS]), models, entries)
        for part in PARTS:
            write_openelm(checkpoint, names[part], configs[part], work / part, precision, progress)
            check_tokenizer(work / part)
        parts = {part: describe_model(work / part) for part in PARTS}
        config = bundle_config({part: row["fingerprint"] for part, row in parts.items()}, auxiliary, entries)
        predictor = build_predictor(models["base"], models["auxiliary"], config)
        load_maps(predictor, checkpoint, precision)
        write_tensors(dict(tree_flatten(predictor.parameters())), work / "predictor.safetensors")
        origin = {
            "model": f"{model_name(configs['base'])} with auxiliary {model_name(configs['auxiliary'])}",
            "preset": preset,
            **describe_source(source, str(source)),
        }
        record = {"method": "converted", "kvp_mlx": __version__, **origin}
        config.model_copy(update={"training": record}).save(work)
        report = origin | totals(parts | {"predictor": describe_module(predictor)})
        write_card(work, out.name, report)
    return {"out": str(out), **report}


def bundle_config(marks: dict[str, str], auxiliary: AuxiliaryConfig, layer_map: LayerMap) -> BundleConfig:
    """Describe the bundle, given the fingerprints of both models."""
    return BundleConfig(
        base=BaseConfig(path="base", fingerprint=marks["base"]),
        auxiliary=auxiliary.model_copy(update={"fingerprint": marks["auxiliary"]}),
        predictor=PredictorConfig(input=KEYS_VALUES, layer_map=layer_map),
    )


def _shapes(checkpoint: Checkpoint, names: dict[str, str]) -> Shapes:
    return {short: checkpoint.shapes[name] for name, short in names.items()}


def split_names(shapes: Shapes) -> dict[str, dict[str, str]]:
    """Return for each of base, auxiliary and ``MAPS`` the full name of each tensor, to its name within the part.

    Raises:
        InputError: a tensor that belongs to no part.
    """
    prefixes = {f"{part}.": part for part in PARTS} | {MAPS: MAPS}
    names: dict[str, dict[str, str]] = {part: {} for part in prefixes.values()}
    for name in shapes:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            strays = [name for name in sorted(shapes) if not name.startswith(tuple(prefixes))]
            raise InputError(
                f"no part of a KV-prediction checkpoint has a place for {listed(strays)}; a plain OpenELM converts "
                "with 'kvp convert openelm'."
            )
        names[prefixes[prefix]][name] = name.removeprefix(prefix)
    return names


def layout_of(
    preset: str | None, layer_map: Sequence[int] | None, configs: dict[str, dict[str, Any]]
) -> tuple[AuxiliaryConfig, LayerMap]:
    """Return the auxiliary's kind and the layer map, checked against the shapes of both models.

    Raises:
        InputError: a preset of other shapes, a map that does not fit, or two vocabularies.
    """
    base, auxiliary = (configs[part] for part in PARTS)
    if base["vocab_size"] != auxiliary["vocab_size"]:
        raise InputError(f"the base has {base['vocab_size']} tokens, the auxiliary {auxiliary['vocab_size']}.")
    if preset is not None:
        if not fits(preset, base, auxiliary):
            fitting = [name for name in PRESETS if fits(name, base, auxiliary)]
            remedy = f"pass --preset {fitting[0]}" if fitting else "give its --layer-map"
            raise InputError(
                f"preset {preset} does not fit: the file holds {model_name(base)} with auxiliary "
                f"{model_name(auxiliary)}; {remedy}."
            )
        config = preset_parts(preset)[2]
        return config.auxiliary, config.predictor.layer_map
    depths = base["num_transformer_layers"], auxiliary["num_transformer_layers"]
    entries = tuple((source,) for source in layer_map or ())
    if len(entries) != depths[0]:
        raise InputError(f"--layer-map has {len(entries)} entries, the base {depths[0]} layers.")
    if past := [source for (source,) in entries if not 0 <= source < depths[1]]:
        raise InputError(f"--layer-map names auxiliary layer {past[0]}; there are 0 to {depths[1] - 1}.")
    return AuxiliaryConfig(kind="model", layers=depths[1]), entries


def fits(preset: str, base: dict[str, Any], auxiliary: dict[str, Any]) -> bool:
    """Return whether a preset's models have these shapes."""
    models = preset_parts(preset)[:2]
    return all(same_shapes(vars(model.args), config) for model, config in zip(models, (base, auxiliary), strict=True))


def check_maps(found: Shapes, models: dict[str, nn.Module], layer_map: LayerMap) -> None:
    """Check the maps' tensors, one weight ``(base width, auxiliary width)`` and bias per layer and kind.

    Raises:
        InputError: a missing, unknown or ill-shaped tensor, named.
    """
    base, auxiliary = (kv_shapes(models[part]) for part in PARTS)
    expected: Shapes = {}
    for layer, sources in enumerate(layer_map):
        read = sum(auxiliary[source].width for source in sources or ())
        for kind in KINDS.values():
            expected[f"{kind}.{layer}.weight"] = (base[layer].width, read)
            expected[f"{kind}.{layer}.bias"] = (base[layer].width,)
    if problems := shape_problems(found, expected):
        raise InputError(f"the maps ({MAPS}*) do not fit the models and the layer map: {problems}.")


def load_maps(predictor: Predictor, checkpoint: Checkpoint, precision: Precision) -> None:
    """Give a predictor the checkpoint's maps: those of the layers that read one source stand below each other.

    Raises:
        InputError: NaN or infinity.
    """
    dtype = getattr(mx, precision.dtype or checkpoint.dtype)
    arrays = {}
    for name, array in checkpoint.read(name for name in checkpoint.shapes if name.startswith(MAPS)):
        short = name.removeprefix(MAPS)
        arrays[short] = array.astype(dtype)
        check_finite(name, arrays[short])
    for block in predictor.blocks:
        parts = [f"{KINDS[kind]}.{layer}" for layer, kind, _ in block.targets]
        for suffix in ("weight", "bias"):  # (out, in) and (out,) -> (sum of out, in) and (sum of out,)
            predictor.maps[block.name][suffix] = mx.concatenate([arrays[f"{part}.{suffix}"] for part in parts])
    if precision.q_bits is not None:
        group = precision.group_size  # as mlx-lm: whatever is too narrow for a group stays as it is
        fits_groups = lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % group == 0  # noqa: E731
        nn.quantize(predictor, group, precision.q_bits, class_predicate=fits_groups)


def totals(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return ``parts`` with the sums over them."""
    parameters, size = (sum(part[key] for part in parts.values()) for key in ("parameters", "size_bytes"))
    tensors = sum(part["tensors"] for part in parts.values())
    bits = round(8 * size / parameters, 3)
    return {
        "parts": parts,
        "parameters": parameters,
        "tensors": tensors,
        "bits_per_weight": bits,
        "size_bytes": size,
    }
