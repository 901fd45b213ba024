"""The linear maps from what the auxiliary read to what feeds the base's cache: raw keys and values, of attention.

Base layers that read the same source share one wide matmul, so the number of matmuls for a chunk is the number
of distinct sources (once for keys and once for values; once in all for a hidden state), however many base
layers there are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import mlx.core as mx
import mlx.nn as nn

from ..models.kinds import RawOutputs, Target
from ..models.sections import RawLayer
from .layer_map import LayerMap

HIDDEN_STATE: Final = "hidden_state"
KEYS_VALUES: Final = "keys_values"


@dataclass(frozen=True)
class Block:
    """One wide map.

    Attributes:
        name: the map's name in predictor.safetensors.
        reads: what it reads of the sources: ``hidden``, or the name of a target of theirs.
        sources: auxiliary layers whose readings are concatenated, in order.
        in_width: features of that concatenation, of a token and of those before it that count.
        targets: what it yields, ``(base layer, name, width)``, in order.
        last: how many of a prompt's last positions need it (None: all).
        preceding: how many tokens before each one count.
    """

    name: str
    reads: str
    sources: tuple[int, ...]
    in_width: int
    targets: tuple[tuple[int, str, int], ...]
    last: int | None = None
    preceding: int = 0

    @property
    def out_width(self) -> int:
        """Features of all targets together."""
        return sum(width for _, _, width in self.targets)

    def gather(self, captured: dict[int, RawLayer], before: mx.array | None = None) -> mx.array:
        """Return the map's input ``(B, T, in_width)``; ``before`` is that of the tokens before these.

        A token's own features come first, then those of the one before it, and so on. Where nothing stands before, the
        first token takes its place.
        """
        layers = [captured[source] for source in self.sources]
        parts = [layer.hidden if self.reads == "hidden" else layer.raw[self.reads] for layer in layers]
        x = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
        if not self.preceding:
            return x
        (batch, tokens, width), count = x.shape, self.preceding
        if before is None:
            ahead = mx.broadcast_to(x[:, :1], (batch, count, width))
        else:
            ahead = before[:, -1].reshape(batch, count + 1, width)[:, :count][:, ::-1]
        padded = mx.concatenate([ahead, x], axis=1)
        return mx.concatenate([padded[:, count - n : count - n + tokens] for n in range(count + 1)], axis=-1)


def plan_blocks(
    layer_map: LayerMap,
    predictor_input: str,
    auxiliary: Sequence[tuple[Target, ...]],
    hidden: int,
    base: Sequence[tuple[Target, ...]],
    preceding: int = 0,
) -> list[Block]:
    """Group the base layers by source.

    Args:
        layer_map: source layers of each base layer (None: exact, not predicted).
        predictor_input: ``hidden_state`` or ``keys_values``, of which each is predicted from the sources' of its name.
        auxiliary: targets of the auxiliary's layers.
        hidden: width of the auxiliary's residual stream.
        base: targets of the base's layers.
        preceding: how many tokens before each one are read, too.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for layer, sources in enumerate(layer_map):
        if sources is not None:
            groups.setdefault(sources, []).append(layer)
    blocks = []
    for sources, layers in groups.items():
        targets: dict[tuple[str, int | None], list[tuple[int, str, int]]] = {}
        for layer, target in sorted(((n, t) for n in layers for t in base[n]), key=lambda pair: pair[1].name):
            reads = "hidden" if predictor_input == HIDDEN_STATE else target.name
            targets.setdefault((reads, target.last), []).append((layer, target.name, target.width))
        for (reads, last), own in targets.items():
            name = "_".join([reads, *map(str, sources), *([f"last{last}"] if last else [])])
            width = hidden * len(sources)
            if reads != "hidden":
                width = sum(target.width for source in sources for target in auxiliary[source] if target.name == reads)
            blocks.append(Block(name, reads, sources, (1 + preceding) * width, tuple(own), last, preceding))
    return blocks


class DeviationEstimator(nn.Module):
    """Tells which of a text's tokens the base had better read itself, from what the predictor reads.

    The deviation of a token is the natural logarithm of its predicted values' error plus half that of the harm which
    the error does to what follows (``train.deviation``), up to a constant of the text. Training the maps leaves the
    estimator alone.
    """

    def __init__(self, in_width: int):
        super().__init__()
        self.linear = nn.Linear(in_width, 1)
        self.linear.weight = mx.zeros_like(self.linear.weight)  # until it is fitted all tokens are alike
        self.freeze()

    def __call__(self, inputs: mx.array) -> mx.array:
        """Return the expected deviation (B, T) of inputs (B, T, in)."""
        deviations: mx.array = self.linear(inputs)[..., 0]
        return deviations


class Predictor(nn.Module):
    """All maps of a bundle; parameters are ``maps.<block>.weight`` (out, in) and ``maps.<block>.bias``.

    Attributes:
        deviation: tells which tokens to recompute, from the last map's input; only there if asked for.
    """

    def __init__(self, blocks: Iterable[Block], *, has_deviation: bool = False):
        super().__init__()
        self._blocks = tuple(blocks)
        self.maps = {block.name: nn.Linear(block.in_width, block.out_width) for block in self._blocks}
        if has_deviation:
            self.add_estimator()

    def add_estimator(self) -> None:
        """Add an estimator of deviation that is not fitted, if there are any maps."""
        if self._blocks:
            self.deviation = DeviationEstimator(self._blocks[-1].in_width)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The plan that the maps follow."""
        return self._blocks

    @property
    def sources(self) -> list[int]:
        """The auxiliary layers that have to be listened to."""
        return sorted({source for block in self._blocks for source in block.sources})

    def inputs(self, captured: dict[int, RawLayer], before: dict[str, mx.array] | None = None) -> dict[str, mx.array]:
        """Return each map's input ``(B, T, in)`` from what the sources' projections read and returned.

        Args:
            captured: of the sources.
            before: the inputs of the tokens right before these; None: these are the first that are read.
        """
        ahead = before or {}
        return {block.name: block.gather(captured, ahead.get(block.name)) for block in self._blocks}

    def keep_part(self, widths: dict[tuple[int, str], int], rank: int) -> None:
        """Keep the rows that predict one host's part of each target; see ``models.sharding``.

        Args:
            widths: features of the part, by base layer and target.
            rank: number of the host, whose part is that of the same number.
        """
        blocks = []
        for block in self._blocks:
            rows, start = [], 0
            for layer, name, width in block.targets:
                own = widths[layer, name]
                rows.append(mx.arange(start + rank * own, start + (rank + 1) * own))
                start += width
            kept, linear = mx.concatenate(rows), self.maps[block.name]
            linear.weight, linear.bias = linear.weight[kept], linear.bias[kept]
            targets = tuple((layer, name, widths[layer, name]) for layer, name, _ in block.targets)
            blocks.append(replace(block, targets=targets))
        self._blocks = tuple(blocks)

    def deviations(self, inputs: dict[str, mx.array]) -> mx.array:
        """Return the expected deviation of each token's prediction (B, T); see ``DeviationEstimator``."""
        deviations: mx.array = self.deviation(inputs[self._blocks[-1].name])
        return deviations

    def __call__(self, inputs: dict[str, mx.array], following: int | None = None) -> dict[int, RawOutputs]:
        """Predict what feeds the base's cache, ``{base layer: {target: (B, T, width)}}``.

        Args:
            inputs: of each map ``(B, T, in)``.
            following: how many of the prompt's tokens follow these; then what only its last positions need is
                predicted for those of them that stand here, and shorter. None: everything for all.
        """
        predicted: dict[int, RawOutputs] = {}
        for block in self._blocks:
            x = inputs[block.name]
            if block.last is not None and following is not None:
                x = x[:, max(0, x.shape[1] - max(0, block.last - following)) :]
            wide = self.maps[block.name](x)  # (B, T, in) -> (B, T, sum of target widths)
            start = 0
            for layer, name, width in block.targets:
                predicted.setdefault(layer, {})[name] = wide[..., start : start + width]
                start += width
        return predicted
