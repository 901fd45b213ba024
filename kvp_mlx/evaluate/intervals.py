"""How sure a mean is: intervals by resampling items."""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


def bootstrap(values: Sequence[float], statistic: Callable[[np.ndarray], float] = np.mean) -> list[float]:
    """Return the 95 % interval of a statistic over items, by resampling them (percentiles, seeded)."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    means = [statistic(sample) for sample in np.asarray(values, float)[drawn]]
    edge = 50 * (1 - CONFIDENCE)
    return [float(bound) for bound in np.percentile(means, [edge, 100 - edge])]


def bootstrap_ratio(values: Sequence[float], whole: Sequence[float]) -> list[float]:
    """Return the 95 % interval of the mean of ``values`` over that of ``whole``, item by item the same resamples."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    parts, wholes = (np.asarray(x, float)[drawn].mean(axis=1) for x in (values, whole))
    edge = 50 * (1 - CONFIDENCE)
    ratios = parts[wholes > 0] / wholes[wholes > 0]
    return [float(bound) for bound in np.percentile(ratios, [edge, 100 - edge])]
