"""How surprising the lines of a log are: scores, calibrated alerts, drift, and learning while reading.

    lines      lines of files and streams, with their places
    follow     a file that grows, is rotated or cut
    bits       from the surprise at tokens to the bits of bytes
    scorer     reads lines with a model and its state, in chunks; the surprise of each byte
    usual      what a byte may cost at each place of a line
    units      lines, documents or tokens with a score and their oddest span; the N oddest of all
    calibration  conformal p-values by the scores of normal text
    drift      the level of surprise over time
    learning   small steps on the output matrix while reading

Names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from dyadlm.lazy import attach

if TYPE_CHECKING:
    from dyadlm.score.calibration import Calibration
    from dyadlm.score.drift import Drift
    from dyadlm.score.follow import Follower
    from dyadlm.score.lines import Line, chunks, lines_of, waiting_chunks
    from dyadlm.score.scorer import Scorer
    from dyadlm.score.units import Oddest, Reading, Unit, units_of

__getattr__, __dir__ = attach(
    __name__,
    {
        "Calibration": "dyadlm.score.calibration",
        "Drift": "dyadlm.score.drift",
        "Follower": "dyadlm.score.follow",
        "Line": "dyadlm.score.lines",
        "Oddest": "dyadlm.score.units",
        "Reading": "dyadlm.score.units",
        "Scorer": "dyadlm.score.scorer",
        "Unit": "dyadlm.score.units",
        "chunks": "dyadlm.score.lines",
        "lines_of": "dyadlm.score.lines",
        "units_of": "dyadlm.score.units",
        "waiting_chunks": "dyadlm.score.lines",
    },
)

__all__ = [
    "Calibration",
    "Drift",
    "Follower",
    "Line",
    "Oddest",
    "Reading",
    "Scorer",
    "Unit",
    "chunks",
    "lines_of",
    "units_of",
    "waiting_chunks",
]
