"""Pack a base's weights, as they are stored, into one .npz for train.py.

usage: pack.py BASE OUT.npz [--gguf FILE --data DATA.npz]

BASE is the base model's folder: config.json, and model.safetensors in mlx's quantised form. With --gguf the weights
are that file's, and of the vocabulary only the rows in DATA's `ids` are kept (data.py writes it).
Written: the arrays 0.q, 0.k, .. of each layer, embed, norm (and head), the scales and offsets of mlx's groups behind
|s and |b, and `meta`, JSON of the model's sizes and of how each array is stored. Prints the file's size in MiB.
"""

import argparse
import json
import os
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np

LAYER = [  # a layer's arrays: here, in mlx, in GGUF
    ("q", "self_attn.q_proj", "attn_q.weight"),
    ("k", "self_attn.k_proj", "attn_k.weight"),
    ("v", "self_attn.v_proj", "attn_v.weight"),
    ("qb", None, "attn_q.bias"),
    ("kb", None, "attn_k.bias"),
    ("vb", None, "attn_v.bias"),
    ("o", "self_attn.o_proj", "attn_output.weight"),
    ("gate", "mlp.gate_proj", "ffn_gate.weight"),
    ("up", "mlp.up_proj", "ffn_up.weight"),
    ("down", "mlp.down_proj", "ffn_down.weight"),
    ("n1", "input_layernorm", "attn_norm.weight"),
    ("n2", "post_attention_layernorm", "ffn_norm.weight"),
]


def from_mlx(file, layers):
    """Return arrays, kinds and bits by name: tied embeddings of 8 bits, all else of 4, norms in fp32."""
    stored = mx.load(str(file))
    sources = {f"{i}.{name}": f"model.layers.{i}.{s}" for i in range(layers) for name, s, _ in LAYER if s}
    sources |= {"embed": "model.embed_tokens", "norm": "model.norm"}
    arrays, kinds, bits = {}, {}, {}
    for name, source in sources.items():
        weight = stored[source + ".weight"]
        if source + ".scales" in stored:
            arrays[name] = np.array(weight)
            arrays[name + "|s"] = np.array(stored[source + ".scales"].astype(mx.float16))
            arrays[name + "|b"] = np.array(stored[source + ".biases"].astype(mx.float16))
            kinds[name], bits[name] = "mlx", 8 if name == "embed" else 4
        else:
            arrays[name], kinds[name] = np.array(weight.astype(mx.float32)), "raw"
    return arrays, kinds, bits


def from_gguf(file, layers, ids):
    """Return arrays and kinds by name, of embeddings and head only the rows in ids."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    sources = {f"{i}.{name}": f"blk.{i}.{s}" for i in range(layers) for name, _, s in LAYER}
    sources |= {"embed": "token_embd.weight", "head": "output.weight", "norm": "output_norm.weight"}
    arrays, kinds = {}, {}
    for name, source in sources.items():
        tensor = stored[source]
        arrays[name] = np.array(tensor.data)[ids] if name in ("embed", "head") else np.array(tensor.data)
        kinds[name] = "raw" if tensor.tensor_type.name == "F32" else tensor.tensor_type.name
    return arrays, kinds, {}


def main():
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", help="name of the .npz")
    parser.add_argument("--gguf", help="the base's GGUF")
    parser.add_argument("--data", help="what data.py wrote, with --gguf")
    args = parser.parse_args()
    config = json.loads((args.base / "config.json").read_text())
    if args.gguf:
        arrays, kinds, bits = from_gguf(args.gguf, config["num_hidden_layers"], np.load(args.data)["ids"])
    else:
        arrays, kinds, bits = from_mlx(args.base / "model.safetensors", config["num_hidden_layers"])
    sizes = {"L": "num_hidden_layers", "H": "hidden_size", "NH": "num_attention_heads", "NKV": "num_key_value_heads"}
    meta = {name: config[key] for name, key in sizes.items()}
    meta |= {"HD": meta["H"] // meta["NH"], "FF": config["intermediate_size"]}
    meta |= {"eps": config["rms_norm_eps"], "theta": config["rope_theta"], "kinds": kinds, "bits": bits}
    np.savez(args.out, meta=json.dumps(meta), **arrays)
    print(os.path.getsize(args.out) / 2**20)


if __name__ == "__main__":
    main()
