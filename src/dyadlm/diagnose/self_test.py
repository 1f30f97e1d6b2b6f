"""Every probe on models whose right answer is known: does the instrument itself measure right?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dyadlm.diagnose.probe import Budget, Control, Probe
from dyadlm.diagnose.run import ask


@dataclass(frozen=True)
class Check:
    """One expected value. measured: None if the probe did not give it; then `reason` says why."""

    probe: str
    control: str
    reading: str
    expected: float
    tolerance: float
    measured: float | None
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether it lies within its tolerance."""
        return self.measured is not None and abs(self.measured - self.expected) <= self.tolerance


def self_test(probes: Sequence[Probe], budget: Budget | None = None) -> Iterator[Check]:
    """The checks of all controls of all probes, as they are made."""
    for probe in probes:
        for control in probe.controls():
            yield from check(probe, control, budget or Budget())


def check(probe: Probe, control: Control, budget: Budget) -> list[Check]:
    """The checks of one control."""
    result = ask(probe, *control.make(), budget)
    reason = result.failed or result.not_applicable
    checks = []
    for name, expected in control.expected.items():
        measured = result.readings[name].value if name in result.readings else None
        why = "" if measured is not None else reason or "the probe has no such reading"
        checks.append(Check(probe.id, control.name, name, expected.value, expected.tolerance, measured, why))
    return checks
