"""Medians, spreads and bootstrap intervals over seeds and repeats."""

from collections.abc import Sequence

import numpy as np


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (0 for one value, NaN for none)."""
    array = np.asarray(values, np.float64)
    if array.size == 0:
        return float("nan"), float("nan")
    return float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else 0.0


def bootstrap_ratio(
    numerator: Sequence[float],
    denominator: Sequence[float],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of ``median(numerator) / median(denominator)`` over paired repeats.

    Pair ``i`` of both sequences comes from the same seed or the same turn, so pairs are resampled together.
    Returns ``None`` for fewer than three pairs: an interval from two numbers would only look like knowledge.
    """
    top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    if top.shape != bottom.shape:
        raise ValueError(f"paired samples must have equal lengths, got {top.size} and {bottom.size}")
    if top.size < 3:
        return None
    picks = np.random.default_rng(seed).integers(0, top.size, (resamples, top.size))
    ratios = np.median(top[picks], axis=1) / np.median(bottom[picks], axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)
