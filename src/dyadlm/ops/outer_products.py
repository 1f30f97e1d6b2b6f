"""Sums of outer products over the windows of all levels, for tokens that ask them by a key.

A token is entered as k_t v_t^T (linear attention, Katharopoulos et al. 2020, arXiv 2006.16236), and each window holds
the sum of its tokens' entries, so that one token can ask each scale of the past apart (log-linear attention, Guo et al.
2025, arXiv 2506.04761). Windows and their state are those of the levels: `sliding`, `blocks`, `segments`.

Dimension letters: B batch, T time, K numbers of a key, M of a value, C = K M numbers of an entry, W windows,
S segmentations.
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
    node_windows,
    running_sums,
    window_lag,
)
from dyadlm.ops.clock import Clock, accumulator
from dyadlm.ops.segments import SegmentPlan, SegmentState, segment_sums, segment_windows
from dyadlm.ops.sliding import sliding_windows


class OuterState(NamedTuple):
    """What the windows carry, each as the operator of its kind returns it."""

    rings: tuple[Tensor, ...] = ()
    blocks: tuple[Tensor, ...] = ()
    segments: tuple[Tensor, ...] = ()


def outer_windows(
    entries: Tensor,
    weights: Tensor,
    alignments: Sequence[str],
    nodes: Sequence[Nodes],
    plan: SegmentPlan | None,
    clock: Clock,
    state: OuterState,
) -> tuple[list[Tensor], OuterState]:
    """What each token sees of each window, over the root of how many tokens it may hold: the noise of entries that
    nobody asked for grows as that root.

    Args:
        entries: (B, T, C), weights included.
        weights: (B, T, 1): how much each token counts.
        alignments: of the geometric levels; each shows its current window, which with that of the next level tells the
            previous one. nodes: of their block tree.
        plan: of the segments; each segmentation shows the open segment, then the last complete one. None: none.

    Returns:
        W windows (B, T, C), geometric levels first, and the new state.
    """
    entries = accumulator(entries)
    seen: dict[int, Tensor] = {}
    sliding = [k for k, alignment in enumerate(alignments) if alignment == "sliding"]
    rings: tuple[Tensor, ...] = ()
    if sliding:
        windows, rings = sliding_windows(entries, sliding, None, clock, state.rings)
        seen |= {k: window.current for k, window in zip(sliding, windows, strict=True)}
    tree, blocks = block_sums(entries, nodes, clock, state.blocks)
    prefixes = [k for k, alignment in enumerate(alignments) if alignment == "prefix"]
    if prefixes:
        growing = running_sums(entries, tree, nodes, prefixes, clock)
        seen |= {k: window.current for k, window in growing.items()}
    for k, alignment in enumerate(alignments):
        if alignment in ("block", "dual"):
            j = granularity(k, alignment)
            current = node_windows(tree, nodes, k, alignment, clock)[:, window_lag(alignment) :]
            seen[k] = broadcast(current, nodes[j], j, clock)
    found = [seen[k] * 2 ** (-k / 2) for k in range(len(alignments))]
    if plan is None:
        return found, OuterState(rings, blocks)
    of_segments, segments = _segment_windows(entries, weights, plan, clock, state.segments)
    return found + of_segments, OuterState(rings, blocks, segments)


def _segment_windows(
    entries: Tensor, weights: Tensor, plan: SegmentPlan, clock: Clock, state: tuple[Tensor, ...]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The open segment and the last complete one of each segmentation (B, T, C), and a `SegmentState`, whose open sums
    have the sum of weights beside them."""
    count, size = plan.begins.shape[-1], entries.shape[-1]
    counted = torch.cat([entries, weights.to(entries.dtype)], -1).repeat(1, 1, count)
    if state:
        before = SegmentState(*state)
    else:
        nothing = entries.new_zeros(entries.shape[0], count * (size + 1))
        before = SegmentState(nothing, *(nothing[:, : count * size],) * 2)
    sums = segment_sums(counted, [size + 1] * count, plan, before.running)
    made, open_made = (_scaled(part, count) for part in (sums, before.running))
    windows, after = segment_windows(made, sums, [size] * count, plan, clock, before, open_made)
    pairs = zip(windows.current.split(size, -1), windows.last.split(size, -1), strict=True)
    return [window for pair in pairs for window in pair], tuple(after)


def _scaled(sums: Tensor, count: int) -> Tensor:
    """Sums (..., S (C + 1)) over the root of their weights: (..., S C)."""
    apart = sums.unflatten(-1, (count, -1))
    return (apart[..., :-1] * apart[..., -1:].clamp(min=1e-6).rsqrt()).flatten(-2)


def ask(query: Tensor, windows: Sequence[Tensor]) -> Tensor:
    """What each token's query (B, T, K) finds in each of W windows (B, T, K M): (B, T, W M)."""
    # Number by number: a product of matrices as small takes several times as long on a CPU.
    width, asking = query.shape[-1], query[..., None]
    return torch.cat([(asking * window.unflatten(-1, (width, -1))).sum(-2) for window in windows], -1)


def outer_numbers(alignments: Sequence[str], segmentations: int, size: int) -> int:
    """Numbers of the state for entries of C numbers."""
    sliding = max((k for k, alignment in enumerate(alignments) if alignment == "sliding"), default=-1)
    depth = max(
        (granularity(k, alignment) for k, alignment in enumerate(alignments) if alignment != "sliding"), default=-1
    )
    rings, blocks = 2 ** (sliding + 1) - 1, (depth + 1) * HISTORY
    return (rings + blocks + 3 * segmentations) * size + segmentations
