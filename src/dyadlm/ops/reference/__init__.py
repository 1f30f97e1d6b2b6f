"""The definitions: slow loops in float64. Every fast operator is tested against these; read these first."""

from dyadlm.ops.reference.consensus import consensus
from dyadlm.ops.reference.convolution import short_convolution
from dyadlm.ops.reference.dyadic import centroid, phase_transport, pyramid, stream, windows_at
from dyadlm.ops.reference.gated_delta import gated_delta
from dyadlm.ops.reference.ngrams import ngram_row
from dyadlm.ops.reference.outer_products import outer_products
from dyadlm.ops.reference.recurrence import linear_scan
from dyadlm.ops.reference.segments import Segments, segments
from dyadlm.ops.reference.selection import entmax, mean_run_length, select
from dyadlm.ops.reference.slots import context_at, slot_reads, slot_set

__all__ = [
    "Segments",
    "centroid",
    "consensus",
    "context_at",
    "entmax",
    "gated_delta",
    "linear_scan",
    "mean_run_length",
    "ngram_row",
    "outer_products",
    "phase_transport",
    "pyramid",
    "segments",
    "select",
    "short_convolution",
    "slot_reads",
    "slot_set",
    "stream",
    "windows_at",
]
