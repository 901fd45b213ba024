"""Closed-form maps: ridge regression from what the auxiliary reads to the base's raw keys and values.

The idea of fitting the cache's maps in closed form is that of NVIDIA's cross-model KV transfer
(arXiv 2608.03893). Here it is the quick start of a predictor, and the starting point of training.
"""

from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..bundle.loading import KVPModel
from ..bundle.predictor import Block
from ..device.hosts import Hosts, joined
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
        targets = mx.concatenate([raw[layer].raw[name] for layer, name, _ in self.block.targets], axis=-1)
        x = inputs.reshape(-1, self.block.in_width).astype(mx.float32)  # (B, T, in) -> (B*T, in)
        x = mx.concatenate([x, mx.ones((x.shape[0], 1))], axis=-1)
        y = targets.reshape(-1, self.block.out_width).astype(mx.float32)  # (B, T, out) -> (B*T, out)
        self.gram += np.array(mx.matmul(x.T, x, stream=mx.cpu))  # GPUs may take fp32 products in TF32
        self.cross += np.array(mx.matmul(x.T, y, stream=mx.cpu))

    def add_others(self, hosts: Hosts) -> None:
        """Add what the other hosts have added."""
        self.gram, self.cross = hosts.summed(self.gram), hosts.summed(self.cross)

    def solve(self, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """Return weight (out, in) and bias (out,).

        Args:
            penalty: relative to the mean square of the inputs' features; the bias is not penalised.
        """
        features = self.block.in_width
        ridge = np.full(features + 1, penalty * np.trace(self.gram[:features, :features]) / features)
        ridge[-1] = 0.0
        try:
            solution = np.linalg.solve(self.gram + np.diag(ridge), self.cross)
        except np.linalg.LinAlgError as error:
            raise KVPError("what the maps read is the same of every token; does the base model work at all?") from error
        return solution[:-1].T, solution[-1]


def fit_predictors(
    models: Sequence[KVPModel],
    windows: Iterable[list[int]],
    *,
    penalty: float,
    progress: Callable[[int], None],
) -> int:
    """Set the maps of bundles of one base to the ridge solution over the given token windows, in one pass.

    Args:
        models: share a base, which reads each window once; their predictors receive the maps, fp32.
        windows: token ids; each window is one independent prompt. Several hosts give each its own.
        penalty: see ``RidgeSums.solve``.
        progress: called with the number of tokens read after every window.

    Returns:
        The number of tokens read, by all hosts.

    Raises:
        KVPError: the statistics are not finite (a broken model).
    """
    base, tokens = models[0].base, 0
    sums = [[RidgeSums(block) for block in model.predictor.blocks] for model in models]
    for window in windows:
        ids = mx.array([window])
        _, raw = run_layers(base, ids, make_prompt_cache(base), listen=range(len(base.layers)))
        for model, parts in zip(models, sums, strict=True):
            captured = raw  # a prefix's readings are the base's own
            if not model.is_prefix:
                reader = model.auxiliary
                _, captured = run_layers(reader, ids, make_prompt_cache(reader), model.predictor.sources)
            inputs = model.predictor.inputs(captured)
            for part in parts:
                part.add(inputs[part.block.name], raw)
        mx.clear_cache()
        tokens += len(window)
        progress(tokens)
    if (hosts := joined()) is not None:
        tokens = int(hosts.summed(np.array(tokens)))
        for part in (part for parts in sums for part in parts):
            part.add_others(hosts)
    for model, parts in zip(models, sums, strict=True):
        for part in parts:
            weight, bias = part.solve(penalty)
            if not np.isfinite(weight).all():
                raise KVPError(f"map {part.block.name} came out not finite; does the base model work at all?")
            model.predictor.maps[part.block.name].weight = mx.array(weight.astype(np.float32))
            model.predictor.maps[part.block.name].bias = mx.array(bias.astype(np.float32))
    return tokens
