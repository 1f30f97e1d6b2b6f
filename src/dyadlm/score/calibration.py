"""Alerts with a false-alarm rate that was asked for: split-conformal p-values by the scores of normal text.

The p-value of a line is (k + 1) / (n + 1), where k of n normal lines score as high or higher. If the line and the
normal lines are exchangeable, it is at most P with probability at most P (Vovk, Gammerman and Shafer, 2005).

Scores are rounded to a grid, so that any number of lines takes bounded memory. A rounded score is a score, so the
statement holds for it exactly.
"""

import json
import math
from bisect import bisect_left
from collections import Counter
from itertools import accumulate
from pathlib import Path

from dyadlm.errors import UserError
from dyadlm.files import require_new, require_writable, write_atomically
from dyadlm.score.drift import Level, level_of
from dyadlm.score.units import Reading

FORMAT, VERSION = "dyadlm-calibration", 2
# The grid: steps of 0.001 bits near 0, and of 0.1 % far from it; at most some 30,000 cells for any text.
STEP = 0.001
OPTIONS = {
    "unit": "--per",
    "score": "--score",
    "learn": "--learn",
    "memory": "--memory",
    "changed": "--set or --slot-entries",
}
DAMAGED = (AttributeError, KeyError, TypeError, ValueError, OverflowError)


def cell_of(score: float) -> int:
    """The cell of the grid that a score falls into; never decreasing in the score."""
    return math.floor(math.asinh(score) / STEP)


class Calibration:
    """How often normal units had which score. units: how many there were.

    weights: the identity of the model's weights. reading: how scores came about.
    level: of normal blocks of lines, for drift.
    """

    def __init__(self, weights: str, reading: Reading):
        self.weights, self.reading, self.level = weights, reading, Level()
        self._counts: Counter[int] = Counter()
        self._table: tuple[list[int], list[int]] | None = None

    @property
    def units(self) -> int:
        return self._counts.total()

    @property
    def smallest(self) -> float:
        """The smallest p-value that there can be."""
        return 1 / (self.units + 1)

    def add(self, score: float) -> None:
        """The score of one more normal unit."""
        self._counts[cell_of(score)] += 1
        self._table = None

    def p(self, score: float) -> float:
        """The conformal p-value of a score."""
        if self._table is None:
            cells = sorted(self._counts)
            above = list(accumulate((self._counts[cell] for cell in reversed(cells)), initial=0))[::-1]
            self._table = cells, above
        cells, above = self._table
        return (above[bisect_left(cells, cell_of(score))] + 1) / (self.units + 1)

    def require_reachable(self, rate: float) -> None:
        """Raise `UserError` unless units can have p-values as small as this false-alarm rate."""
        if not 0 < rate < 1:
            raise UserError(f"--alert takes a false-alarm rate between 0 and 1, such as 0.001, not {rate:g}.")
        if rate < self.smallest:
            name = f"{self.reading.unit}s"
            raise UserError(
                f"{self.units:,} normal {name} allow no false-alarm rate below {self.smallest:.2g}; calibrate on at "
                f"least {math.ceil(1 / rate) - 1:,} {name}, or ask for --alert {_rounded_up(self.smallest)} or more."
            )

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        head = {"format": FORMAT, "version": VERSION, "weights": self.weights, **self.reading._asdict()}
        level = {"blocks": self.level.blocks, "mean": self.level.mean, "squares": self.level.squares}
        counts = {str(cell): self._counts[cell] for cell in sorted(self._counts)}
        body = {"units": self.units, "level": level, "grid_step": STEP, "counts": counts}
        write_atomically(path, json.dumps(head | body) + "\n")


def require_place(path: Path) -> None:
    """Raise `UserError` unless a new calibration can be written there, before the reading."""
    require_new(path, "the calibration")
    require_writable(path, "the calibration")


def load_calibration(path: Path, weights: str, reading: Reading) -> Calibration:
    """The calibration of a file, for a model with these weights that reads like this.

    Raises:
        UserError: no such file, no calibration, a damaged one, one of another model or of another reading.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no calibration {path}; write one with --calibrate first.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no calibration; write one with --calibrate.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path} is no calibration; write one with --calibrate.")
    if found.get("version") != VERSION or found.get("grid_step") != STEP:
        raise UserError(f"{path} was written by another version of dyadlm; calibrate again.")
    if found.get("weights") != weights:
        raise UserError(f"{path} was made with another model; calibrate this one with --calibrate.")
    for name, wanted in reading._asdict().items():
        if found.get(name) != wanted:
            option = OPTIONS[name]
            raise UserError(
                f"{path} was made with another {option} ({found.get(name)!r}, not {wanted!r}); "
                "use the same options, or calibrate again."
            )
    calibration = Calibration(weights, reading)
    try:
        calibration._counts.update({int(cell): int(count) for cell, count in found["counts"].items()})
        calibration.level = level_of(found["level"])
        if any(count < 1 for count in calibration._counts.values()) or calibration.units != found["units"]:
            raise ValueError("counts that do not add up")
    except DAMAGED as error:
        raise UserError(f"{path} is damaged; calibrate again.") from error
    return calibration


def _rounded_up(rate: float) -> str:
    """A rate as a short decimal number that is not smaller."""
    scale = 10 ** (1 - math.floor(math.log10(rate)))
    return f"{math.ceil(rate * scale) / scale:g}"
