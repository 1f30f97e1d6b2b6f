"""From sums over windows to centroids: what a window is divided by where a document has just begun.

Dimension letters: B batch, T time, D width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dyadlm.ops.blocks import HISTORY, Nodes, granularity, window_lag
from dyadlm.ops.clock import Clock

EARLY = ("zero", "partial", "mask")


class Shares(NamedTuple):
    """Factors that turn the sum over a window of w tokens, divided by w, into a centroid, and where both windows are
    complete."""

    current: Tensor | None  # (B or 1, T or nodes, 1): w over the tokens counted, 0 where absent; None: 1 everywhere
    previous: Tensor | None
    paired: Tensor  # (B or 1, T or nodes, 1) bool


def level_shares(
    level: int, alignment: str, clock: Clock, nodes: Sequence[Nodes], early: str, dtype: torch.dtype
) -> Shares:
    """The shares of a level, at every token (sliding, prefix) or at every node (block, dual).

    What counts before a document starts, by `early`: zero: zeros; partial: the mean of what exists; mask: a window is
    absent until complete.
    """
    width = 2**level
    if alignment == "sliding":
        parts, have = width, clock.index + 1
    elif alignment == "prefix":
        parts, have = 1, 1 + clock.index // width
    else:
        parts = window_lag(alignment)
        have = nodes[granularity(level, alignment)].ordinal[:, HISTORY - 1 :]
    had = (have - parts).clamp(0, parts)
    paired = (had == parts)[..., None]
    as_summed = early == "zero" and not clock.restarts  # the sums hold zeros for what does not exist
    previous = None if as_summed else _share(had, parts, early, dtype)
    if alignment == "prefix":  # the mean of what the current block holds so far
        return Shares(width / (clock.index % width + 1)[..., None].to(dtype), previous, paired)
    return Shares(None if as_summed else _share(have.clamp(0, parts), parts, early, dtype), previous, paired)


def _share(have: Tensor, parts: int, early: str, dtype: torch.dtype) -> Tensor:
    """For a window of which `have` of `parts` lie in the document: (...) int64 -> (..., 1)."""
    if early == "partial":
        return ((have > 0) * (parts / have.clamp(min=1).to(dtype)))[..., None]
    return (have >= (parts if early == "mask" else 1)).to(dtype)[..., None]


def centroid(sums: Tensor, width: int, share: Tensor | None) -> Tensor:
    """The centroid of a window of `width` tokens from its sum (..., D) -> (..., D)."""
    mean = sums / width
    return mean if share is None else mean * share
