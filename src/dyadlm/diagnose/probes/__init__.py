"""The probes, in the order of the paper's table of failure modes."""

from collections.abc import Sequence

from dyadlm.diagnose.probe import Probe
from dyadlm.diagnose.probes.bounds import Bounds
from dyadlm.diagnose.probes.bytes import Bytes
from dyadlm.diagnose.probes.cost import Cost
from dyadlm.diagnose.probes.decay import Decay
from dyadlm.diagnose.probes.diffuse import Diffuse
from dyadlm.diagnose.probes.drift import Drift
from dyadlm.diagnose.probes.identity import Identity
from dyadlm.diagnose.probes.leak import Leak
from dyadlm.diagnose.probes.loop import Loop
from dyadlm.diagnose.probes.memorise import Memorise
from dyadlm.diagnose.probes.octave import Octave
from dyadlm.diagnose.probes.plan import Plan
from dyadlm.diagnose.probes.position import Position
from dyadlm.diagnose.probes.select import Select
from dyadlm.diagnose.probes.theme import Theme
from dyadlm.diagnose.probes.whiteout import Whiteout
from dyadlm.diagnose.probes.window import Window
from dyadlm.errors import UserError

PROBES: dict[str, type[Probe]] = {
    probe.id: probe
    for probe in (
        Leak,
        Bytes,
        Octave,
        Window,
        Bounds,
        Position,
        Diffuse,
        Loop,
        Drift,
        Decay,
        Select,
        Whiteout,
        Memorise,
        Identity,
        Plan,
        Theme,
        Cost,
    )
}
"""All probes by their id, in the order in which they are asked."""


def chosen(names: Sequence[str] = ()) -> list[Probe]:
    """The named probes, or all. Raises `UserError` for a name that there is not."""
    for name in names:
        if name not in PROBES:
            raise UserError(f"There is no probe {name!r}; choose from {', '.join(PROBES)}.")
    return [PROBES[name]() for name in names or PROBES]
