"""The probes, in the order of the paper's table of failure modes."""

from collections.abc import Sequence

from dyadlm.diagnose.probe import Probe
from dyadlm.diagnose.probes.loop import Loop
from dyadlm.diagnose.probes.position import Position
from dyadlm.errors import UserError

PROBES: dict[str, type[Probe]] = {probe.id: probe for probe in (Position, Loop)}


def chosen(names: Sequence[str] = ()) -> list[Probe]:
    """The named probes, or all. Raises `UserError` for a name that there is not."""
    for name in names:
        if name not in PROBES:
            raise UserError(f"There is no probe {name!r}; choose from {', '.join(PROBES)}.")
    return [PROBES[name]() for name in names or PROBES]
