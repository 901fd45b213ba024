"""Tensor parallelism: a model's heads and FFN columns spread over hosts, by mlx-lm's own ``shard``."""

from math import gcd

import mlx.nn as nn

from ..device.hosts import Hosts
from ..errors import InputError, UnsupportedModelError
from .families import kinds_of, mixer_of
from .kinds.attention import Attention, kv_heads, query_heads


def shard(model: nn.Module, hosts: Hosts) -> None:
    """Keep of a model this host's part, in place; lazy.

    Raises:
        UnsupportedModelError: mlx-lm cannot spread such a model, or a kind of its layers cannot be predicted in parts.
        InputError: heads or features that the hosts cannot share evenly.
    """
    check_shardable(model, hosts.size)
    try:
        model.shard(hosts.group)
    except ValueError as error:
        raise InputError(
            f"{hosts.size} hosts cannot share this model evenly ({error}); take another number."
        ) from error


def check_shardable(model: nn.Module, hosts: int) -> None:
    """Refuse what so many hosts cannot share, as ``shard`` does; only the model's shapes are looked at."""
    name = getattr(model, "model_type", type(model).__module__)
    if not hasattr(model, "shard"):
        raise UnsupportedModelError(f"mlx-lm does not spread models of architecture '{name}' over hosts; use one host.")
    if others := sorted({kind.title for kind in kinds_of(model) if not isinstance(kind, Attention)}):
        raise UnsupportedModelError(f"layers of {' and '.join(others)} are not spread over hosts; use one host.")
    counts = [
        (count, f"{count} {what} of layer {layer}")
        for layer in range(len(model.layers))
        for count, what in (
            (kv_heads(mixer_of(model, layer)), "key/value heads"),
            (query_heads(mixer_of(model, layer)), "query heads"),
        )
    ]
    if uneven := next((told for count, told in counts if count % hosts), None):
        common = gcd(*(count for count, _ in counts))
        *others, last = [str(number) for number in range(1, common + 1) if common % number == 0]
        able = f"{', '.join(others)} or {last}" if others else "one"
        raise InputError(f"{uneven} cannot be spread evenly over {hosts} hosts; use {able}.")
