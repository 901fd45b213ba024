"""The base model of train.py, frozen: its weights as pack.py wrote them, its readings, its replies.

Shapes: B batch, T tokens, H hidden, NH query heads, NKV key heads, HD a head's size, KV = NKV * HD.
"""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import gguf
import numpy as np
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA or os.environ.get("BF16") else torch.float32  # of matmuls' inputs


def tensor(name, arrays, meta):
    """Return one of the base's weights in fp32, whatever it is stored as."""
    kind, stored = meta["kinds"][name], arrays[name]
    if kind == "raw":
        return torch.from_numpy(stored.astype(np.float32)).to(DEVICE)
    if kind == "mlx":  # groups of 32 of 4 or 8 bits
        q = torch.from_numpy(stored.view(np.uint8)).to(DEVICE)
        scale, offset = (torch.from_numpy(arrays[name + end].astype(np.float32)).to(DEVICE) for end in ("|s", "|b"))
        if meta["bits"][name] == 4:
            q = torch.stack([q & 15, q >> 4], -1).reshape(q.shape[0], -1)
        groups = q.float().reshape(*scale.shape, -1)
        return (groups * scale[..., None] + offset[..., None]).reshape(scale.shape[0], -1)
    weight = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind]).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(weight)).to(DEVICE).half().float()


class Model:
    """The base, frozen. The residual stream is fp32."""

    def __init__(self, file):
        arrays = np.load(file)
        arrays = {name: arrays[name] for name in arrays.files}
        meta = json.loads(str(arrays["meta"]))
        with ThreadPoolExecutor(16) as pool:
            found = pool.map(lambda name: tensor(name, arrays, meta), meta["kinds"])
            weights = dict(zip(meta["kinds"], found, strict=True))
        self.NH, self.NKV, self.HD, self.KV = meta["NH"], meta["NKV"], meta["HD"], meta["NKV"] * meta["HD"]
        self.eps = meta["eps"]
        self.frequencies = meta["theta"] ** (-torch.arange(0, self.HD, 2, device=DEVICE, dtype=torch.float32) / self.HD)
        self.embedding, self.norm = weights["embed"], weights["norm"]
        self.head = weights.get("head", self.embedding).to(DTYPE)
        self.layers = []
        for i in range(meta["L"]):
            own = {name.split(".")[1]: weights.pop(name) for name in meta["kinds"] if name.startswith(f"{i}.")}
            layer = SimpleNamespace(o=own["o"].to(DTYPE), down=own["down"].to(DTYPE), norm1=own["n1"], norm2=own["n2"])
            layer.qkv = torch.cat([own["q"], own["k"], own["v"]]).to(DTYPE)
            biases = [own["qb"], own["kb"], own["vb"]] if "qb" in own else [torch.zeros(len(layer.qkv), device=DEVICE)]
            layer.bias = torch.cat(biases)
            layer.gate_up = torch.cat([own["gate"], own["up"]]).to(DTYPE)
            self.layers.append(layer)

    def normalise(self, x, weight):
        """Return RMSNorm of x (..,H)."""
        return ((x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)) * weight).to(DTYPE)

    def project(self, layer, h):
        """Return queries (B,T,NH*HD), keys and values (B,T,KV) in fp32, before RoPE."""
        return (F.linear(h, layer.qkv).float() + layer.bias).split([self.NH * self.HD, self.KV, self.KV], -1)

    def heads(self, x, places=None):
        """Return x (B,T,n*HD) by heads, (B,n,T,HD), after RoPE where the tokens' places (T,) are given."""
        x = x.unflatten(-1, (-1, self.HD))
        if places is not None:
            angles = places[:, None].float() * self.frequencies
            cos, sin = angles.cos()[:, None], angles.sin()[:, None]
            x1, x2 = x.chunk(2, -1)
            x = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
        return x.to(DTYPE).transpose(1, 2)

    def wide(self, x):
        """Return keys or values (B,NKV,T,HD) once for each query head, (B,NH,T,HD)."""
        return x[:, :, None].expand(-1, -1, self.NH // self.NKV, -1, -1).reshape(len(x), self.NH, *x.shape[2:])

    def attend(self, q, k, v, **mask):
        """Return what q (B,NH,T,HD) read from k and v (B,NKV,T',HD), (B,T,NH*HD)."""
        return F.scaled_dot_product_attention(q, self.wide(k), self.wide(v), **mask).transpose(1, 2).flatten(2)

    def finish(self, layer, x, read):
        """Return the stream (B,T,H) behind a layer, from what its attention read."""
        x = x + F.linear(read, layer.o).float()
        gate, up = F.linear(self.normalise(x, layer.norm2), layer.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, layer.down).float()

    def logits(self, x):
        """Return the logits (..,V) of a stream behind the last layer."""
        return F.linear(self.normalise(x, self.norm), self.head).float()

    @torch.no_grad()
    def read(self, ids, first):
        """Return what happens in each layer from `first` on when ids (B,T) are read, three dicts by layer.

        streams: (B,T,H) fp32, the residual stream into a layer, and under the number of layers what leaves the last.
        inputs: (B,T,H), the same normalised. entries: keys before RoPE in fp32, and values, (B,T,KV) each.
        """
        places = torch.arange(ids.shape[1], device=DEVICE)
        x, reading = self.embedding[ids], SimpleNamespace(streams={}, inputs={}, entries={})
        for i, layer in enumerate(self.layers):
            h = self.normalise(x, layer.norm1)
            q, k, v = self.project(layer, h)
            if i >= first:
                reading.streams[i], reading.inputs[i], reading.entries[i] = x, h, (k, v.to(DTYPE))
            read = self.attend(self.heads(q, places), self.heads(k, places), self.heads(v), is_causal=True)
            x = self.finish(layer, x, read)
        reading.streams[len(self.layers)] = x
        return reading

    @torch.no_grad()
    def reply(self, prompts, n, temperature=0.7):
        """Return prompts (B,T) with n sampled tokens after them, (B,T+n)."""
        B, T = prompts.shape
        cache = [torch.zeros(2, B, self.NKV, T + n, self.HD, dtype=DTYPE, device=DEVICE) for _ in self.layers]

        def run(ids, start):
            end = start + ids.shape[1]
            places = torch.arange(start, end, device=DEVICE)
            x = self.embedding[ids]
            for layer, (keys, values) in zip(self.layers, cache, strict=True):
                q, k, v = self.project(layer, self.normalise(x, layer.norm1))
                keys[:, :, start:end] = self.heads(k, places)
                values[:, :, start:end] = self.heads(v)
                q = self.heads(q, places)
                if ids.shape[1] > 1:
                    read = self.attend(q, keys[:, :, :end], values[:, :, :end], is_causal=True)
                else:
                    q = q.reshape(B, self.NKV, -1, self.HD)
                    scores = (q @ keys[:, :, :end].transpose(-1, -2)).float() / math.sqrt(self.HD)
                    read = (scores.softmax(-1).to(DTYPE) @ values[:, :, :end]).reshape(B, 1, -1)
                x = self.finish(layer, x, read)
            return self.logits(x[:, -1])

        tokens, logits = [prompts], run(prompts, 0)
        for j in range(n):
            tokens.append(torch.multinomial((logits / temperature).softmax(-1), 1))
            if j < n - 1:
                logits = run(tokens[-1], T + j)
        return torch.cat(tokens, 1)
