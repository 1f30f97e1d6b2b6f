"""Intervals by resampling whole documents: tokens of one document are no independent sample."""

import numpy as np

from dyadlm.evaluate.bootstrap import ratio_interval


def mean_interval(values: np.ndarray, units: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the mean of `values` (N,) when the units (N,) int64 they belong to are drawn anew.

    Of fewer than two units, the values themselves are drawn; None for fewer than two values.
    """
    if len(np.unique(units)) < 2:
        units = np.arange(len(values))
    _, place = np.unique(units, return_inverse=True)
    sums = np.bincount(place, weights=values)
    return ratio_interval(sums, np.bincount(place).astype(float))
