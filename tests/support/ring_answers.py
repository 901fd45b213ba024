"""What a bundle answers, as one of several hosts; run as ``python -m support.ring_answers [--packed] MODEL...``."""

import json
import os
import socket
import sys
from collections.abc import Callable

import kvp_mlx  # noqa: F401 - first: it puts the fast BLAS in front

# isort: split
import mlx.core as mx

from kvp_mlx.arms.clock import first_token
from kvp_mlx.arms.kinds import parse_arm
from kvp_mlx.bundle.loading import KVPModel, load
from kvp_mlx.device.hosts import joined
from kvp_mlx.models import loading

PACKED = "--packed"
"""Let quantised weights stay so, as GPUs do."""
ARMS = ("full", "kvp", "kvp-8-0.3")
PROMPT_TOKENS, STEP_SIZE, NEW_TOKENS = 90, 32, 12
ACKNOWLEDGED = slice(120, 128)
"""Bytes that the peer has received, in Linux's ``struct tcp_info``."""


def answers(model: KVPModel, arm_name: str) -> list[list[int]]:
    """Return greedy answers to two prompts at once, read in chunks."""
    ids = mx.random.randint(3, model.base.args.vocab_size, (2, PROMPT_TOKENS), key=mx.random.key(5))
    first = first_token(model, parse_arm(arm_name), ids, step_size=STEP_SIZE)
    tokens = [first.tokens]
    for _ in range(NEW_TOKENS - 1):
        logits = first.network(mx.array(tokens[-1])[:, None], cache=first.cache)[:, -1]
        tokens.append(mx.argmax(logits, axis=-1).tolist())
    return tokens


def sent_bytes() -> int:
    """Return what this process's connections have sent until now, as the system counts it."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            place = os.readlink(f"/proc/self/fd/{name}")
            if place.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as line:
                    info = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += int.from_bytes(info[ACKNOWLEDGED], "little")
        except OSError:  # closed meanwhile, or no TCP
            continue
    return total


def stay_packed(patch: Callable[[object, str, object], None] = setattr) -> None:
    """Leave out that CPUs dequantise what they load."""
    patch(loading, "dequantize_model", lambda model: model)


def main(names: list[str]) -> None:
    """Print the answers of each model by each arm, and what full prefill and prediction sent."""
    hosts = joined()
    if PACKED in names:
        stay_packed()
    found = {}
    for name in (name for name in names if name != PACKED):
        model = load(name, hosts=hosts)
        for arm in ARMS:
            before = sent_bytes()
            tokens = answers(model, arm)
            found[f"{name} {arm}"] = {"tokens": tokens, "sent_bytes": sent_bytes() - before}
    if hosts.rank == 0:
        print(json.dumps(found))
    hosts.leave(has_finished=True)


if __name__ == "__main__":
    main(sys.argv[1:])
