"""Sums over aligned blocks of 1, 2, 4 ... tokens: a tree in which each block is the sum of the two below it.

Block, dual and prefix windows are read from the tree. The state is the last four blocks of each level.

Dimension letters: B batch, T time (columns of the chunk), N nodes (blocks complete in the chunk), D width.
Level k has windows of w = 2^k tokens. A level of granularity h = 2^j changes every h tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dyadlm.ops.clock import Clock, accumulator, next_position, take
from dyadlm.ops.sliding import Windows

HISTORY = 4  # blocks kept per level of the tree: two windows of two half-blocks


class Nodes(NamedTuple):
    """Where one level of the block tree stands in a chunk: the four blocks before it, then the N that complete in it.

    Off the fresh path N is an upper bound, ceil(T / 2^j); what lies beyond `done` is filler that nothing reads.
    """

    ordinal: Tensor  # (B or 1, 4 + N) int64: 1 for the first block of its document; below 1: not of this document
    done: Tensor  # (B or 1, T) int64: blocks completed in the chunk up to each token, itself included
    column: Tensor | None  # (B, N) int64: the token that completed each block; None if fresh (implied by the ordinal)
    child: Tensor | None  # (B, N) int64: which of the level below is the later half of each block; None if fresh


def tree_nodes(clock: Clock, depth: int) -> list[Nodes]:
    """Where blocks of 1, 2, 4 ... 2^depth tokens complete in a chunk. The same for whatever is summed over them."""
    time, device = clock.index.shape[1], clock.index.device
    column_index = torch.arange(time, device=device)
    nodes: list[Nodes] = []
    for j in range(depth + 1):
        if clock.fresh:
            ordinal = torch.arange(1 - HISTORY, time // 2**j + 1, device=device)[None]
            nodes.append(Nodes(ordinal, (column_index + 1)[None] // 2**j, None, None))
            continue
        completes = (clock.index + 1) % 2**j == 0
        if clock.padded:
            completes = completes & (column_index < clock.length[:, None])
        done = completes.cumsum(1)
        wanted = torch.arange(1, -(-time // 2**j) + 1, device=device).expand(done.shape[0], -1).contiguous()
        column = torch.searchsorted(done, wanted).clamp(max=time - 1)
        before = clock.position[:, None] // 2**j - torch.arange(HISTORY - 1, -1, -1, device=device)
        ordinal = torch.cat([before, (clock.index.gather(1, column) + 1) // 2**j], 1)
        child = HISTORY - 1 + nodes[-1].done.gather(1, column) if j else None
        nodes.append(Nodes(ordinal, done, column, child))
    return nodes


def block_sums(
    x: Tensor, nodes: Sequence[Nodes], clock: Clock, state: tuple[Tensor, ...] = ()
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Sums over aligned blocks of 1, 2, 4 ... tokens, pairwise, where `nodes` says they complete.

    Args:
        x: (B, T, D).
        state: the last four sums per level (B, 4, D), as returned; empty for a fresh start.

    Returns:
        Per level (B, 4 + N, D): the four blocks before the chunk, then those that complete in it; and the new state.
    """
    batch, _, width = x.shape
    x = accumulator(x)
    slots = torch.arange(HISTORY, device=x.device)
    tree: list[Tensor] = []
    carried = []
    for j, level in enumerate(nodes):
        history = state[j] if state else x.new_zeros(batch, HISTORY, width)
        if j == 0:
            sums = x if level.column is None else take(x, level.column)
        elif level.child is None:
            below = tree[-1][:, HISTORY:]
            pairs = below.shape[1] // 2
            sums = below[:, 0 : 2 * pairs : 2] + below[:, 1 : 2 * pairs : 2]
        else:
            sums = take(tree[-1], (level.child - 1).clamp(min=0)) + take(tree[-1], level.child)
        tree.append(torch.cat([history, sums], 1))
        if clock.fresh:
            carried.append(tree[-1][:, -HISTORY:])
            continue
        last = take(tree[-1], level.done[:, -1:] + slots)
        if clock.restarts:  # the state after a document is that of the document alone
            last = last * (next_position(clock)[:, None] // 2**j >= HISTORY - slots)[..., None]
        carried.append(last)
    return tree, tuple(carried)


def granularity(level: int, alignment: str) -> int:
    """The j for which the windows of a level that is not sliding change, or begin anew, every 2^j tokens."""
    return level - 1 if alignment == "dual" else level


def node_windows(tree: Sequence[Tensor], nodes: Sequence[Nodes], level: int, alignment: str, clock: Clock) -> Tensor:
    """The windows of a `block` or `dual` level, as sums: (B, lag + N + 1, D), lag 1 or 2 (`window_lag`).

    Node n's current window is row lag + n, its previous window row n; node 0 is the last one before the chunk. A dual
    window is two adjacent blocks of the level below.
    """
    lag = window_lag(alignment)
    j = granularity(level, alignment)
    keep = HISTORY - 1 - lag
    windows, ordinal = tree[j][:, keep:], nodes[j].ordinal[:, keep:]
    if clock.restarts:  # a block may belong to an earlier document
        windows = windows * (ordinal >= 1)[..., None]
    if alignment == "dual":
        older = tree[j][:, keep - 1 : -1]
        windows = windows + (older * (ordinal >= 2)[..., None] if clock.restarts else older)
    return windows


def window_lag(alignment: str) -> int:
    """How many nodes back a level's previous window stands."""
    return 2 if alignment == "dual" else 1


def broadcast(values: Tensor, nodes: Nodes, j: int, clock: Clock, delay: int = 0) -> Tensor:
    """What each token sees of values at nodes of granularity 2^j: the last complete node, or zero before the first.

    Args:
        values: (B, N + 1, D), the first for the last node before the chunk: zeros if that is of no document.
        delay: 1 to read the last node complete before the token.

    Returns:
        (B, T, D).
    """
    time = clock.index.shape[1]
    if clock.fresh:
        repeated = values.unsqueeze(2).expand(-1, -1, 2**j, -1).flatten(1, 2)
        return repeated[:, 1 - delay : 1 - delay + time]
    where = nodes.done
    if delay:
        where = (where - ((clock.index + 1) % 2**j == 0).long()).clamp(min=0)
    seen = take(values, where)
    return seen * (clock.index + 1 - delay >= 2**j)[..., None] if clock.restarts else seen


def hand_down(values: Tensor, coarse: Nodes, fine: Nodes, steps: int, clock: Clock) -> Tensor:
    """What each node sees of values at nodes 2^steps times as coarse.

    Args:
        values: (B, coarse N + 1, D).

    Returns:
        (B, fine N + 1, D).
    """
    if fine.column is None:
        count = fine.ordinal.shape[1] - HISTORY + 1
        return values.unsqueeze(2).expand(-1, -1, 2**steps, -1).flatten(1, 2)[:, :count]
    where = torch.nn.functional.pad(coarse.done.gather(1, fine.column), (1, 0))
    seen = take(values, where)
    return seen * (fine.ordinal[:, HISTORY - 1 :] >= 2**steps)[..., None] if clock.restarts else seen


def running_sums(
    x: Tensor, tree: Sequence[Tensor], nodes: Sequence[Nodes], levels: Sequence[int], clock: Clock
) -> dict[int, Windows]:
    """The windows of `prefix` levels at every token: the current block so far, and the last complete block before it.

    P_{k+1}(t) = P_k(t), plus the first half of the block once t is in the second.
    """
    total = accumulator(x)
    windows = {}
    for level in range(max(levels) + 1):
        complete = broadcast(tree[level][:, HISTORY - 1 :], nodes[level], level, clock, delay=1)
        if level in levels:
            windows[level] = Windows(total, complete)
        total = total + complete * ((clock.index >> level) & 1)[..., None]
    return windows
