"""The causal dyadic pyramid: sums over windows of 2^k tokens, for whole sequences and for chunks that carry a state.

One function serves training, chunked prefill and token-by-token decoding: chunk and state in, chunk and state out.
Two trees of pairwise sums in float32 hold everything (a running sum drifts; pairwise sums do not):

- `sliding_windows`: the window ends at t. S_{j+1}(t) = S_j(t) + S_j(t - 2^j); the state is a ring of 2^j sums a level.
- `block_tree`: aligned blocks, each the sum of two below. The state is the last four blocks per level. Block, dual and
  prefix windows are read from it.

Dimension letters: B batch, T time (columns of the chunk), N nodes (blocks complete in the chunk), D width, K levels.
Level k has windows of w = 2^k tokens. A level of granularity h = 2^j changes every h tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENTS = ("sliding", "block", "dual", "prefix")
EARLY = ("zero", "partial", "mask")
HISTORY = 4  # blocks kept per level of the tree: two windows of two half-blocks


@dataclass(frozen=True)
class Clock:
    """Where each column of a chunk stands: nodes pair by document and index in it, never by batch column.

    Real tokens come first in a row; columns from `length` on are padding, which neither counts nor writes.
    """

    index: Tensor  # (B, T) int64, index of the token in its document
    length: Tensor  # (B,) int64, real tokens of the row
    position: Tensor  # (B,) int64, tokens of the row's open document before the chunk
    padded: bool  # some row may end in padding
    restarts: bool  # a document may start inside the chunk; if none does, the zeros of the start need no mask
    fresh: bool  # every row is one document from its first token to column T: trees align with columns


def make_clock(
    batch: int,
    time: int,
    *,
    position: Tensor | None = None,
    length: Tensor | None = None,
    starts: Tensor | None = None,
    device: torch.device | None = None,
) -> Clock:
    """The clock of a chunk of `time` columns.

    Args:
        position: (B,) int64 tokens already seen of each row's document; None for a fresh start.
        length: (B,) int64 real tokens per row; None if all are.
        starts: (B, T) bool, True where a new document begins; None if none does.
    """
    padded, restarts = length is not None, starts is not None
    fresh = position is None and not padded and not restarts
    column = torch.arange(time, device=device)
    if position is None:
        position = torch.zeros(batch, dtype=torch.int64, device=device)
    if length is None:
        length = torch.full((batch,), time, dtype=torch.int64, device=device)
    index = position[:, None] + column
    if starts is not None:
        start = torch.where(starts, column, -1).cummax(1).values
        index = torch.where(start >= 0, column - start, index)
    return Clock(index, length, position, padded, restarts, fresh)


def next_position(clock: Clock) -> Tensor:
    """(B,) int64: tokens of each row's open document after the chunk."""
    last = (clock.length - 1).clamp(min=0)[:, None]
    return torch.where(clock.length > 0, clock.index.gather(1, last).squeeze(1) + 1, clock.position)


def take(sequence: Tensor, where: Tensor) -> Tensor:
    """Rows of (B, N, D) at (B, M) int64 positions of the second dimension -> (B, M, D)."""
    return sequence.gather(1, where[..., None].expand(-1, -1, sequence.shape[-1]))


def accumulator(x: Tensor) -> Tensor:
    """Sums are kept in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Windows(NamedTuple):
    """Two adjacent windows of one level, as sums."""

    current: Tensor  # (B, T or nodes, D)
    previous: Tensor  # (B, T or nodes, D)


# ---- Windows that end at every token


def latest(history: Tensor, count: int, clock: Clock) -> Tensor:
    """The last `count` of a (B, count + T, D) history of all tokens, as of each row's last real token.

    What belongs to an earlier document is dropped: the state after a document is that of the document alone.
    """
    if not clock.padded and not clock.restarts:
        return history[:, -count:]
    slots = torch.arange(count, device=history.device)
    own = next_position(clock)[:, None] >= count - slots
    return take(history, clock.length[:, None] + slots) * own[..., None]


def sliding_windows(
    x: Tensor, levels: Sequence[int], channels: Sequence[int] | None, clock: Clock, rings: tuple[Tensor, ...] = ()
) -> tuple[list[Windows], tuple[Tensor, ...]]:
    """Sums over the last 2^k tokens and over the 2^k before them, at every token, by doubling.

    S_{j+1}(t) = S_j(t) + S_j(t - 2^j): the sum that a level adds is also its previous window.

    Args:
        x: (B, T, C).
        levels: ascending.
        channels: widths that split C among the levels, each summing its own part; None: every level sums all of C.
        rings: the state as returned, ring j holding the last 2^j values of S_j; empty for a fresh start.

    Returns:
        Windows per level, (B, T, channels of the level) each, and the new rings.
    """
    batch, time = x.shape[:2]
    total = accumulator(x)
    windows: list[Windows] = []
    carried = []
    for j in range(levels[-1] + 1):
        width = 2**j
        ring = rings[j] if rings else total.new_zeros(batch, width, total.shape[-1])
        history = torch.cat([ring, total], 1)
        carried.append(latest(history, width, clock))
        shifted = history[:, :time]
        if clock.restarts:
            shifted = shifted * (clock.index >= width)[..., None]
        if j in levels:
            own = total.shape[-1] if channels is None else channels[len(windows)]
            windows.append(Windows(total[..., :own], shifted[..., :own]))
            if channels is not None:
                total, shifted = total[..., own:], shifted[..., own:]
        if j < levels[-1]:
            total = total + shifted
    return windows, tuple(carried)


# ---- Aligned blocks


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


# ---- From sums to centroids


class Shares(NamedTuple):
    """What makes a sum over a window of w tokens, divided by w, the level's centroid; and where both are complete."""

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


# ---- All of it


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
    """Centroids over dyadic windows, in parallel over a chunk, continuing from a state (design, section 2).

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
