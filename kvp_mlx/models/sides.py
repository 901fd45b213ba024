"""Two stretches of one sequence through the same layers at once, each seeing a cache of its own."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .families import LayerCache, inner_model, kinds_of
from .sections import with_mixers


class Sides(tuple[Any, Any]):
    """What a mixer takes of each stretch: its cache or its mask.

    Attributes:
        tokens: how long the first stretch is.
    """

    tokens: int

    def make_mask(self, length: int, **how: Any) -> "Sides":
        """Return both masks, as mlx-lm's caches make them."""
        first, second = self
        return sides(first.make_mask(self.tokens, **how), second.make_mask(length - self.tokens, **how), self.tokens)


def sides(first: LayerCache, second: LayerCache, tokens: int) -> Sides:
    """Return what stands for a layer's cache where ``tokens`` of what it reads see the first one, others the second."""
    both = Sides((first, second))
    both.tokens = tokens
    return both


def beside(model: nn.Module, tokens: int) -> nn.Module:
    """Return a model whose mixers take the first ``tokens`` of what they read apart; all else reads both at once.

    It takes ``sides`` in place of caches.
    """
    layers = zip(inner_model(model).layers, kinds_of(model), strict=True)
    return with_mixers(model, {n: _Apart(layer[kind.mixer], tokens) for n, (layer, kind) in enumerate(layers)})


class _Apart(nn.Module):
    def __init__(self, mixer: nn.Module, tokens: int):
        super().__init__()
        self._mixer, self._tokens = mixer, tokens

    def __call__(self, x: mx.array, *rest: Any, **options: Any) -> Any:
        outputs: list[Any] = []
        for side, part in enumerate((x[:, : self._tokens], x[:, self._tokens :])):
            own = [_of(side, each) for each in rest]
            outputs.append(self._mixer(part, *own, **{name: _of(side, each) for name, each in options.items()}))
        if isinstance(outputs[0], tuple):  # Gemma 4's also return what others may share
            return mx.concatenate([output[0] for output in outputs], axis=1), *outputs[1][1:]
        return mx.concatenate(outputs, axis=1)


def _of(side: int, given: Any) -> Any:
    return given[side] if isinstance(given, Sides) else given
