"""Pure functions on tensors, with no knowledge of models. `reference` holds their definitions as slow loops."""

from dyadlm.ops.pyramid import Clock, Pyramid, PyramidState, make_clock, pyramid
from dyadlm.ops.transport import phase_transport

__all__ = ["Clock", "Pyramid", "PyramidState", "make_clock", "phase_transport", "pyramid"]
