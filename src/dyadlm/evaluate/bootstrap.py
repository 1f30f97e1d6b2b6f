"""Bootstrap interval of a ratio of sums."""

import numpy as np

RESAMPLES = 2000


def ratio_interval(
    numerators: np.ndarray, denominators: np.ndarray, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval of Σ numerators / Σ denominators when the units are drawn anew with replacement.

    numerators, denominators: (units,) float64 sums per unit (document or block), denominators not all 0.
    None for a single unit, which tells nothing of the spread. Resamples with denominators that sum to 0 are
    left out.
    """
    units = len(numerators)
    if units < 2:
        return None
    generator = np.random.default_rng(seed)
    ratios = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(units, size=units)
        if (total := denominators[drawn].sum()) > 0:
            ratios.append(numerators[drawn].sum() / total)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(ratios, [tail, 100.0 - tail])
    return float(low), float(high)
