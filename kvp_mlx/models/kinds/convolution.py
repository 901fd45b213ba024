"""Short convolutions (LFM2): a few last positions in place of entries."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_ssm_mask
from mlx_lm.models.cache import ArraysCache

from .kind import Kind, Target, rows


class Convolution(Kind):
    """A gated short convolution: of the projection's thirds B, C and x, it goes on from the last products B * x."""

    title = "short convolution"

    @classmethod
    def of(cls, layer: nn.Module, cache: Any) -> "Convolution | None":
        """See ``Kind.of``."""
        return cls("conv") if type(cache) is ArraysCache and "in_proj" in layer.get("conv", ()) else None

    def targets(self, mixer: nn.Module) -> tuple[Target, ...]:
        """See ``Kind.targets``."""
        width, tail = rows(mixer.in_proj) // 3, mixer.L_cache - 1
        return Target("b", "in_proj", width, last=tail), Target("x", "in_proj", width, 2 * width, last=tail)

    def mask(self, x: mx.array, cache: Any) -> Any:
        """See ``Kind.mask``."""
        return create_ssm_mask(x, cache)

    def new_cache(self) -> Any:
        """See ``Kind.new_cache``."""
        return ArraysCache(size=1)
