"""The checkpoints of one training, of which one at a time is in memory.

Dimension letters: C checkpoints.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dyadlm.diagnose.contract import Subject


@dataclass(frozen=True)
class Trajectory:
    """steps: of the checkpoints, ascending. load: the checkpoint of a step, anew each time. name: for the report."""

    steps: Sequence[int]
    load: Callable[[int], Subject]
    name: str = "run"

    @property
    def last(self) -> Subject:
        """The last checkpoint, loaded anew."""
        return self.load(self.steps[-1])

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a stored result must agree with: that of the last checkpoint, and all steps."""
        return {"name": self.name, "steps": list(self.steps), "last": dict(self.last.identity)}


def reached(steps: Sequence[int], values: np.ndarray, share: float = 0.5) -> float:
    """The step at which values (C,) first reach that share of the last one, linear in log (1 + step) in between.

    The first step if it has reached it already; not a number if the last value is not above zero.
    """
    if not values[-1] > 0:
        return float("nan")
    wanted = share * values[-1]
    at = int(np.argmax(values >= wanted))
    if at == 0:
        return float(steps[0])
    before, after = values[at - 1], values[at]
    near, far = np.log1p(steps[at - 1]), np.log1p(steps[at])
    return float(np.expm1(near + (far - near) * (wanted - before) / (after - before)))
