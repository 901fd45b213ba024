"""Train KVP-C: a smaller model reads for a larger one, with low-rank updates, and linear maps predict every layer.

usage: kvpc.py BASE.npz AUXILIARY.npz DATA.npz OUT SECONDS [BITS] [options]

BASE and AUXILIARY are what pack.py wrote (of one vocabulary), DATA what data.py wrote; AUXILIARY may arrive while the
base writes its replies. The maps begin in closed form, the updates at nothing; both are trained by the divergence of
what the base says after predicted entries from what it says after its own, as in train.py, and on windows to recite,
that end in pieces of themselves. Every base layer reads the auxiliary's layer that the paper's rule gives it, of the
first --depth: the state of a token and of the one before. SECONDS and BITS as there.
With --updates and --maps they begin as an earlier run's OUT has them.

Written to OUT at each save, fp16: W0.npy, W1.npy, .. (maps' rows by base layer: keys, then values), b.npy, and
lora0.npz, lora1.npz, .. (LAYER.NAME.a (in,rank), LAYER.NAME.b (rank,out), to be added SCALE times); at the end `done`.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from base import CUDA, DEVICE, DTYPE, Model
from train import EXACT, after_splits, answer, draw, random_windows, rounded, say

SCALE = 2.0  # of the low-rank updates, as kvp_mlx.bundle.adapter has it
FIRST = 16  # times that a text's first token counts in the closed form
PARTS = ("q", "k", "v", "o", "gate", "up", "down")


def by_rule(n_base, n_aux):
    """Return the auxiliary's layer that each base layer reads."""
    q, r = divmod(n_base, n_aux)
    return [j for j in range(n_aux) for _ in range(q + (j < r))]


class Auxiliary(Model):
    """The model that reads, with low-rank updates of all its matrices; rank 0 leaves it as it is."""

    def __init__(self, file, rank, depth):
        super().__init__(file)
        self.updates, n, self.depth = {}, self.NH * self.HD, depth or len(self.layers)
        for i, layer in enumerate(self.layers[: self.depth]):
            rows = {"q": n, "k": self.KV, "v": self.KV, "gate": len(layer.gate_up) // 2, "up": len(layer.gate_up) // 2}
            rows |= {"o": len(layer.o), "down": len(layer.down)}
            for part in PARTS if rank else ():
                width = {"o": layer.o, "down": layer.down}.get(part, layer.qkv).shape[1]
                a = (torch.rand(width, rank, device=DEVICE) * 2 - 1) / math.sqrt(width)
                b = torch.zeros(rank, rows[part], device=DEVICE)
                self.updates[i, part] = a.requires_grad_(), b.requires_grad_()

    def take_up(self, folder, freeze):
        """Begin with the updates that an earlier run wrote, or take them up once and for all."""
        stored = {}
        for file in Path(folder).glob("lora?.npz"):
            stored |= dict(np.load(file))
        with torch.no_grad():
            for (i, part), ab in self.updates.items():
                for name, x in zip("ab", ab, strict=True):
                    x.copy_(torch.from_numpy(stored[f"{i}.{part}.{name}"].astype(np.float32)))
            for i, layer in enumerate(self.layers[: self.depth] if freeze else ()):
                layer.qkv, layer.o = self.updated(i, layer.qkv, "q", "k", "v"), self.updated(i, layer.o, "o")
                layer.gate_up = self.updated(i, layer.gate_up, "gate", "up")
                layer.down = self.updated(i, layer.down, "down")
        self.updates = {} if freeze else self.updates

    def updated(self, i, weight, *parts):
        """Return a stored matrix with its updates, for matmuls."""
        if (i, parts[0]) not in self.updates:
            return weight
        change = torch.cat([(self.updates[i, part][0] @ self.updates[i, part][1]).T for part in parts])
        return (weight.float() + SCALE * change).to(DTYPE)

    def states(self, ids, with_stream=False):
        """Return what each layer's projections read of ids (B,T), (B,T,H) each; and the stream behind the last."""
        places = torch.arange(ids.shape[1], device=DEVICE)
        x, found = self.embedding[ids], []
        for i, layer in enumerate(self.layers):
            h = self.normalise(x, layer.norm1)
            found.append(h)
            if i == self.depth - 1 and not with_stream:
                break
            qkv = self.updated(i, layer.qkv, "q", "k", "v")
            q, k, v = (F.linear(h, qkv).float() + layer.bias).split([self.NH * self.HD, self.KV, self.KV], -1)
            read = self.attend(self.heads(q, places), self.heads(k, places), self.heads(v), is_causal=True)
            x = x + F.linear(read, self.updated(i, layer.o, "o")).float()
            gate_up = self.updated(i, layer.gate_up, "gate", "up")
            gate, up = F.linear(self.normalise(x, layer.norm2), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, self.updated(i, layer.down, "down")).float()
        return (found, x) if with_stream else found


class Maps:
    """The maps of all base layers; weight (n_base, 2*KV, 2*H_aux), bias (n_base, 2*KV)."""

    def __init__(self, base, sources, bits):
        self.base, self.sources, self.bits, self.rounds = base, sources, bits, False
        self.weight, self.bias = None, None

    def take_up(self, folder):
        """Begin with the maps that an earlier run wrote."""
        weight = np.concatenate([np.load(file) for file in sorted(Path(folder).glob("W?.npy"))])
        self.weight = torch.from_numpy(weight.astype(np.float32)).to(DEVICE).requires_grad_()
        self.bias = torch.from_numpy(np.load(Path(folder) / "b.npy").astype(np.float32)).to(DEVICE).requires_grad_()

    @staticmethod
    def input(h):
        """Return each token's state and that of the token before it (of the first: its own), (B,T,2*H)."""
        return torch.cat([h, torch.cat([h[:, :1], h[:, :-1]], 1)], -1)

    def predict(self, states):
        """Return keys before RoPE and values, (B,T,KV) each, by layer."""
        weight = self.weight
        if self.rounds:  # the gradient passes through
            flat = weight.detach().flatten(0, 1)
            weight = weight + (rounded(flat, self.bits) - flat).reshape(weight.shape)
        weight, found, inputs = weight.to(DTYPE), {}, {j: self.input(states[j]) for j in set(self.sources)}
        for i, j in enumerate(self.sources):
            found[i] = (F.linear(inputs[j], weight[i]).float() + self.bias[i]).chunk(2, -1)
        return found


def batches(stream, pools, args, rng):
    """Return what the closed form reads, ids (B,T) each: windows of 512 tokens of the stream, and all replies."""
    window, batch = 512, 32 if CUDA else 2
    found = [random_windows(stream, batch, window, rng) for _ in range(max(1, args.fit_tokens // (window * batch)))]
    for ids, _ in pools:
        found += ids.split(max(1, batch * window // ids.shape[1]))
    rng.shuffle(found)
    return found


@torch.no_grad()
def fit(base, auxiliary, maps, texts):
    """Set the maps to ridge regressions; the first token, to which all others attend, counts for many."""
    xx, xy = dict.fromkeys(set(maps.sources), 0), dict.fromkeys(range(len(maps.sources)), 0)
    for ids in texts:
        reading, states = base.read(ids, 0), auxiliary.states(ids)
        weight = torch.ones(*ids.shape, 1, device=DEVICE)
        weight[:, 0] = FIRST
        weight = weight.flatten(0, 1)
        for j in xx:
            x = maps.input(states[j]).float().flatten(0, 1)
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            xx[j] = xx[j] + (x.T @ (x * weight)).double()
            for i in [i for i, source in enumerate(maps.sources) if source == j]:
                y = torch.cat([part.float() for part in reading.entries[i]], -1).flatten(0, 1)
                xy[i] = xy[i] + (x.T @ (y * weight)).double()
    found = []
    for i, j in enumerate(maps.sources):
        ridge = torch.full(
            (len(xx[j]),), 1e-4 * xx[j].diagonal()[:-1].mean().item(), dtype=torch.float64, device=DEVICE
        )
        ridge[-1] = 0  # the bias
        found.append(torch.linalg.solve(xx[j] + torch.diag(ridge), xy[i]).float())
    maps.weight = torch.stack([one[:-1].T for one in found]).contiguous().requires_grad_()
    maps.bias = torch.stack([one[-1] for one in found]).contiguous().requires_grad_()


def student(model, predicted, reading, splits, r, with_error=True):
    """Return KL (B,S,r) of the base on predicted entries from the base itself, and its streams' relative error.

    From each split on r tokens are read, all splits in one pass: they see predicted entries before their split, and
    their own.
    """
    B, T = reading.streams[0].shape[:2]
    own, places = after_splits(splits, r).flatten(), torch.arange(T, device=DEVICE)
    of = torch.arange(len(splits), device=DEVICE).repeat_interleave(r)
    before = places < torch.tensor(splits, device=DEVICE)[of][:, None]
    seen = torch.cat([before, (of[:, None] == of) & (own[:, None] >= own)], -1)
    mask = torch.zeros(seen.shape, dtype=DTYPE, device=DEVICE).masked_fill_(~seen, float("-inf"))
    pad = -mask.shape[-1] % 8
    mask = F.pad(mask, (0, pad), value=float("-inf")).expand(B, model.NH, -1, -1)
    x, error = reading.streams[0][:, own], 0.0
    for i, layer in enumerate(model.layers):
        q, k, v = model.project(layer, model.normalise(x, layer.norm1))
        keys = [model.heads(predicted[i][0], places), model.heads(k, own)]
        values = [model.heads(predicted[i][1]), model.heads(v)]
        keys, values = (F.pad(torch.cat(parts, 2), (0, 0, 0, pad)) for parts in (keys, values))
        x = model.finish(layer, x, model.attend(model.heads(q, own), keys, values, attn_mask=mask))
        if with_error:
            true = reading.streams[i + 1][:, own]
            change = (true - reading.streams[0][:, own]).square().sum(-1) + 1e-6
            error = error + (x - true).square().sum(-1) / change
    with torch.no_grad():
        target = model.logits(reading.streams[len(model.layers)][:, own]).log_softmax(-1)
    kl = F.kl_div(model.logits(x).log_softmax(-1), target, log_target=True, reduction="none").sum(-1)
    shape = (B, len(splits), r)
    return kl.reshape(shape), (error / len(model.layers)).reshape(shape) if with_error else None


def draw_or_recite(stream, pools, args, rng):
    """Return what `draw` does; or a passage and pieces of it that the base can recite, with a split at each piece."""
    if rng.random() >= args.recite:
        return draw(stream, pools, args, rng, args.before)[:4]
    tokens, r = rng.choice([args.window, args.window, 2 * args.window]), args.after
    n = max(1, min(args.splits, tokens // (2 * r)))
    passages = random_windows(stream, max(1, args.batch * args.window // tokens), tokens - n * r, rng)
    pieces = [random_windows(passage, n, r, rng).flatten() for passage in passages]
    ids = torch.cat([passages, torch.stack(pieces)], 1)
    return ids, torch.ones_like(ids, dtype=torch.bool), list(range(tokens - n * r, tokens, r)), r


@torch.no_grad()
def validate(base, auxiliary, maps, checks, alone=False):
    """Return the mean KL of each check over 16 tokens after the exact ones, and the rest; or the auxiliary's own."""
    result = {}
    for name, (ids, kept, splits, r) in checks.items():
        sums = 0
        for part, kept_part in zip(ids.split(8), kept.split(8), strict=True):
            own = after_splits(splits, r)
            reading, count = base.read(part, 0), kept_part[:, own].float()
            if alone:
                logits = auxiliary.logits(auxiliary.states(part, True)[1][:, own.flatten()])
                target = base.logits(reading.streams[len(base.layers)][:, own.flatten()]).log_softmax(-1)
                kl = F.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="none").sum(-1)
                kl = kl.reshape(count.shape)
            else:
                kl, _ = student(base, maps.predict(auxiliary.states(part)), reading, splits, r, with_error=False)
            sums = sums + torch.stack([x.sum() for y in (kl * count, count) for x in (y[..., EXACT:32], y[..., 32:])])
        near, far, n_near, n_far = sums.tolist()
        result[name] = (round(near / n_near, 4), round(far / max(n_far, 1), 4))
    return result


def save(auxiliary, maps, out):
    """Write maps and updates."""
    weight = maps.weight.detach().half().cpu().numpy()
    for j, rows in enumerate(np.array_split(weight, max(1, -(-weight.nbytes // (15 << 20))))):
        np.save(out / f"W{j}.tmp.npy", rows)
        (out / f"W{j}.tmp.npy").replace(out / f"W{j}.npy")
    np.save(out / "b.npy", maps.bias.detach().half().cpu().numpy())
    lora = {
        f"{i}.{part}.{name}": x for (i, part), ab in auxiliary.updates.items() for name, x in zip("ab", ab, strict=True)
    }
    for j, names in enumerate(np.array_split(sorted(lora), 3) if lora else []):
        np.savez(out / f"lora{j}.tmp.npz", **{name: lora[name].detach().half().cpu().numpy() for name in names})
        (out / f"lora{j}.tmp.npz").replace(out / f"lora{j}.npz")


def train(base, auxiliary, maps, stream, pools, checks, args, rng):
    """Train until the time is over."""
    rate = args.rate * float(maps.weight.detach().square().mean().sqrt())
    low_rank = [x for ab in auxiliary.updates.values() for x in ab]
    groups = [
        {"params": [maps.weight], "weight_decay": 0.01, "lr": rate},
        {"params": [maps.bias], "weight_decay": 0.0, "lr": rate},
        {"params": low_rank, "weight_decay": 0.0, "lr": args.update_rate},
    ]
    optimiser = torch.optim.AdamW(groups[: 3 if low_rank else 2], betas=(0.9, 0.95), fused=CUDA)
    rates = [group["lr"] for group in optimiser.param_groups]
    begin = last = time.time()
    (args.out / "begin").write_text(str(begin))
    seconds, steps, tokens, losses = args.seconds, 0, 0, []
    while True:
        if steps % 20 == 0 and (args.out / "seconds").exists():
            seconds = float((args.out / "seconds").read_text())
        done = (time.time() - begin) / seconds
        if done >= 1:
            break
        maps.rounds |= args.bits > 0 and done > 0.7
        for group, own in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = own * min(1, (steps + 1) / 30) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        ids, kept, splits, r = draw_or_recite(stream, pools, args, rng)
        reading = base.read(ids, 0)
        weight = kept[:, after_splits(splits, r)].float()  # (B,S,r)
        weight[..., :EXACT] = 0
        weight[..., EXACT:32] *= 2
        total = weight.sum().clamp_min(1)
        kl, error = student(base, maps.predict(auxiliary.states(ids)), reading, splits, r)
        kl, error = (kl * weight).sum() / total, (error * weight).sum() / total
        optimiser.zero_grad()
        (kl + args.error * error).backward()
        norms = [torch.nn.utils.clip_grad_norm_([maps.weight, maps.bias], 1.0)]
        norms.append(torch.nn.utils.clip_grad_norm_(low_rank, 1.0) if low_rank else norms[0])
        if torch.isfinite(norms[0] + norms[1]) or not CUDA:
            optimiser.step()
        losses.append(torch.stack([kl, error, *norms]).detach())
        steps += 1
        tokens += ids.numel()
        if time.time() - last > args.every:
            means = [round(x, 4) for x in torch.stack(losses).mean(0).tolist()]
            memory = f"{torch.cuda.max_memory_allocated() / 1e9:.0f} GB" if CUDA else ""
            say(f"step {steps} tokens {tokens} share {done:.2f}", means, memory)
            losses = []
            say(json.dumps(validate(base, auxiliary, maps, checks)))
            save(auxiliary, maps, args.out)
            last = time.time()
    say(f"end step {steps} tokens {tokens}", json.dumps(validate(base, auxiliary, maps, checks)))
    save(auxiliary, maps, args.out)
    (args.out / "done").write_text("done")


def main():
    """Answer, fit, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in ("base", str), ("auxiliary", Path), ("data", str), ("out", Path), ("seconds", float):
        parser.add_argument(name, type=kind)
    parser.add_argument("bits", type=int, nargs="?", default=0)
    for name, default, what in (
        ("rank", 32, "of the updates; 0: none"),
        ("fit-tokens", 300000 if CUDA else 2048, "tokens of the closed form"),
        ("prompts", 100000, "prompts of each kind that the base answers, at most"),
        ("reply-tokens", 192 if CUDA else 32, "tokens of a reply"),
        ("reply-batch", 640, "prompts that are answered at a time"),
        ("window", 1024 if CUDA else 256, "tokens of a window of text"),
        ("batch", 8, "windows in a step"),
        ("splits", 8, "splits of a window"),
        ("after", 64, "tokens read after a split"),
        ("rate", 5e-3, "learning rate of the maps, relative to the weights' root mean square"),
        ("update-rate", 1e-3, "learning rate of the updates"),
        ("updates", "", "folder of updates to begin with"),
        ("maps", "", "folder of maps to begin with, in place of the closed form"),
        ("depth", 0, "layers of the auxiliary that read; 0: all"),
        ("recite", 0.15, "share of steps with windows to recite"),
        ("before", 0, "tokens before the end of a prompt that its split lies at most, besides those that are exact"),
        ("error", 5.0, "weight of the streams' error"),
        ("every", 60.0, "seconds between validations"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{what} (%(default)s)")
    parser.add_argument("--freeze", action="store_true", help="leave --updates as they are")
    args = parser.parse_args()
    if CUDA:
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(1)
    rng = random.Random(1)
    args.out.mkdir(parents=True, exist_ok=True)
    base, data = Model(args.base), np.load(args.data)
    say("weights", f"{torch.cuda.memory_allocated() / 1e9:.1f} GB" if CUDA else "")
    text, held_back = (torch.from_numpy(data[name].astype(np.int64)).to(DEVICE) for name in ("train", "val"))
    stops = torch.from_numpy(data["stops"]).to(DEVICE)
    long, short, checked = (answer(base, data[name], stops, args) for name in ("long", "short", "vlong"))
    replied = [round(float(kept[:, -args.reply_tokens :].float().mean()), 3) for _, kept in (long, short)]
    if CUDA:
        torch.cuda.empty_cache()
    say("replies", [tuple(ids.shape) for ids, _ in (long, short)], replied)
    while not args.auxiliary.exists():
        time.sleep(0.5)
    auxiliary = Auxiliary(args.auxiliary, args.rank, args.depth)
    maps = Maps(base, by_rule(len(base.layers), auxiliary.depth), args.bits)
    if args.updates:
        auxiliary.take_up(args.updates, args.freeze)
    if args.maps:
        maps.take_up(args.maps)
    else:
        fit(base, auxiliary, maps, batches(text, (long, short), args, rng))
    T, r, n = args.window, args.after, min(16, len(held_back) // args.window)
    rows, end = held_back[: n * T].reshape(n, T), checked[0].shape[1] - args.reply_tokens - EXACT
    checks = {
        "text": (rows, torch.ones_like(rows, dtype=torch.bool), [T // 2 - 64, T - r - 1], r),
        "reply": (*checked, [end], min(80, args.reply_tokens + EXACT)),
    }
    say("auxiliary alone", json.dumps(validate(base, auxiliary, maps, checks, alone=True)))
    say("start", json.dumps(validate(base, auxiliary, maps, checks)))
    train(base, auxiliary, maps, text, (long, short), checks, args, rng)


if __name__ == "__main__":
    main()
