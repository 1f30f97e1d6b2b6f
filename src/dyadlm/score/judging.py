"""Which units are shown: those with a p-value or a score that was asked for, or all."""

from dataclasses import dataclass

from dyadlm.errors import UserError
from dyadlm.score.calibration import Calibration
from dyadlm.score.units import Unit


@dataclass(frozen=True)
class Rule:
    """calibration: gives p-values; None: there are none. alert: the largest p-value of an alert. threshold: the
    smallest score of an alert. With neither, every unit passes.

    Raises:
        UserError: an alert without a calibration, or one that its normal units do not allow; both kinds at once.
    """

    calibration: Calibration | None = None
    alert: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.alert is None:
            return
        if self.threshold is not None:
            raise UserError("An alert is told by a rate or by a score; give --alert or --threshold, not both.")
        if self.calibration is None:
            raise UserError(
                "--alert P needs to know what is normal; write a calibration with --calibrate FILE.json, and give it "
                "with --calibration FILE.json."
            )
        self.calibration.require_reachable(self.alert)

    @property
    def selects(self) -> bool:
        """Whether not every unit passes."""
        return self.alert is not None or self.threshold is not None

    def p(self, unit: Unit) -> float | None:
        """The conformal p-value of a unit."""
        return None if self.calibration is None else self.calibration.p(unit.score)

    def passes(self, unit: Unit) -> bool:
        """Whether a unit is one of those that were asked for."""
        if self.alert is not None:
            p = self.p(unit)
            return p is not None and p <= self.alert
        return self.threshold is None or unit.score >= self.threshold
