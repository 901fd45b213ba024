"""Make a bundle of what kvpc.py wrote: a named base that reads for another one, with updates and maps, quantised.

usage: store.py MAPS UPDATES AUXILIARY BASE OUT [--bits BITS] [--share SHARE] [--depth DEPTH]

MAPS and UPDATES are kvpc.py's OUT (of two runs, if the maps were trained after the updates), AUXILIARY and BASE names
of `kvp models`. The estimator of deviation is not fitted: which tokens are recomputed is chosen by attention alone.
"""

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np

from kvp_mlx.bundle.config import AuxiliaryConfig, BaseConfig, BundleConfig, PredictorConfig, RecomputeConfig
from kvp_mlx.bundle.layer_map import spread_layer_map
from kvp_mlx.bundle.mark import mark_of
from kvp_mlx.bundle.named import NAMED, find_model
from kvp_mlx.files.directories import atomic_directory
from kvp_mlx.models.loading import load_model, load_tokenizer

PARTS = {name: f"self_attn.{name}_proj" for name in "qkvo"} | {n: f"mlp.{n}_proj" for n in ("gate", "up", "down")}


def quantised(arrays, names, bits, size):
    """Return arrays as mlx stores them, those of `names` quantised; scales and offsets stand beside a map's weight."""
    found = {}
    for name, array in arrays.items():
        if name not in names:
            found[name] = array.astype(mx.float16)
            continue
        beside = name.removesuffix(".weight")
        weight, scales, offsets = mx.quantize(array.astype(mx.float32), group_size=size, bits=bits)
        found |= {
            name: weight,
            f"{beside}.scales": scales.astype(mx.float16),
            f"{beside}.biases": offsets.astype(mx.float16),
        }
    return found


def main():
    """Write the bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in ("maps", Path), ("updates", Path), ("auxiliary", str), ("base", str), ("out", Path):
        parser.add_argument(name, type=kind)
    parser.add_argument("--bits", type=int, default=6)
    parser.add_argument("--share", type=float, default=0.1, help="of a prompt's tokens to recompute (%(default)s)")
    parser.add_argument("--depth", type=int, help="layers that read, as MAPS was trained with (those of UPDATES)")
    args = parser.parse_args()
    base_path = find_model(args.base)
    base, base_config = load_model(base_path)
    stored = {name: array for file in args.updates.glob("lora?.npz") for name, array in np.load(file).items()}
    layers = args.depth or 1 + max(int(name.split(".")[0]) for name in stored)  # that read
    stored = {name: array for name, array in stored.items() if int(name.split(".")[0]) < layers}
    layer_map = spread_layer_map(len(base.layers), layers)
    weight = np.concatenate([np.load(file) for file in sorted(args.maps.glob("W?.npy"))])
    bias, maps = np.load(args.maps / "b.npy"), {}
    half = weight.shape[1] // 2  # keys, then values
    for j in range(layers):
        own = [i for i, sources in enumerate(layer_map) if sources == (j,)]
        rows = [(i, slice(part * half, (part + 1) * half)) for part in (0, 1) for i in own]
        maps[f"maps.hidden_{j}.weight"] = mx.array(np.concatenate([weight[row] for row in rows]))
        maps[f"maps.hidden_{j}.bias"] = mx.array(np.concatenate([bias[row] for row in rows]))
    maps = quantised(maps, {name for name in maps if name.endswith("weight")}, args.bits, 64)
    maps |= {"deviation.linear.weight": mx.zeros((1, weight.shape[2])), "deviation.linear.bias": mx.zeros(1)}
    updates, rank = {}, 0
    for name, array in stored.items():
        layer, part, end = name.split(".")
        updates[f"model.layers.{layer}.{PARTS[part]}.lora_{end}"] = mx.array(array)
        rank = array.shape[0] if end == "b" else rank
    updates = quantised(updates, updates, args.bits, 32)
    mark = mark_of(base, load_tokenizer(base_path, base_config))
    config = BundleConfig(
        base=BaseConfig(fingerprint=NAMED[args.base].fingerprint, mark=mark, alias=args.base),
        auxiliary=AuxiliaryConfig(
            kind="model",
            layers=layers,
            fingerprint=NAMED[args.auxiliary].fingerprint,
            adapter_rank=rank,
            alias=args.auxiliary,
        ),
        predictor=PredictorConfig(input="hidden_state", layer_map=layer_map, preceding=1),
        recompute=RecomputeConfig(share=args.share, attention_weight=1.0, attention_reach_before=4, lower_layers=1.0),
        training={"method": "docs/gpu/kvpc.py"},
    )
    with atomic_directory(args.out) as work:
        mx.save_safetensors(str(work / "predictor.safetensors"), maps)
        mx.save_safetensors(str(work / "adapter.safetensors"), updates)
        config.save(work)


if __name__ == "__main__":
    main()
