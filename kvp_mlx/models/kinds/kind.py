"""What all kinds of layer have in common: targets, and a cache written by the layer's own call."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import mlx.nn as nn

RawOutputs = dict[str, mx.array]
"""What the projections returned that feed one layer's cache, by target ``(B, T, width)``."""


@dataclass(frozen=True)
class Target:
    """Features of one projection's output that feed a layer's cache.

    Attributes:
        name: unique in its layer; the same wherever it means the same.
        projection: the mixer's module that returns it.
        width: features.
        start: where it begins in the output, or in each group of it.
        groups: equal parts of the output, each of which holds an equal part of the target.
        last: how many of a prompt's last positions the cache needs it of (None: all).
    """

    name: str
    projection: str
    width: int
    start: int = 0
    groups: int = 1
    last: int | None = None

    @property
    def stop(self) -> int:
        """Where it ends, in each group."""
        return self.start + self.width // self.groups

    def of(self, output: mx.array) -> mx.array:
        """Return the target (B, T, width) in a projection's output (B, T, features)."""
        if self.groups == 1:
            return output[..., self.start : self.stop]
        grouped = output.reshape(*output.shape[:2], self.groups, -1)  # (B, T, features) -> (B, T, groups, part)
        return grouped[..., self.start : self.stop].reshape(*output.shape[:2], self.width)


class Layer(NamedTuple):
    """A layer whose cache is to be written: how, by which module, what was predicted of it, and the cache."""

    kind: "Kind"
    mixer: nn.Module
    raw: RawOutputs
    cache: Any


@dataclass(frozen=True)
class Kind(ABC):
    """One layer's kind; equal ones want the same mask.

    Attributes:
        mixer: name of the layer's module that looks at other positions.
    """

    mixer: str
    title: ClassVar[str]
    """For people."""
    is_rewritable: ClassVar[bool] = False
    """Whether the cache holds an entry of every position, any of which the layer can compute anew in its place."""

    keeps_entries: ClassVar[bool] = False
    """Whether it keeps entries of positions, be it the newest, and not a state that all of them went into."""

    @classmethod
    @abstractmethod
    def of(cls, layer: nn.Module, cache: Any) -> "Kind | None":
        """Return the kind of a layer for which its model makes such a cache; None where it is another one."""

    @abstractmethod
    def targets(self, mixer: nn.Module) -> tuple[Target, ...]:
        """Return what feeds the cache, those of one projection in the order in which they stand there."""

    @abstractmethod
    def mask(self, x: mx.array, cache: Any) -> Any:
        """Return the mask that the layer takes for ``x`` (B, T, hidden) on top of a cache, as its model makes it."""

    @abstractmethod
    def new_cache(self) -> Any:
        """Return an empty cache, as the model makes it."""

    def open_cache(self) -> Any:
        """Return an empty cache that gradients flow through, and that keeps whatever it is given."""
        return self.new_cache()

    def scores(self, mixer: nn.Module, hidden: mx.array, entries: tuple[mx.array, mx.array]) -> mx.array:
        """Return the newest tokens' scores (B, query heads, T, S), scaled, not masked; of kinds with entries alone.

        Args:
            mixer: the layer's.
            hidden: what its projections read of these tokens ``(B, T, hidden)``.
            entries: both arrays of its cache ``(B, H, S, D)``, these tokens' own included.
        """
        raise NotImplementedError(self.title)

    def pair_flops(self, mixer: nn.Module) -> float:
        """Return the FLOPs of one position and one entry that it looks at."""
        return 0.0

    def state_flops(self, mixer: nn.Module) -> float:
        """Return the FLOPs of one position beside linear maps and entries: of a state, which a write takes too."""
        return 0.0

    def compared(self, mixer: nn.Module, raw: RawOutputs, x: mx.array) -> list[mx.array]:
        """Return arrays (B, T, features) by whose distance two predictions are compared; ``x`` as in ``write``."""
        return [raw[name] for name in sorted(raw)]

    def write(self, layer: Layer, x: mx.array) -> None:
        """Append what was predicted to a cache: the layer's own call on top of the predicted outputs.

        Args:
            layer: the layer; targets may hold fewer positions than ``x``, the last ones.
            x: anything of the shape ``(B, T, hidden)`` of what the mixer reads; it is not evaluated.
        """
        if length := max(array.shape[1] for array in layer.raw.values()):
            self.speaking(layer.mixer, layer.raw, length)(x[:, -length:], mask=None, cache=layer.cache)

    @classmethod
    def write_all(cls, layers: Sequence[Layer], x: mx.array) -> None:
        """``write`` for several layers of this class."""
        for layer in layers:
            layer.kind.write(layer, x)

    def speaking(self, mixer: nn.Module, raw: RawOutputs, length: int) -> nn.Module:
        """Return a mixer whose projections return what was predicted, and zeros for what was not."""
        view, targets = copy.copy(mixer), self.targets(mixer)
        for projection in dict.fromkeys(target.projection for target in targets):
            own = [target for target in targets if target.projection == projection]
            view[projection] = _Given(_output(own, raw, length, rows(mixer[projection])))
        return view


class _Given(nn.Module):
    """Stands in for a projection, and returns what it was given."""

    def __init__(self, output: mx.array):
        super().__init__()
        self.output = output

    def __call__(self, *_: Any) -> mx.array:
        return self.output


def _output(targets: list[Target], raw: RawOutputs, length: int, features: int) -> mx.array:
    """Return a projection's output (B, T, features) that holds these targets, and zeros elsewhere."""
    if len(targets) == 1 and targets[0].width == features and raw[targets[0].name].shape[1] == length:
        return raw[targets[0].name]
    first = raw[targets[0].name]
    groups, pieces, end = targets[0].groups, [], 0

    def zeros(width: int) -> mx.array:
        return mx.zeros((first.shape[0], length, groups, width), first.dtype)

    for target in targets:
        array = mx.pad(raw[target.name], [(0, 0), (length - raw[target.name].shape[1], 0), (0, 0)])
        pieces += [zeros(target.start - end), array.reshape(first.shape[0], length, groups, -1)]
        end = target.stop
    pieces.append(zeros(features // groups - end))
    return mx.concatenate(pieces, axis=-1).reshape(first.shape[0], length, features)


def rows(projection: nn.Module) -> int:
    """Return a projection's output features, be it plain, quantised or with a low-rank update around it."""
    return int(projection.get("linear", projection).weight.shape[0])
