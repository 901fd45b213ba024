"""Attention over the newest positions alone: what an older one left behind is nobody's business."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import RotatingKVCache

from .attention import Attention, mixer_of
from .kind import Layer, Target


@dataclass(frozen=True)
class Sliding(Attention):
    """Sliding attention.

    Attributes:
        window: positions that a token looks at, its own included.
    """

    window: int
    title = "sliding attention"
    is_rewritable = False

    @classmethod
    def of(cls, layer: nn.Module, cache: Any) -> "Sliding | None":
        """See ``Kind.of``."""
        mixer = mixer_of(layer)
        return cls(mixer, cache.max_size) if mixer and type(cache) is RotatingKVCache and not cache.keep else None

    def targets(self, mixer: nn.Module) -> tuple[Target, ...]:
        """Return attention's, which are needed of the last ``window`` positions."""
        return tuple(replace(target, last=self.window) for target in super().targets(mixer))

    def mask(self, x: mx.array, cache: Any) -> Any:
        """See ``Kind.mask``."""
        return create_attention_mask(x, cache, window_size=self.window)

    def new_cache(self) -> Any:
        """See ``Kind.new_cache``."""
        return RotatingKVCache(max_size=self.window)

    @classmethod
    def write_all(cls, layers: Sequence[Layer], x: mx.array) -> None:
        """Do what ``write`` does for the positions that later ones look at, and count the others."""
        shortened = [_shortened(layer, x.shape[1]) for layer in layers]
        super().write_all([layer for layer in shortened if layer.raw["keys"].shape[1]], x)


class _Appended:
    """A rotating cache that is written to the end, in order, whatever is missing before it."""

    def __init__(self, cache: RotatingKVCache, skipped: int):
        self.cache, self.offset = cache, cache.offset + skipped
        if skipped:
            cache.keys = cache.values = None
            cache.offset, cache._idx = self.offset, 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        return self.cache._update_concat(keys, values)


def _shortened(layer: Layer, length: int) -> Layer:
    """Leave out what the cache's window does not reach; of a cache that keeps all, nothing."""
    if not isinstance(layer.cache, RotatingKVCache):
        return layer
    kept = min(layer.raw["keys"].shape[1], layer.cache.max_size)
    raw = {name: array[:, array.shape[1] - kept :] for name, array in layer.raw.items()}
    return layer._replace(raw=raw, cache=_Appended(layer.cache, length - kept))
