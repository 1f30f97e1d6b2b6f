"""The causal dyadic pyramid: centroids over windows of 2^k tokens, for whole sequences and for chunks with a state.

One function serves training, chunked reading and decoding token by token: a chunk and a state in, a chunk and a state
out. The parts are in files of their own: `clock`, `sliding`, `blocks`, `centroids`.

Dimension letters: B batch, T time (columns of the chunk), D width, K levels. Level k has windows of w = 2^k tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dyadlm.ops.blocks import (
    HISTORY,
    Nodes,
    block_sums,
    broadcast,
    granularity,
    hand_down,
    node_windows,
    running_sums,
    tree_nodes,
    window_lag,
)
from dyadlm.ops.centroids import EARLY, Shares, centroid, level_shares
from dyadlm.ops.clock import Clock, accumulator, make_clock, next_position, take
from dyadlm.ops.sliding import Windows, latest, sliding_windows

__all__ = [
    "ALIGNMENTS",
    "EARLY",
    "HISTORY",
    "Clock",
    "Nodes",
    "Pyramid",
    "PyramidState",
    "Shares",
    "Windows",
    "accumulator",
    "block_sums",
    "broadcast",
    "centroid",
    "granularity",
    "hand_down",
    "latest",
    "level_shares",
    "make_clock",
    "next_position",
    "node_windows",
    "pyramid",
    "running_sums",
    "sliding_windows",
    "take",
    "tree_nodes",
    "window_lag",
]

ALIGNMENTS = ("sliding", "block", "dual", "prefix")


class Pyramid(NamedTuple):
    """Centroids of every level at every token."""

    current: Tensor  # (B, T, K, D)
    previous: Tensor  # (B, T, K, D)
    paired: Tensor  # (B, T, K) bool: both windows complete


class PyramidState(NamedTuple):
    """What the pyramid carries from chunk to chunk, whatever their length: float32 sums, sized by the levels alone."""

    position: Tensor  # (B,) int64
    rings: tuple[Tensor, ...]
    blocks: tuple[Tensor, ...]


def pyramid(
    x: Tensor,
    alignments: Sequence[str],
    *,
    early: str = "zero",
    state: PyramidState | None = None,
    clock: Clock | None = None,
) -> tuple[Pyramid, PyramidState]:
    """Centroids over dyadic windows, in parallel over a chunk, continuing from a state (docs/architecture.md, Levels).

    Args:
        x: (B, T, D), T >= 1; a whole sequence, any part of one, or one token.
        alignments: sliding | block | dual | prefix for level 0, 1, 2 ...; dual needs level >= 1.
        early: what counts before the document starts: zero (zeros), partial (the mean of what exists), mask (a
            window is absent until complete).
        state: as returned for the chunk before; None at the start.
        clock: for padding and packed documents (`make_clock`); None: all tokens continue the open document.

    Returns:
        The centroids, float32 (float64 for float64 x), and the state after the chunk.
    """
    batch, time, _ = x.shape
    if clock is None:
        clock = make_clock(batch, time, position=None if state is None else state.position, device=x.device)
    rings, blocks = (state.rings, state.blocks) if state else ((), ())
    sums: dict[int, Windows] = {}
    sliding = [k for k, alignment in enumerate(alignments) if alignment == "sliding"]
    running = [k for k, alignment in enumerate(alignments) if alignment == "prefix"]
    depth = max((granularity(k, a) for k, a in enumerate(alignments) if a != "sliding"), default=-1)
    nodes = tree_nodes(clock, depth)
    shares = [level_shares(k, a, clock, nodes, early, accumulator(x).dtype) for k, a in enumerate(alignments)]

    if sliding:
        windows, rings = sliding_windows(x, sliding, None, clock, rings)
        sums.update(zip(sliding, windows, strict=True))
    tree, blocks = block_sums(x, nodes, clock, blocks)
    if running:
        sums.update(running_sums(x, tree, nodes, running, clock))

    current, previous, paired = [], [], []
    for k, (alignment, share) in enumerate(zip(alignments, shares, strict=True)):
        both = share.paired
        if k in sums:
            now, before = (
                centroid(sums[k].current, 2**k, share.current),
                centroid(sums[k].previous, 2**k, share.previous),
            )
        else:
            j, lag = granularity(k, alignment), window_lag(alignment)
            columns = node_windows(tree, nodes, k, alignment, clock)
            now = broadcast(centroid(columns[:, lag:], 2**k, share.current), nodes[j], j, clock)
            before = broadcast(centroid(columns[:, :-lag], 2**k, share.previous), nodes[j], j, clock)
            both = broadcast(both.expand(batch, -1, -1), nodes[j], j, clock).bool()
        current.append(now)
        previous.append(before)
        paired.append(both.squeeze(-1))
    centroids = Pyramid(torch.stack(current, 2), torch.stack(previous, 2), torch.stack(paired, 2))
    return centroids, PyramidState(next_position(clock), rings, blocks)
