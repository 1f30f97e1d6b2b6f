"""The definitions: slow loops in float64. Every fast operator is tested against these; read these first."""

from dyadlm.ops.reference.dyadic import centroid, phase_transport, pyramid, stream, windows_at

__all__ = ["centroid", "phase_transport", "pyramid", "stream", "windows_at"]
