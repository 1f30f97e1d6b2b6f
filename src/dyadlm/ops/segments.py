"""Running sums over segments that begin anywhere: words, sentences, or whatever a boundary says.

A segmentation is one boolean a token: it begins a segment. From it follows, once for all that is summed over it, where
the last complete segment and the one before it ended (`segment_plan`). The sums are the recurrence

    y_t = x_t + (0 if t begins a segment, else keep_t) * y_{t-1}

computed tile by tile: a lower triangular matrix inside a tile of 32 tokens, the same recurrence over the tiles' ends.
(Scalar decays in matrix form: Mamba-2, arXiv 2405.21060, section 6.) The state is one row per segmentation.

Dimension letters: B batch, T time, S segmentations, C channels, N tiles, L tokens of a tile.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dyadlm.ops.pyramid import Clock, take

TILE = 32


class Tiles(NamedTuple):
    """Which tokens of a tile share a segment, at one depth of the recursion; no gradient."""

    inside: Tensor  # (B, S, N, L, L) bool: i sums j
    opened: Tensor  # (B, S, N, L) bool: i's segment reaches back before the tile


class SegmentPlan(NamedTuple):
    """Where the segments of a chunk stand."""

    begins: Tensor  # (B, T, S) bool, padding begins nothing
    last: Tensor  # (B, T, S) int64: row of the last complete segment in [earlier, last, running, chunk ...]
    earlier: Tensor  # (B, T, S) int64: row of the one before it
    complete: Tensor  # (B, T, S) int64: segments complete in the document before t's own, at most 2
    length: Tensor  # (B, T, S) int64: tokens of t's segment up to t
    tiles: tuple[Tiles, ...]


class SegmentCount(NamedTuple):
    """What a segmentation carries: integers, one per row and segmentation."""

    length: Tensor  # (B, S) int64: tokens of the open segment
    complete: Tensor  # (B, S) int64: complete segments of the open document, at most 2


def segment_plan(
    boundary: Tensor, clock: Clock, longest: int, state: SegmentCount | None = None
) -> tuple[SegmentPlan, SegmentCount]:
    """The plan of a chunk.

    Args:
        boundary: (B, T, S) bool, token t begins a segment. A document's first token always does.
        longest: segments are cut after so many tokens.
        state: as returned for the chunk before; None at the start.
    """
    batch, time, count = boundary.shape
    device = boundary.device
    if state is None:
        state = SegmentCount(*(torch.zeros(batch, count, dtype=torch.int64, device=device) for _ in range(2)))
    column = torch.arange(time, device=device)[:, None]
    fresh = (clock.index == 0)[..., None]
    since = torch.where(boundary | fresh, column, -1).cummax(1).values
    age = torch.where(since >= 0, column - since, column + state.length[:, None])
    begins = age % longest == 0
    if clock.padded:
        begins = begins & (column < clock.length[:, None, None])
    # A document's first segment has none before it.
    document = torch.where(fresh, column, -1).cummax(1).values
    total = begins.long().cumsum(1)
    before = torch.where(document >= 0, total.gather(1, document.clamp(min=0).expand_as(total)), 0)
    complete = torch.where(document >= 0, total - before, total + state.complete[:, None]).clamp(max=2)

    begun = torch.where(begins, column, -1).cummax(1).values
    previous = begun.gather(1, (begun - 1).clamp(min=0))
    earlier = torch.where(begun > 0, previous + 2, begun + 1)
    length = age % longest + 1
    plan = SegmentPlan(begins, begun + 2, earlier, complete, length, _tiles(begins.transpose(1, 2)))
    final = (clock.length - 1).clamp(min=0)[:, None, None].expand(-1, 1, count)
    empty = (clock.length == 0)[:, None]
    carried = SegmentCount(
        *(
            torch.where(empty, old, new.gather(1, final).squeeze(1))
            for old, new in zip(state, (length, complete), strict=True)
        )
    )
    return plan, carried


def segment_ends(begins: Tensor) -> Tensor:
    """The last column of each token's segment in the chunk: (B, T, S) bool -> (B, T, S) int64."""
    time = begins.shape[1]
    column = torch.arange(1, time + 1, device=begins.device)[:, None]
    follows = torch.nn.functional.pad(begins[:, 1:], (0, 0, 0, 1), value=True)
    return torch.where(follows, column, time).flip(1).cummin(1).values.flip(1) - 1


def _tiles(begins: Tensor) -> tuple[Tiles, ...]:
    """Masks for every depth, from begins (B, S, T)."""
    if begins.shape[-1] == 1:
        return ()
    short = -begins.shape[-1] % TILE if begins.shape[-1] > TILE else 0
    begins = torch.nn.functional.pad(begins, (0, short))
    tiled = begins.unflatten(-1, (-1, min(TILE, begins.shape[-1])))
    ordinal = tiled.long().cumsum(-1)
    inside = (ordinal[..., :, None] == ordinal[..., None, :]).tril()
    here = Tiles(inside, ordinal == 0)
    return (here,) if tiled.shape[-2] == 1 else (here, *_tiles(tiled.any(-1)))


class SegmentState(NamedTuple):
    """What the sums of segments carry, C channels of all segmentations side by side."""

    running: Tensor  # (B, C) sums of the open segment
    last: Tensor  # (B, C) what was made of the last complete segment
    earlier: Tensor  # (B, C) and of the one before


def segment_sums(
    x: Tensor, widths: Sequence[int], plan: SegmentPlan, running: Tensor, log_keep: Tensor | None = None
) -> Tensor:
    """Sums over each token's own segment up to the token.

    Args:
        x: (B, T, C) float32 or float64, the channels of segmentation s being the s-th of `widths`.
        running: (B, C) sums of the open segment before the chunk.
        log_keep: (B, T, S) at most 0: the logarithm of what is kept of the sum when t is added; None: all of it.

    Returns:
        (B, T, C).
    """
    if x.shape[1] == 1:
        kept = (~plan.begins[:, 0]).to(x.dtype)
        if log_keep is not None:
            kept = kept * log_keep[:, 0].exp()
        return x + (spread(kept, widths) * running)[:, None]
    gone = None if log_keep is None else log_keep.transpose(1, 2)
    summed = _scan(_apart(x, widths), _apart(running[:, None], widths).squeeze(2), gone, plan.tiles)
    return _together(summed, widths)


def _apart(x: Tensor, widths: Sequence[int]) -> Tensor:
    """(B, T, all channels) → (B, S, T, C), C the widest; narrower ones are filled with zeros."""
    if len(set(widths)) == 1:
        return x.unflatten(-1, (len(widths), -1)).transpose(1, 2)
    parts = zip(x.split(list(widths), -1), widths, strict=True)
    return torch.stack([torch.nn.functional.pad(part, (0, max(widths) - width)) for part, width in parts], 1)


def _together(x: Tensor, widths: Sequence[int]) -> Tensor:
    """The inverse of `_apart`."""
    if len(set(widths)) == 1:
        return x.transpose(1, 2).flatten(2)
    return torch.cat([part[..., :width] for part, width in zip(x.unbind(1), widths, strict=True)], -1)


def _scan(x: Tensor, running: Tensor, log_keep: Tensor | None, tiles: Sequence[Tiles]) -> Tensor:
    """x (B, S, T, C), running (B, S, C), log_keep (B, S, T) → (B, S, T, C)."""
    time = x.shape[2]
    inside, opened = tiles[0].inside.to(x.dtype), tiles[0].opened.to(x.dtype)
    count, size = opened.shape[-2:]
    short = count * size - time
    tiled = torch.nn.functional.pad(x, (0, 0, 0, short)).unflatten(2, (count, size))
    ends = None
    if log_keep is not None:
        # The logarithms from j to i are summed for each j by itself: in a difference of sums from the tile's start, the
        # rounding would depend on what stood there before the segment, though it be another document.
        kept = torch.nn.functional.pad(log_keep, (0, short)).unflatten(2, (count, size))
        between = kept[..., None].expand(*kept.shape, size).tril(-1).cumsum(-2)
        gone = kept.cumsum(-1)
        inside, opened, ends = inside * between.exp(), opened * gone.exp(), gone[..., -1]
    local = inside @ tiled
    carried = running[:, :, None]
    if count > 1:
        after = _scan(local[..., -1, :], running, ends, tiles[1:])
        carried = torch.cat([carried, after[:, :, :-1]], 2)
    return (local + opened[..., None] * carried[..., None, :]).flatten(2, 3)[:, :, :time]


def spread(values: Tensor, widths: Sequence[int]) -> Tensor:
    """(..., S) → (..., C): each segmentation's number for all its channels."""
    return torch.cat([values[..., s : s + 1].expand(*values.shape[:-1], w) for s, w in enumerate(widths)], -1)


class SegmentWindows(NamedTuple):
    """What each token sees of one or more segmentations, C channels."""

    current: Tensor  # (B, T, C) its own segment up to it
    last: Tensor  # (B, T, C) the last complete one of the document; zero if there is none
    earlier: Tensor  # (B, T, C) the one before that


def segment_windows(
    made: Tensor,
    sums: Tensor,
    widths: Sequence[int],
    plan: SegmentPlan,
    clock: Clock,
    state: SegmentState,
    open_made: Tensor,
) -> tuple[SegmentWindows, SegmentState]:
    """The current, last and earlier segment at each token.

    Args:
        made: (B, T, C) what is made of the running sums at each token, such as their mean.
        sums: (B, T, C') the running sums, of which the last row of each document is carried.
        open_made: (B, C) the same of the sums that the state carries.
    """
    history = _apart(torch.cat([state.earlier[:, None], state.last[:, None], open_made[:, None], made], 1), widths)
    seen = []
    for row, least in ((plan.last, 1), (plan.earlier, 2)):
        row, there = row.transpose(1, 2)[..., None], (plan.complete >= least).transpose(1, 2)[..., None]
        seen.append(_together(history.gather(2, row.expand(-1, -1, -1, history.shape[-1])) * there, widths))
    windows = SegmentWindows(made, *seen)
    rows = (clock.length - 1)[:, None]
    carried = []
    for new, old in ((sums, state.running), (windows.last, state.last), (windows.earlier, state.earlier)):
        if not clock.padded:
            carried.append(new[:, -1])
            continue
        carried.append(torch.where(rows >= 0, take(new, rows.clamp(min=0)).squeeze(1), old))
    return windows, SegmentState(*carried)
