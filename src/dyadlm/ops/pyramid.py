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
    fresh = position is None and length is None and starts is None
    column = torch.arange(time, device=device)
    if position is None:
        position = torch.zeros(batch, dtype=torch.int64, device=device)
    if length is None:
        length = torch.full((batch,), time, dtype=torch.int64, device=device)
    index = position[:, None] + column
    if starts is not None:
        start = torch.where(starts, column, -1).cummax(1).values
        index = torch.where(start >= 0, column - start, index)
    return Clock(index, length, position, fresh)


def next_position(clock: Clock) -> Tensor:
    """(B,) int64: tokens of each row's open document after the chunk."""
    last = (clock.length - 1).clamp(min=0)[:, None]
    return torch.where(clock.length > 0, clock.index.gather(1, last).squeeze(1) + 1, clock.position)


def take(sequence: Tensor, where: Tensor) -> Tensor:
    """Rows of (B, N, D) at (B, M) int64 positions of the second dimension -> (B, M, D)."""
    return sequence.gather(1, where[..., None].expand(-1, -1, sequence.shape[-1]))


def latest(history: Tensor, count: int, clock: Clock) -> Tensor:
    """The last `count` of a (B, count + T, D) history of all tokens, as of each row's last real token.

    What belongs to an earlier document is dropped: the state after a document is that of the document alone.
    """
    if clock.fresh:
        return history[:, -count:]
    slots = torch.arange(count, device=history.device)
    own = next_position(clock)[:, None] >= count - slots
    return take(history, clock.length[:, None] + slots) * own[..., None]


def accumulator(x: Tensor) -> Tensor:
    """Sums are kept in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Windows(NamedTuple):
    """Two adjacent windows of one level at every token, as sums."""

    current: Tensor  # (B, T, D)
    previous: Tensor  # (B, T, D)


def sliding_windows(
    x: Tensor,
    levels: Sequence[int],
    channels: Sequence[int] | None,
    clock: Clock,
    rings: tuple[Tensor, ...] = (),
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
        if not clock.fresh:
            shifted = shifted * (clock.index >= width)[..., None]
        if j in levels:
            own = total.shape[-1] if channels is None else channels[len(windows)]
            windows.append(Windows(total[..., :own], shifted[..., :own]))
            if channels is not None:
                total, shifted = total[..., own:], shifted[..., own:]
        if j < levels[-1]:
            total = total + shifted
    return windows, tuple(carried)


class Nodes(NamedTuple):
    """One level of the block tree in a chunk: the four blocks before it, then the N that complete in it."""

    sums: Tensor  # (B, 4 + N, D)
    ordinal: Tensor  # (B or 1, 4 + N) int64: 1 for the first block of its document; below 1: not of this document
    done: Tensor  # (B or 1, T) int64: blocks completed in the chunk up to each token, itself included
    column: Tensor | None  # (B, N) int64: the token that completed each block; None if fresh (implied by the ordinal)


def block_tree(
    x: Tensor, depth: int, clock: Clock, state: tuple[Tensor, ...] = ()
) -> tuple[list[Nodes], tuple[Tensor, ...]]:
    """Sums over aligned blocks of 1, 2, 4 ... 2^depth tokens, pairwise.

    Args:
        x: (B, T, D).
        state: the last four sums per level (B, 4, D), as returned; empty for a fresh start.

    Returns:
        Nodes per level 0 ... depth, and the new state. Off the fresh path N is an upper bound, ceil(T / 2^j); what lies
        beyond `done` is filler and is read by nothing.
    """
    batch, time, width = x.shape
    x = accumulator(x)
    column_index = torch.arange(time, device=x.device)
    slots = torch.arange(HISTORY, device=x.device)
    tree: list[Nodes] = []
    carried = []
    for j in range(depth + 1):
        history = state[j] if state else x.new_zeros(batch, HISTORY, width)
        if clock.fresh:
            sums = x
            if j:
                below = tree[-1].sums[:, HISTORY:]
                pairs = below.shape[1] // 2
                sums = below[:, 0 : 2 * pairs : 2] + below[:, 1 : 2 * pairs : 2]
            ordinal = torch.arange(1 - HISTORY, sums.shape[1] + 1, device=x.device)[None]
            nodes = Nodes(torch.cat([history, sums], 1), ordinal, (column_index + 1)[None] // 2**j, None)
            carried.append(nodes.sums[:, -HISTORY:])
        else:
            completes = ((clock.index + 1) % 2**j == 0) & (column_index < clock.length[:, None])
            done = completes.cumsum(1)
            wanted = torch.arange(1, -(-time // 2**j) + 1, device=x.device).expand(batch, -1).contiguous()
            column = torch.searchsorted(done, wanted).clamp(max=time - 1)
            if j:
                second = HISTORY - 1 + tree[-1].done.gather(1, column)
                sums = take(tree[-1].sums, (second - 1).clamp(min=0)) + take(tree[-1].sums, second)
            else:
                sums = take(x, column)
            before = clock.position[:, None] // 2**j - (HISTORY - 1 - slots)
            ordinal = torch.cat([before, (clock.index.gather(1, column) + 1) // 2**j], 1)
            nodes = Nodes(torch.cat([history, sums], 1), ordinal, done, column)
            own = next_position(clock)[:, None] // 2**j >= HISTORY - slots
            carried.append(take(nodes.sums, done[:, -1:] + slots) * own[..., None])
        tree.append(nodes)
    return tree, tuple(carried)


def share(have: Tensor, parts: int, width: int, early: str, dtype: torch.dtype) -> Tensor:
    """What turns a sum into a centroid: one over the tokens it counts, zero if the level is absent.

    Args:
        have: int64, how many of the window's `parts` lie in the document; the window has `width` tokens.

    Returns:
        `dtype`, the shape of `have` with a last dimension of 1.
    """
    if early == "partial":
        tokens = (have.clamp(min=1) * (width // parts)).to(dtype)
        return ((have > 0) / tokens)[..., None]
    return ((have >= (parts if early == "mask" else 1)).to(dtype) / width)[..., None]


class Columns(NamedTuple):
    """The windows of one block-aligned level at its nodes: node n's current window is row lag + n, its previous row n.

    Node 0 is the last one that was complete before the chunk.
    """

    sums: Tensor  # (B, lag + N + 1, D)
    lag: int
    current_share: Tensor  # (B or 1, N + 1, 1)
    previous_share: Tensor  # (B or 1, N + 1, 1)
    paired: Tensor  # (B or 1, N + 1, 1) bool: both windows complete


def granularity(level: int, alignment: str) -> int:
    """The j for which the windows of a block-aligned level change every 2^j tokens."""
    return level - 1 if alignment == "dual" else level


def node_columns(tree: Sequence[Nodes], level: int, alignment: str, early: str, fresh: bool) -> Columns:
    """The windows of a `block` or `dual` level. A dual window is two adjacent blocks of the level below."""
    parts = 2 if alignment == "dual" else 1
    nodes = tree[granularity(level, alignment)]
    keep = HISTORY - 1 - parts
    sums, ordinal = nodes.sums[:, keep:], nodes.ordinal[:, keep:]
    if not fresh:  # a fresh history is zeros; a carried one may belong to an earlier document
        sums = sums * (ordinal >= 1)[..., None]
    if parts == 2:
        older = nodes.sums[:, keep - 1 : -1]
        sums = sums + (older if fresh else older * (ordinal >= 2)[..., None])
    ordinal = ordinal[:, parts:]
    have_current, have_previous = ordinal.clamp(0, parts), (ordinal - parts).clamp(0, parts)
    width = 2**level
    return Columns(
        sums,
        parts,
        share(have_current, parts, width, early, sums.dtype),
        share(have_previous, parts, width, early, sums.dtype),
        (have_previous == parts)[..., None],
    )


def broadcast(values: Tensor, nodes: Nodes, j: int, clock: Clock, delay: int = 0) -> Tensor:
    """What each token sees of values at nodes of granularity 2^j: the last complete node, or zero before the first.

    Args:
        values: (B, N + 1, D), the first for the last node before the chunk.
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
    return take(values, where) * (clock.index + 1 - delay >= 2**j)[..., None]


def hand_down(values: Tensor, coarse: Nodes, fine: Nodes, coarse_j: int, fine_j: int) -> Tensor:
    """What each node of granularity 2^fine_j sees of values at nodes of the coarser 2^coarse_j.

    Args:
        values: (B, coarse N + 1, D).

    Returns:
        (B, fine N + 1, D).
    """
    count = fine.sums.shape[1] - HISTORY + 1
    if fine.column is None:
        return values.unsqueeze(2).expand(-1, -1, 2 ** (coarse_j - fine_j), -1).flatten(1, 2)[:, :count]
    where = torch.nn.functional.pad(coarse.done.gather(1, fine.column), (1, 0))
    exists = fine.ordinal[:, HISTORY - 1 :] >= 2 ** (coarse_j - fine_j)
    return take(values, where) * exists[..., None]


def running_sums(x: Tensor, tree: Sequence[Nodes], levels: Sequence[int], clock: Clock) -> dict[int, Windows]:
    """The windows of `prefix` levels at every token: the current block so far, and the last complete block before it.

    P_{k}(t) = P_{k-1}(t), plus the first half of the block once t is in the second.
    """
    total = accumulator(x)
    windows = {}
    for level in range(max(levels) + 1):
        if level in levels:
            complete = broadcast(tree[level].sums[:, HISTORY - 1 :], tree[level], level, clock, delay=1)
            windows[level] = Windows(total, complete)
        half = broadcast(tree[level].sums[:, HISTORY - 1 :], tree[level], level, clock, delay=1)
        total = total + half * ((clock.index >> level) & 1)[..., None]
    return windows


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
    current: dict[int, Tensor] = {}
    previous: dict[int, Tensor] = {}
    paired: dict[int, Tensor] = {}
    seen = clock.index + 1

    sliding = [k for k, alignment in enumerate(alignments) if alignment == "sliding"]
    if sliding:
        windows, rings = sliding_windows(x, sliding, None, clock, rings)
        for k, (now, before) in zip(sliding, windows, strict=True):
            width = 2**k
            current[k] = now * share(seen.clamp(max=width), width, width, early, now.dtype)
            previous[k] = before * share((seen - width).clamp(0, width), width, width, early, now.dtype)
            paired[k] = seen >= 2 * width

    deep = {k: granularity(k, alignment) for k, alignment in enumerate(alignments) if alignment != "sliding"}
    if deep:
        tree, blocks = block_tree(x, max(deep.values()), clock, blocks)
        running = [k for k in deep if alignments[k] == "prefix"]
        for k, (now, before) in (running_sums(x, tree, running, clock) if running else {}).items():
            width = 2**k
            current[k] = now / (clock.index % width + 1)[..., None]
            previous[k] = before * share((clock.index // width).clamp(max=1), 1, width, early, now.dtype)
            paired[k] = clock.index >= width
        for k, j in deep.items():
            if alignments[k] == "prefix":
                continue
            columns = node_columns(tree, k, alignments[k], early, clock.fresh)
            current[k] = broadcast(columns.sums[:, columns.lag :] * columns.current_share, tree[j], j, clock)
            previous[k] = broadcast(columns.sums[:, : -columns.lag] * columns.previous_share, tree[j], j, clock)
            paired[k] = seen // 2**j >= 2 * columns.lag

    def stack(levels: dict[int, Tensor]) -> Tensor:
        return torch.stack([levels[k].expand(batch, *levels[k].shape[1:]) for k in range(len(alignments))], 2)

    return Pyramid(stack(current), stack(previous), stack(paired)), PyramidState(next_position(clock), rings, blocks)
