"""The time that a long prompt takes on several hosts, by arithmetic: what is computed, and what travels."""

from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..arms.work import Work, full_work, kvp_work
from ..bundle.config import AuxiliaryConfig, BaseConfig, BundleConfig, PredictorConfig
from ..bundle.layer_map import prefix_layer_map
from ..bundle.loading import KVPModel, build_predictor
from ..bundle.predictor import HIDDEN_STATE
from ..errors import InputError
from ..models.description import model_without_weights
from ..models.families import check_architecture, hidden_size
from ..models.loading import read_config, text_config
from ..models.sections import prefix_model
from ..models.sharding import check_shardable

SUMS_PER_LAYER = 2
"""All-reduces: after attention, and after the FFN."""


@dataclass(frozen=True)
class Cluster:
    """What the arithmetic assumes of the machines.

    Attributes:
        hosts: how many there are.
        link_gbps: of a host to its neighbour in the ring, each way, gigabits per second.
        latency_us: that each all-reduce takes, however short it is.
        tflops: that each host computes of a prefill's matmuls.
        dtype_bytes: of a value that travels.
        chunk_tokens: that are read at once, with one all-reduce each time.
    """

    hosts: int
    link_gbps: float
    latency_us: float = 50.0
    tflops: float = 15.0
    dtype_bytes: int = 2
    chunk_tokens: int = 2048

    def __post_init__(self) -> None:
        """Check what the command line does not."""
        for option, value in (("--link", self.link_gbps), ("--tflops", self.tflops)):
            if not 0 < value < inf:
                raise InputError(f"{option} must be a number above 0, not {value:g}.")
        if not 0 <= self.latency_us < inf:
            raise InputError(f"--latency must be a number from 0 up, not {self.latency_us:g}.")


def hosts_table(base: Path, prompt_tokens: int, batch: int, layers: int | None, cluster: Cluster) -> dict[str, Any]:
    """Return what full prefill and prediction by a prefix take on one host and on several; nothing is run.

    Args:
        base: a config.json, or a directory that holds one.
        prompt_tokens: length of the prompt.
        batch: prompts at once.
        layers: of the prefix (default: half of the base's).
        cluster: the machines.

    Raises:
        InputError: a base that cannot be spread over so many hosts, or predicted.
    """
    network, config = base_of(base)
    check_shardable(network, cluster.hosts)
    depth, layers = len(network.layers), layers or len(network.layers) // 2
    model = with_prefix(network, layers)
    works = {"full": full_work(model, prompt_tokens, batch), "kvp": kvp_work(model, prompt_tokens, batch)}
    summing = {"full": depth - 1, "kvp": layers}  # layers of the prompt whose outputs are needed
    counts = [(hosts, arm) for hosts in dict.fromkeys((1, cluster.hosts)) for arm in works]
    rows = [
        host_row(arm, hosts, works[arm], summing[arm], hidden_size(network), prompt_tokens, batch, cluster, depth)
        for hosts, arm in counts
    ]
    for row in rows:
        row["speedup"] = rows[0]["total_s"] / row["total_s"]
    return {
        "base": str(base),
        "architecture": config["model_type"],
        "base_layers": depth,
        "prefix_layers": layers,
        "prompt_tokens": prompt_tokens,
        "batch_size": batch,
        "assumptions": asdict(cluster) | {"sums_per_layer": SUMS_PER_LAYER, "overlap": "none"},
        "rows": rows,
    }


def host_row(
    arm: str, hosts: int, work: Work, layers: int, hidden: int, tokens: int, batch: int, cluster: Cluster, depth: int
) -> dict[str, Any]:
    """Return one arm's time on so many hosts: computing, evenly shared, then all-reduces in a ring.

    A ring sends 2 (N - 1) / N of what is summed over each link.
    """
    chunks = -(-(tokens - 1) // cluster.chunk_tokens)
    sums = SUMS_PER_LAYER * (layers * chunks + depth) if hosts > 1 else 0  # the first step sums in every layer
    values = SUMS_PER_LAYER * batch * hidden * (layers * (tokens - 1) + depth) if hosts > 1 else 0
    sent = values * cluster.dtype_bytes * 2 * (hosts - 1) / hosts
    compute_s = work.flops / hosts / (1e12 * cluster.tflops)
    exchange_s = sums * 1e-6 * cluster.latency_us + 8 * sent / (1e9 * cluster.link_gbps)
    return {
        "arm": arm,
        "hosts": hosts,
        "tflop": work.flops / 1e12,
        "summed_bytes_per_token": values * cluster.dtype_bytes / (batch * tokens),
        "all_reduces": sums,
        "compute_s": compute_s,
        "exchange_s": exchange_s,
        "total_s": compute_s + exchange_s,
    }


def base_of(place: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model without weights, and its config."""
    directory = place.parent if place.is_file() else place
    if place.is_file() and place.name != "config.json":
        raise InputError(f"{place} is no config.json; name one, or the directory that holds it.")
    config = read_config(directory)
    check_architecture(config["model_type"], text_config(config).get("model_type"))
    return model_without_weights(config, directory), config


def with_prefix(base: nn.Module, layers: int) -> KVPModel:
    """Return a bundle of a prefix with maps that are never made."""
    layer_map = prefix_layer_map(len(base.layers), layers)
    config = BundleConfig(
        base=BaseConfig(fingerprint="none", path="."),
        auxiliary=AuxiliaryConfig(kind="prefix", layers=layers),
        predictor=PredictorConfig(input=HIDDEN_STATE, layer_map=layer_map),
    )
    prefix = prefix_model(base, layers)
    return KVPModel(base, prefix, build_predictor(base, prefix, config), None, config, {})
