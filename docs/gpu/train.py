"""Train the maps that predict the upper layers' keys and values: closed form, the model's replies, gradient steps.

usage: train.py MODEL.npz DATA.npz OUT K,K,.. SECONDS [BITS] [options]

MODEL is what pack.py wrote, DATA what data.py wrote. Each K is a candidate: the first K layers read the prompt, and
from the input of layer K one linear map predicts the entries of all layers above it. SECONDS is the length of the
gradient steps alone, BITS what the maps are rounded to in the last two fifths of it (0: never). Prints validations:
candidate, text or reply and the share of exact tokens, mean KL over tokens 16 to 31 after a split, and over the rest.

Written to OUT at each validation: kK_W0.npy, kK_W1.npy, .. (the map's rows, at most 15 MiB a file) and kK_b.npy, fp16
and not rounded to BITS; besides, `begin`, the time at which the steps began, and at the end `done`.
Looked for in OUT every 20 steps, to change a run while it goes on: `seconds`, a number in the place of SECONDS (also
counted from `begin`), and `keep`, the candidates to go on with, as "12" or "11,12"; the others are dropped.

Shapes: B batch, T tokens, S splits, r tokens after a split, H hidden, NH query heads, NKV key heads, HD a head's size,
KV = NKV * HD.
"""

import argparse
import collections
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from base import CUDA, DEVICE, DTYPE, Model

EXACT = 16  # tokens after a split that do not count: a dial reads them exactly at a prompt's end
ASKING, REACH, BEFORE = 16, 12, 4  # tokens that choose what else is exact; how far after and before an attended one
START = time.time()


def say(*words):
    """Print, with the seconds since the start."""
    print(f"[{time.time() - START:6.1f}]", *words, flush=True)


def rounded(weight, bits):
    """Return a matrix as mlx's affine quantisation gives it back, in groups of 64."""
    group = weight.reshape(-1, 64)
    low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
    n = 2**bits - 1
    below = low.abs() > high.abs()
    scale = ((high - low) / n).clamp_min(1e-7)
    scale, edge = torch.where(below, scale, -scale), torch.where(below, low, high)
    steps = torch.round(edge / scale)
    scale = torch.where(steps == 0, scale, edge / steps).half().float()
    offset = torch.where(steps == 0, torch.zeros_like(edge), edge).half().float()
    return (torch.round((group - offset) / scale).clamp(0, n) * scale + offset).reshape(weight.shape)


class Map:
    """A candidate's map; `fit` sets weight (2*layers*KV, (1+preceding)*H) and bias."""

    def __init__(self, model, k, preceding, bits):
        self.k, self.preceding, self.bits, self.KV = k, preceding, bits, model.KV
        self.layers = range(k + 1, len(model.layers))
        self.weight, self.bias, self.rounds = None, None, False

    def inputs(self, reading):
        """Return each token's state and those of the tokens before it (or the first's), (B,T,(1+preceding)*H)."""
        h = reading.inputs[self.k]
        earlier = [torch.cat([h[:, :1]] * n + [h[:, :-n]], 1) for n in range(1, self.preceding + 1)]
        return torch.cat([h, *earlier], -1)

    def predict(self, reading):
        """Return keys before RoPE and values, (B,T,KV) each, by layer."""
        weight = self.weight
        if self.rounds:  # the gradient passes through
            weight = weight + (rounded(weight.detach(), self.bits) - weight.detach())
        y = F.linear(self.inputs(reading), weight.to(DTYPE)).float() + self.bias
        parts, n = y.split(self.KV, -1), len(self.layers)
        return {i: (parts[j], parts[n + j]) for j, i in enumerate(self.layers)}


def fit(model, maps, stream, tokens, rng):
    """Set the maps to ridge regressions over windows of 512 tokens of the stream."""
    window, batch = 512, 32 if CUDA else 2
    sums = dict.fromkeys(maps, (0, 0))
    for _ in range(max(1, tokens // (window * batch))):
        reading = model.read(random_windows(stream, batch, window, rng), min(maps))
        for k, m in maps.items():
            x = m.inputs(reading).float().flatten(0, 1)
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            y = torch.cat([reading.entries[i][part].float() for part in (0, 1) for i in m.layers], -1).flatten(0, 1)
            sums[k] = sums[k][0] + (x.T @ x).double(), sums[k][1] + (x.T @ y).double()
    for k, m in maps.items():
        xx, xy = sums[k]
        ridge = torch.full((len(xx),), 1e-4 * xx.diagonal()[:-1].mean().item(), dtype=torch.float64, device=DEVICE)
        ridge[-1] = 0  # the bias
        solution = torch.linalg.solve(xx + torch.diag(ridge), xy).float()
        m.weight = solution[:-1].T.contiguous().requires_grad_()
        m.bias = solution[-1].clone().requires_grad_()


def after_splits(splits, r):
    """Return the places (S,r) of the tokens from each split on."""
    return torch.tensor([[split + j for j in range(r)] for split in splits], device=DEVICE)


def exact_tokens(model, m, reading, splits, share):
    """Return the share of tokens before each split that layer K attends to most from it on, (B,S,T) bool."""
    layer, h, n = model.layers[m.k], reading.inputs[m.k], model.NH * model.HD
    B, T = h.shape[:2]
    asking, places = after_splits(splits, ASKING).flatten(), torch.arange(T, device=DEVICE)
    q = F.linear(h[:, asking], layer.qkv[:n]).float() + layer.bias[:n]
    k = model.wide(model.heads(reading.entries[m.k][0], places))
    scores = (model.heads(q, asking) @ k.transpose(-1, -2)).float() / math.sqrt(model.HD)
    attention = scores.masked_fill(places > asking[:, None], -1e9).softmax(-1).amax(1)
    attention = attention.reshape(B, len(splits), ASKING, T).amax(2)
    attention = F.max_pool1d(F.pad(attention, (REACH, BEFORE)), REACH + BEFORE + 1, 1)
    split = torch.tensor(splits, device=DEVICE)[:, None]
    attention = torch.where(places < split, attention, torch.full_like(attention, -1.0))
    rank = attention.argsort(-1, descending=True).argsort(-1)
    return (rank < (share * split).round()) & (places < split)


def student(model, m, predicted, reading, splits, r, share, with_error=True):
    """Return KL (B,S,r) of the base on predicted entries from the base itself, and the error (B,S,r) of its streams.

    From each split on r tokens are read, all splits in one pass: they see the entries before their split, predicted
    but for a share of exact ones, and their own. The error is relative, the mean over the layers above K.
    """
    B, T = reading.streams[m.k].shape[:2]
    own, places = after_splits(splits, r).flatten(), torch.arange(T, device=DEVICE)
    of = torch.arange(len(splits), device=DEVICE).repeat_interleave(r)
    before = (places < torch.tensor(splits, device=DEVICE)[:, None]).expand(B, -1, -1)
    seen = [before]
    if share > 0:
        exact = exact_tokens(model, m, reading, splits, share)
        seen = [before & ~exact, exact]
    within = (of[:, None] == of) & (own[:, None] >= own)
    seen = torch.cat([part.repeat_interleave(r, 1) for part in seen] + [within.expand(B, -1, -1)], -1)
    mask = torch.zeros(seen.shape, dtype=DTYPE, device=DEVICE).masked_fill_(~seen, float("-inf"))[:, None]
    pad = -mask.shape[-1] % 8
    mask = F.pad(mask, (0, pad), value=float("-inf")).expand(-1, model.NH, -1, -1)
    x, error = reading.streams[m.k + 1][:, own], 0.0
    for i in m.layers:
        layer = model.layers[i]
        q, k, v = model.project(layer, model.normalise(x, layer.norm1))
        cached = [predicted[i], reading.entries[i]] if share > 0 else [predicted[i]]
        keys = [model.heads(part, places) for part, _ in cached] + [model.heads(k, own)]
        values = [model.heads(part) for _, part in cached] + [model.heads(v)]
        keys, values = (F.pad(torch.cat(parts, 2), (0, 0, 0, pad)) for parts in (keys, values))
        x = model.finish(layer, x, model.attend(model.heads(q, own), keys, values, attn_mask=mask))
        if with_error:
            true = reading.streams[i + 1][:, own]
            change = (true - reading.streams[m.k][:, own]).square().sum(-1) + 1e-6
            error = error + (x - true).square().sum(-1) / change
    with torch.no_grad():
        target = model.logits(reading.streams[len(model.layers)][:, own]).log_softmax(-1)
    kl = F.kl_div(model.logits(x).log_softmax(-1), target, log_target=True, reduction="none").sum(-1)
    shape = (B, len(splits), r)
    return kl.reshape(shape), (error / len(m.layers)).reshape(shape) if with_error else None


def random_windows(stream, n, tokens, rng):
    """Return n windows (n,T) from anywhere in a stream."""
    starts = [rng.randrange(len(stream) - tokens) for _ in range(n)]
    return torch.stack([stream[start : start + tokens] for start in starts])


def answer(model, prompts, stops, args):
    """Return prompts (N,T') with the model's replies, (N,T), and which tokens stand before a reply's end or are it."""
    prompts = torch.from_numpy(prompts.astype(np.int64)).to(DEVICE)[: args.prompts]
    ids = torch.cat([model.reply(part, args.reply_tokens) for part in prompts.split(args.reply_batch)])
    stopped = torch.isin(ids, stops) & (torch.arange(ids.shape[1], device=DEVICE) >= prompts.shape[1])
    return ids, F.pad(stopped.int().cumsum(1), (1, -1)) == 0


def draw(stream, pools, args, rng, before=0):
    """Return a step's ids and which of them count, (B,T) each, splits, r and the share of exact tokens.

    A split at the end of a prompt may lie up to `before` tokens earlier, so that its request is predicted.
    """
    kind = rng.random()
    share = rng.choice([0.0, 0.0, 0.05, 0.05, 0.1])
    if kind < 0.55:
        tokens = rng.choice([args.window, args.window, args.window, args.window // 2, 2 * args.window])
        ids = random_windows(stream, max(1, args.batch * args.window // tokens), tokens, rng)
        n, r = args.splits * tokens // args.window, args.after
        if rng.random() < 0.25:
            n, r = max(1, n // 2), 2 * args.after
        return ids, torch.ones_like(ids, dtype=torch.bool), sorted(rng.sample(range(24, tokens - r), n)), r, share
    (ids, kept), batch = (pools[0], args.batch) if kind < 0.85 else (pools[1], 2 * args.batch)
    rows = torch.tensor([rng.randrange(len(ids)) for _ in range(batch)], device=DEVICE)
    r, end = min(args.reply_tokens, 160), ids.shape[1] - args.reply_tokens - EXACT
    if rng.random() < 0.7:
        end -= rng.randrange(before + 1) if before else 0
        splits = [end, rng.randrange(24, end - r)] if end + EXACT > 400 else [end]
    else:
        splits = [end + rng.randrange(0, max(1, args.reply_tokens - r))]
    return ids[rows], kept[rows], splits, r, share


@torch.no_grad()
def validate(model, maps, checks):
    """Return, by candidate, the mean KL of each check and share: over 16 tokens after the exact ones, and the rest."""
    result = {k: {} for k in maps}
    for name, (ids, kept, splits, r) in checks.items():
        sums = collections.defaultdict(int)
        for part, kept_part in zip(ids.split(8), kept.split(8), strict=True):
            reading, count = model.read(part, min(maps)), kept_part[:, after_splits(splits, r)].float()
            for k, m in maps.items():
                predicted = m.predict(reading)
                for share in (0.0, 0.05, 0.1):
                    kl, _ = student(model, m, predicted, reading, splits, r, share, with_error=False)
                    near_far = [x.sum() for y in (kl * count, count) for x in (y[..., EXACT:32], y[..., 32:])]
                    sums[k, share] += torch.stack(near_far)
        for (k, share), of in sums.items():
            near, far, n_near, n_far = of.tolist()
            result[k][f"{name} {share}"] = (round(near / n_near, 4), round(far / max(n_far, 1), 4))
    return result


def save(maps, out):
    """Write the maps."""
    for k, m in maps.items():
        weight = m.weight.detach().half().cpu().numpy()
        for j, rows in enumerate(np.array_split(weight, max(1, -(-weight.nbytes // (15 << 20))))):
            np.save(out / f"k{k}_W{j}.tmp.npy", rows)
            (out / f"k{k}_W{j}.tmp.npy").replace(out / f"k{k}_W{j}.npy")
        np.save(out / f"k{k}_b.npy", m.bias.detach().half().cpu().numpy())


def train(model, maps, stream, pools, checks, args, rng):
    """Train until the time is over, all maps on the same text: KL and five times the streams' error."""
    optimisers, rates = {}, {}
    for k, m in maps.items():
        rates[k] = args.rate * float(m.weight.detach().square().mean().sqrt())
        groups = [{"params": [m.weight], "weight_decay": 0.01}, {"params": [m.bias], "weight_decay": 0.0}]
        optimisers[k] = torch.optim.AdamW(groups, lr=rates[k], betas=(0.9, 0.95))
    say("start", json.dumps(validate(model, maps, checks)))
    save(maps, args.out)
    begin = last = time.time()
    (args.out / "begin").write_text(str(begin))
    seconds, steps, tokens, losses = args.seconds, 0, 0, {}
    while True:
        if steps % 20 == 0 and (args.out / "seconds").exists():
            seconds = float((args.out / "seconds").read_text())
        if steps % 20 == 0 and (args.out / "keep").exists():
            keep = (args.out / "keep").read_text().split(",")
            for k in [k for k in maps if str(k) not in keep]:
                say("dropped", k)
                del maps[k]
                losses.pop(k, None)
        done = (time.time() - begin) / seconds
        if done >= 1:
            break
        factor = min(1, (steps + 1) / 20) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        ids, kept, splits, r, share = draw(stream, pools, args, rng)
        reading = model.read(ids, min(maps))
        weight = kept[:, after_splits(splits, r)].float()  # (B,S,r)
        weight[..., :EXACT] = 0
        weight[..., EXACT:32] *= 2
        total = weight.sum().clamp_min(1)
        for k, m in maps.items():
            m.rounds |= args.bits > 0 and done > 0.6
            for group in optimisers[k].param_groups:
                group["lr"] = rates[k] * factor
            kl, error = student(model, m, m.predict(reading), reading, splits, r, share)
            kl, error = (kl * weight).sum(), (error * weight).sum()
            optimisers[k].zero_grad()
            (kl / total + 5 * error / total).backward()
            norm = torch.nn.utils.clip_grad_norm_([m.weight, m.bias], 1.0)
            optimisers[k].step()
            losses.setdefault(k, []).append(torch.stack([kl / total, error / total, norm]).detach())
        steps += 1
        tokens += ids.numel()
        if time.time() - last > args.every:
            means = {k: [round(x, 4) for x in torch.stack(rows).mean(0).tolist()] for k, rows in losses.items()}
            say(f"step {steps} tokens {tokens} share {done:.2f}", means)
            losses = {}
            say(json.dumps(validate(model, maps, checks)))
            save(maps, args.out)
            last = time.time()
    say(f"end step {steps} tokens {tokens}", json.dumps(validate(model, maps, checks)))
    save(maps, args.out)
    (args.out / "done").write_text("done")


def main():
    """Fit, answer, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in ("model", str), ("data", str), ("out", Path), ("layers", str), ("seconds", float):
        parser.add_argument(name, type=kind)
    parser.add_argument("bits", type=int, nargs="?", default=0)
    for name, default, what in (
        ("preceding", 1, "tokens before each whose states the maps read as well"),
        ("fit-tokens", 400000 if CUDA else 4096, "tokens of the closed form"),
        ("prompts", 100000, "prompts of each kind that the model answers, at most"),
        ("reply-tokens", 256 if CUDA else 32, "tokens of a reply"),
        ("reply-batch", 256, "prompts that are answered at a time"),
        ("window", 1024 if CUDA else 256, "tokens of a window of text"),
        ("batch", 8, "windows in a step"),
        ("splits", 8, "splits of a window"),
        ("after", 64, "tokens read after a split"),
        ("rate", 5e-3, "learning rate, relative to the weights' root mean square"),
        ("every", 25.0, "seconds between validations"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{what} (%(default)s)")
    args = parser.parse_args()
    if CUDA:
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(1)
    rng = random.Random(1)
    args.out.mkdir(parents=True, exist_ok=True)
    model, data = Model(args.model), np.load(args.data)
    say("weights", len(model.embedding), "rows", f"{torch.cuda.memory_allocated() / 1e9:.1f} GB" if CUDA else "")
    text, held_back = (torch.from_numpy(data[name].astype(np.int64)).to(DEVICE) for name in ("train", "val"))
    maps = {int(k): Map(model, int(k), args.preceding, args.bits) for k in args.layers.split(",")}
    fit(model, maps, text, args.fit_tokens, rng)
    say("closed form", {k: float(m.weight.detach().square().mean().sqrt()) for k, m in maps.items()})
    stops = torch.from_numpy(data["stops"]).to(DEVICE)
    long, short, checked = (answer(model, data[name], stops, args) for name in ("long", "short", "vlong"))
    replied = [round(float(kept[:, -args.reply_tokens :].float().mean()), 3) for _, kept in (long, short)]
    say("replies", [tuple(ids.shape) for ids, _ in (long, short)], replied)
    T, r, n = args.window, args.after, min(16, len(held_back) // args.window)
    rows, end = held_back[: n * T].reshape(n, T), checked[0].shape[1] - args.reply_tokens - EXACT
    checks = {
        "text": (rows, torch.ones_like(rows, dtype=torch.bool), [T // 2 - 64, T - r - 1], r),
        "reply": (*checked, [end], min(80, args.reply_tokens + EXACT)),
    }
    train(model, maps, text, (long, short), checks, args, rng)


if __name__ == "__main__":
    main()
