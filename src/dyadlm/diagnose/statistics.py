"""Intervals by resampling whole documents: tokens of one document are no independent sample."""

import numpy as np

from dyadlm.evaluate.bootstrap import ratio_interval

DRAWS = 500  # of what is dearer than a mean


def mean_interval(values: np.ndarray, units: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the mean of `values` (N,) when the units (N,) int64 they belong to are drawn anew.

    Of fewer than two units, the values themselves are drawn; None for fewer than two values.
    """
    if len(np.unique(units)) < 2:
        units = np.arange(len(values))
    _, place = np.unique(units, return_inverse=True)
    sums = np.bincount(place, weights=values)
    return ratio_interval(sums, np.bincount(place).astype(float))


def redrawn(values: np.ndarray, units: np.ndarray, seed: int = 0) -> np.ndarray:
    """Sums over all of `values` (N, ...), then over units drawn anew: (1 + draws, ...), for what is no plain mean.

    Of fewer than two units, the values themselves are drawn; of fewer than two values nothing is: (1, ...).
    """
    if len(np.unique(units)) < 2:
        units = np.arange(len(values))
    named, place = np.unique(units, return_inverse=True)
    sums = np.zeros((len(named), *values.shape[1:]))
    np.add.at(sums, place, values)
    count = len(named)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS if count > 1 else 0)
    return np.tensordot(np.concatenate([np.ones((1, count)), drawn]), sums, 1)


def percentiles(figures: np.ndarray) -> tuple[float, float] | None:
    """95 % interval from figures (1 + draws,) made of what `redrawn` gave; None without draws, or if one has none."""
    drawn = figures[1:]
    if not len(drawn) or not np.isfinite(drawn).all():
        return None
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
