"""Closed-form maps: ridge regression from what the auxiliary reads to the base's raw keys and values.

The idea of fitting the cache's maps in closed form is that of NVIDIA's cross-model KV transfer
(arXiv 2608.03893). Here it is the quick start of a predictor, and the starting point of training.
"""

from collections.abc import Callable, Iterable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..bundle.predictor import Block, Predictor
from ..errors import KVPError
from ..models.sections import RawLayer, run_layers


class RidgeSums:
    """The sums that one map's normal equations need: of x x^T and x y^T, x extended by a one for the bias.

    Products are taken in fp32 per window and added up in fp64.
    """

    def __init__(self, block: Block):
        self.block = block
        self.gram = np.zeros((block.in_width + 1, block.in_width + 1))
        self.cross = np.zeros((block.in_width + 1, block.out_width))

    def add(self, inputs: mx.array, raw: dict[int, RawLayer]) -> None:
        """Add one window: ``inputs`` (B, T, in) against the base's own raw keys and values."""
        targets = mx.concatenate([getattr(raw[layer], kind) for layer, kind, _ in self.block.targets], axis=-1)
        x = inputs.reshape(-1, self.block.in_width).astype(mx.float32)  # (B, T, in) -> (B*T, in)
        x = mx.concatenate([x, mx.ones((x.shape[0], 1))], axis=-1)
        y = targets.reshape(-1, self.block.out_width).astype(mx.float32)  # (B, T, out) -> (B*T, out)
        self.gram += np.array(mx.matmul(x.T, x, stream=mx.cpu))  # GPUs may take fp32 products in TF32
        self.cross += np.array(mx.matmul(x.T, y, stream=mx.cpu))

    def solve(self, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """Return weight (out, in) and bias (out,).

        Args:
            penalty: relative to the mean square of the inputs' features; the bias is not penalised.
        """
        features = self.block.in_width
        ridge = np.full(features + 1, penalty * np.trace(self.gram[:features, :features]) / features)
        ridge[-1] = 0.0
        solution = np.linalg.solve(self.gram + np.diag(ridge), self.cross)
        return solution[:-1].T, solution[-1]


def fit_predictor(
    base: nn.Module,
    auxiliary: nn.Module | None,
    predictor: Predictor,
    windows: Iterable[list[int]],
    *,
    penalty: float,
    progress: Callable[[int], None],
) -> int:
    """Set a predictor's maps to the ridge solution over the given token windows.

    Args:
        base: the model whose cache is to be predicted.
        auxiliary: the model that reads the prompt; None for a prefix, where the base's own pass has it all.
        predictor: receives the maps, fp32.
        windows: token ids; each window is one independent prompt.
        penalty: see ``RidgeSums.solve``.
        progress: called with the number of tokens read after every window.

    Returns:
        The number of tokens read.

    Raises:
        KVPError: the statistics are not finite (a broken model).
    """
    sums = [RidgeSums(block) for block in predictor.blocks]
    tokens = 0
    for window in windows:
        ids = mx.array([window])
        _, raw = run_layers(base, ids, make_prompt_cache(base), listen=range(len(base.layers)))
        captured = raw
        if auxiliary is not None:
            _, captured = run_layers(auxiliary, ids, make_prompt_cache(auxiliary), predictor.sources)
        inputs = predictor.inputs(captured)
        for part in sums:
            part.add(inputs[part.block.name], raw)
        mx.clear_cache()
        tokens += len(window)
        progress(tokens)
    for part in sums:
        weight, bias = part.solve(penalty)
        if not np.isfinite(weight).all():
            raise KVPError(f"map {part.block.name} came out not finite; does the base model work at all?")
        predictor.maps[part.block.name].weight = mx.array(weight.astype(np.float32))
        predictor.maps[part.block.name].bias = mx.array(bias.astype(np.float32))
    return tokens
