"""Causal language models without attention, on a dyadic pyramid of phase-transported centroids."""

from dyadlm.version import __version__

__all__ = ["__version__"]
