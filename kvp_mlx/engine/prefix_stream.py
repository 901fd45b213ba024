"""What an exact prefix made of tokens, kept so that whoever reads them exactly goes on from there."""

from typing import NamedTuple

import mlx.core as mx


class PrefixStream(NamedTuple):
    """The residual stream behind some of the base's first layers; of no layers, it is the token ids.

    Attributes:
        layers: how many have read the tokens.
        first: position of the first token.
        x: what the layer behind them takes ``(1, T, hidden)``, or ids ``(1, T)``.
    """

    layers: int
    first: int
    x: mx.array

    @property
    def end(self) -> int:
        """Position behind the last token."""
        return self.first + self.x.shape[1]

    def of(self, first: int, last: int) -> mx.array:
        """Return what stands for positions ``first`` to ``last - 1``, as far as it is there."""
        return self.x[:, max(0, first - self.first) : max(0, last - self.first)]

    def cut(self, length: int) -> "PrefixStream":
        """Return the part that belongs to the first ``length`` positions, evaluated: another thread cannot."""
        if length >= self.end:
            return self
        x = mx.contiguous(self.of(self.first, length))
        mx.eval(x)
        return self._replace(x=x)

    def grown(self, x: mx.array) -> "PrefixStream":
        """Return the stream of the tokens behind it as well."""
        return self._replace(x=mx.concatenate([self.x, x.astype(self.x.dtype)], axis=1))
