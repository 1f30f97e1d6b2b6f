"""The level of surprise over time: an exponentially weighted mean over blocks of lines, and how unusual it is."""

import math
from collections.abc import Mapping
from typing import Any

BLOCK_LINES = 64
# Weight of the newest block (EWMA control charts, Roberts 1959).
WEIGHT = 0.2
# Blocks at the beginning that are taken for normal where no calibration says what is.
FIRST_BLOCKS = 16


class Level:
    """Mean and spread of the bits per byte of normal blocks. blocks: how many there were. mean: bits per byte.

    squares: the sum of squared differences from the mean.
    """

    def __init__(self, blocks: int = 0, mean: float = 0.0, squares: float = 0.0):
        self.blocks, self.mean, self.squares = blocks, mean, squares

    def add(self, level: float) -> None:
        """One more block (Welford's recurrence)."""
        self.blocks += 1
        change = level - self.mean
        self.mean += change / self.blocks
        self.squares += change * (level - self.mean)

    @property
    def deviation(self) -> float:
        """The standard deviation of a block; 0 for fewer than two."""
        return math.sqrt(self.squares / (self.blocks - 1)) if self.blocks > 1 else 0.0


class Drift:
    """Follows the level of lines against a normal level, at constant memory.

    level: the exponentially weighted mean of bits per byte over the blocks so far; None before the first block.
    """

    def __init__(self, normal: Level | None = None):
        """normal: of a calibration; None: the first `FIRST_BLOCKS` blocks are taken for normal, and not judged."""
        self._calibrated = normal is not None
        self.normal = Level() if normal is None else normal
        self.all = Level()
        self.level: float | None = None
        self._judged = 0
        self._lines, self._bits, self._bytes = 0, 0.0, 0

    def add(self, bits: float, size: int) -> None:
        """One line of so many bits and bytes."""
        self._lines, self._bits, self._bytes = self._lines + 1, self._bits + bits, self._bytes + size
        if self._lines == BLOCK_LINES:
            self._add_block(self._bits / max(self._bytes, 1))
            self._lines, self._bits, self._bytes = 0, 0.0, 0

    def _add_block(self, level: float) -> None:
        self.all.add(level)
        if not self._calibrated and self.all.blocks <= FIRST_BLOCKS:
            self.normal.add(level)
            return
        self._judged += 1
        start = self.normal.mean if self.level is None else self.level
        self.level = start + WEIGHT * (level - start)

    @property
    def p(self) -> float | None:
        """How likely a level as far from normal is where blocks are independent and normally distributed, two-sided.

        None before a block is judged, or where fewer than two blocks say what is normal.
        """
        if self.level is None or self.normal.deviation == 0:
            return None
        own = WEIGHT / (2 - WEIGHT) * (1 - (1 - WEIGHT) ** (2 * self._judged))
        known = (1 - (1 - WEIGHT) ** self._judged) ** 2 / self.normal.blocks  # of the mean, which is an estimate
        t = (self.level - self.normal.mean) / (self.normal.deviation * math.sqrt(own + known))
        return two_sided(t, self.normal.blocks - 1)

    def summary(self) -> dict[str, Any] | None:
        """For JSON; None before a block is judged."""
        if self.level is None:
            return None
        normal = "calibration" if self._calibrated else f"first {FIRST_BLOCKS * BLOCK_LINES} lines"
        return {
            "bits_per_byte": self.level,
            "normal_bits_per_byte": self.normal.mean,
            "normal": normal,
            "p": self.p,
            "blocks": self._judged,
        }

    def numbers(self) -> list[float]:
        """All that it carries, for a state file."""
        level = -1.0 if self.level is None else self.level  # a level is never below 0
        own = [float(self._calibrated), level, self._judged, self._lines, self._bits, self._bytes]
        levels = [self.normal, self.all]
        return own + [number for kept in levels for number in (kept.blocks, kept.mean, kept.squares)]

    def continue_from(self, numbers: list[float]) -> None:
        """Take up what `numbers` gave; nothing where one of the two is judged by a calibration and the other is not."""
        calibrated, level, judged, lines, bits, size, *levels = numbers
        if bool(calibrated) != self._calibrated:
            return
        self.level = None if level < 0 else level
        self._judged, self._lines, self._bits, self._bytes = int(judged), int(lines), bits, int(size)
        normal, self.all = (Level(int(levels[at]), levels[at + 1], levels[at + 2]) for at in (0, 3))
        if not calibrated:
            self.normal = normal


def two_sided(t: float, freedom: int) -> float:
    """The two-sided p-value of Student's t, by the approximation of Wallace (1959) to the normal distribution."""
    z = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(t * t / freedom))
    return math.erfc(z / math.sqrt(2))


def level_of(fields: Mapping[str, Any]) -> Level:
    """The level that a calibration file holds. Raises `KeyError`, `TypeError` or `ValueError` where it does not."""
    blocks, mean, squares = int(fields["blocks"]), float(fields["mean"]), float(fields["squares"])
    if blocks < 0 or squares < 0 or not math.isfinite(mean) or not math.isfinite(squares):
        raise ValueError("a level out of range")
    return Level(blocks, mean, squares)
