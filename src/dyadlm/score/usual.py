"""What a byte of normal text may cost at each place of a line: what such bytes cost of late, and never little.

Lines begin with dates, times and numbers of processes. Where these go beyond the training they cost many bits in
every line, and hide what is odd in one. The usual cost of a place is a mean over the last lines that reach so far.
"""

import numpy as np

# Bits that a byte may cost anywhere. A random decimal digit costs little more, so that numbers, which nothing predicts,
# are hardly odd. Of 1 to 6 bits, 3 found the most planted lines (benchmarks/anomalies.py).
EXPECTED_BITS = 3.0
# Bytes at the beginning of a line whose usual cost is followed, and over how many lines: the newest has a weight of
# 1 / LINES, and as long as there were fewer, all have the same.
PLACES, LINES = 256, 16


class Usual:
    """Follows what bytes cost at each of the first `PLACES` places of a line.

    means: bits, float64 (`PLACES`,). seen: how many lines reached so far, at most `LINES`, float64 (`PLACES`,).
    """

    def __init__(self) -> None:
        self.means, self.seen = np.zeros(PLACES), np.zeros(PLACES)

    def expected(self, bits: np.ndarray) -> np.ndarray:
        """What each byte of the next line may cost, float64 (n,), by the lines before; bits (n,): what it does cost."""
        near = min(len(bits), PLACES)
        means, seen = self.means[:near], self.seen[:near]
        expected = np.full(len(bits), EXPECTED_BITS)
        np.maximum(EXPECTED_BITS, means, out=expected[:near])
        np.minimum(seen + 1, LINES, out=seen)
        means += (bits[:near] - means) / seen
        return expected

    def numbers(self) -> np.ndarray:
        """All that it carries, for a state file, float64 (2, `PLACES`)."""
        return np.stack([self.means, self.seen])

    def take(self, numbers: np.ndarray) -> None:
        """Go on with what `numbers` gave. Raises `ValueError` if it is of another size, or holds no costs."""
        if numbers.shape != (2, PLACES) or numbers.dtype != np.float64 or (numbers < 0).any():
            raise ValueError(f"usual costs of shape {numbers.shape}, not {(2, PLACES)}")
        self.means, self.seen = numbers.copy()
