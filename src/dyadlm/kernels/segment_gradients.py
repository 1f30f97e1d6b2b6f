"""The gradient of the features of a semantic level; names and formulas are those of `segments`.

A program goes through a stretch of a text from its last tile to its first. What reaches its tokens from behind, it sums
as `stretches` says: from the rest of the segment that stands there, and from the one after it, in which the mean of the
former is the complete one. Sums are float32.

Dimension letters: B batch, T time, N stretches, R rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyadlm.kernels.stretches import covered, lying_alike, row_of, so_far, tile_of, whole


@triton.jit
def _slopes(features, slope, token, there, channel, inside, rank: tl.constexpr):
    """Of tokens, the gradients of both means through the feature, and the mean of the open segment: (rows, padded)."""
    place = token[:, None] * (3 * rank) + channel[None, :]
    read = there[:, None] & inside[None, :]
    product = tl.load(slope + place, mask=read, other=0.0).to(tl.float32)
    opened = tl.load(features + place + rank, mask=read, other=0.0).to(tl.float32)
    closed = tl.load(features + place + 2 * rank, mask=read, other=0.0).to(tl.float32)
    of_open = product * closed + tl.load(slope + place + rank, mask=read, other=0.0).to(tl.float32)
    of_closed = product * opened + tl.load(slope + place + 2 * rank, mask=read, other=0.0).to(tl.float32)
    return of_open, of_closed, opened


@triton.jit
def _add_tokens(of_closed, pull, lost, features, slope, counts, complete, plan_step, first, end, channel, inside,
                rank: tl.constexpr, rows: tl.constexpr):  # fmt: skip
    """Add those of the tokens from `first` to before `end`: the gradients of the complete mean (padded), those of the
    open mean over its sum of weights (padded), and these times the mean.
    """
    for start in range(first, end, rows):
        token = start + tl.arange(0, rows)
        there = token < end
        known = tl.load(complete + token * plan_step, mask=there, other=0) >= 1
        own, closed, opened = _slopes(features, slope, token, there, channel, inside, rank)
        own = own / tl.load(counts + token, mask=there, other=1.0)[:, None]
        of_closed += tl.sum(tl.where(known[:, None], closed, 0.0), 0)
        pull += tl.sum(own, 0)
        lost += tl.sum(tl.sum(own * opened, 1), 0)
    return of_closed, pull, lost


@triton.jit
def _add_stretches(of_closed, pull, lost, sums, first, end, channel, inside, rank: tl.constexpr, rows: tl.constexpr):
    """Add what the stretches from the `first`-th to before the `end`-th sum to."""
    for start in range(first, end, rows):
        stretch = start + tl.arange(0, rows)
        there, place = stretch < end, sums + stretch * (2 * rank + 1)
        part, read = place[:, None] + channel[None, :], there[:, None] & inside[None, :]
        of_closed += tl.sum(tl.load(part, mask=read, other=0.0), 0)
        pull += tl.sum(tl.load(part + rank, mask=read, other=0.0), 0)
        lost += tl.sum(tl.load(place + 2 * rank, mask=there, other=0.0), 0)
    return of_closed, pull, lost


@triton.jit
def _behind(features, slope, counts, sums, complete, plan_step, first, end, channel, inside, rank: tl.constexpr,
            rows: tl.constexpr, tiles: tl.constexpr, padded: tl.constexpr):  # fmt: skip
    """The three sums of `_add_tokens` over the tokens from `first` to before `end`, all of one segment."""
    of_closed = tl.zeros((padded,), tl.float32)
    pull = tl.zeros((padded,), tl.float32)
    lost = tl.zeros((1,), tl.float32)
    begin, rest = whole(first, end, rows * tiles)
    for edge in range(2):
        start, stop = tl.where(edge == 0, first, rest), tl.where(edge == 0, begin, end)
        of_closed, pull, lost = _add_tokens(
            of_closed,
            pull,
            lost,
            features,
            slope,
            counts,
            complete,
            plan_step,
            start,
            stop,
            channel,
            inside,
            rank,
            rows,
        )
    return _add_stretches(
        of_closed, pull, lost, sums, begin // (rows * tiles), rest // (rows * tiles), channel, inside, rank, rows
    )


@triton.jit
def _stretches_kernel(
    features, slope, counts, last, complete, sums, plan_row, plan_step, time, stretches,
    rank: tl.constexpr, rows: tl.constexpr, tiles: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """The three sums of `_add_tokens`, of stretches that one segment covers; nothing else is read later."""
    row = (tl.program_id(0) // stretches).to(tl.int64)
    first = (tl.program_id(0) % stretches) * (rows * tiles)
    if covered(last + row * plan_row, first, plan_step, time, rows * tiles):
        complete += row * plan_row
        counts += row * time
        features += row * time * (3 * rank)
        slope += row * time * (3 * rank)
        channel = tl.arange(0, padded)
        inside = channel < rank
        of_closed, pull = tl.zeros((padded,), tl.float32), tl.zeros((padded,), tl.float32)
        lost = tl.zeros((1,), tl.float32)
        of_closed, pull, lost = _add_tokens(
            of_closed, pull, lost, features, slope, counts, complete, plan_step, first, first + rows * tiles, channel,
            inside, rank, rows,
        )  # fmt: skip
        place = sums + tl.program_id(0).to(tl.int64) * (2 * rank + 1)
        tl.store(place + channel, of_closed, mask=inside)
        tl.store(place + rank + channel, pull, mask=inside)
        tl.store(place + 2 * rank + tl.arange(0, 1), lost)


@triton.jit
def _gradients_kernel(
    x, weight, sums, last, complete, ends, features, slope, counts, x_slope, weight_slope,
    x_row, x_step, weight_row, weight_step, plan_row, plan_step, time, stretches,
    rank: tl.constexpr, rows: tl.constexpr, tiles: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // stretches).to(tl.int64)
    first = (tl.program_id(0) % stretches) * (rows * tiles)
    x += row * x_row
    weight += row * weight_row
    sums += row * stretches * (2 * rank + 1)
    last += row * plan_row
    complete += row * plan_row
    ends += row * plan_row
    counts += row * time
    features += row * time * (3 * rank)
    slope += row * time * (3 * rank)
    channel, place = tl.arange(0, padded), tl.arange(0, rows)
    inside, head = channel < rank, place == 0
    # What comes from behind the stretch: from the rest of the segment that stands there, and from the one after it.
    after = tl.minimum(first + rows * tiles, time)
    end = tl.load(ends + after * plan_step, mask=after < time, other=0).to(tl.int32) + 1
    end = tl.where(after < time, end, time)
    beyond = tl.load(ends + end * plan_step, mask=end < time, other=0).to(tl.int32) + 1
    beyond = tl.where(end < time, beyond, end)
    of_closed, pull, lost = _behind(
        features, slope, counts, sums, complete, plan_step, after, end, channel, inside, rank, rows, tiles, padded
    )
    of_next, _, _ = _behind(
        features, slope, counts, sums, complete, plan_step, end, beyond, channel, inside, rank, rows, tiles, padded
    )
    last_count = tl.load(counts + end - 1)
    last_mean = tl.load(features + (end - 1) * (3 * rank) + rank + channel, mask=inside, other=0.0).to(tl.float32)
    pull += of_next / last_count
    lost += tl.sum(of_next * last_mean, 0) / last_count
    for step in range(tiles):
        start = first + (tiles - 1 - step) * rows
        stop, token = start + rows, start + place
        valid = token < time
        length = so_far(last, token, plan_step, valid)
        known = tl.load(complete + token * plan_step, mask=valid, other=0) >= 1
        # How far the segment that stands behind the tile reaches back.
        reach = so_far(last, stop, plan_step, stop < time) - 1
        own, closed, opened = _slopes(features, slope, token, valid, channel, inside, rank)
        closed = tl.where(known[:, None], closed, 0.0)
        count = tl.load(counts + token, mask=valid, other=1.0)
        # Gradients of a complete mean reach the last token of its segment, where it stands.
        ahead = place[None, :] - place[:, None]
        where = (ahead == length[None, :]).to(tl.float32)
        brought = tl.dot(where, closed, input_precision="ieee")
        brought += tl.where((rows - place == reach + 1)[:, None], of_closed[None, :], 0.0)
        own = (own + brought) / count[:, None]
        own_lost = tl.sum(own * opened, 1)
        # Those of an open mean reach all tokens of its segment up to its own.
        holds = ((ahead >= 0) & (ahead < length[None, :])).to(tl.float32)
        goes_on = rows - place <= reach
        pulled = tl.dot(holds, own, input_precision="ieee") + tl.where(goes_on[:, None], pull[None, :], 0.0)
        lost_since = tl.sum(holds * own_lost[None, :], 1) + tl.where(goes_on, lost, 0.0)
        stored = valid[:, None] & inside[None, :]
        part = tl.load(x + token[:, None] * x_step + channel[None, :], mask=stored, other=0.0).to(tl.float32)
        s = tl.load(weight + token * weight_step, mask=valid, other=0.0).to(tl.float32)
        target = x_slope + (row * time + token)[:, None] * rank + channel[None, :]
        tl.store(target, s[:, None] * pulled, mask=stored)
        summed = tl.sum(part * pulled, 1) - lost_since
        tl.store(weight_slope + row * time + token, summed, mask=valid)
        # The first segment of the tile, from its first token there on.
        same = valid & (place < length)
        rest = tl.where(rows <= reach, of_closed, tl.zeros((padded,), tl.float32))
        of_closed = tl.sum(tl.where(same[:, None], closed, 0.0), 0) + rest
        pull = row_of(pulled, head)
        lost = tl.sum(tl.where(head, lost_since, 0.0), 0) + tl.zeros((1,), tl.float32)


@torch.library.custom_op("dyadlm::segment_gradients", mutates_args=())
def segment_gradients(
    x: Tensor,
    weight: Tensor,
    last: Tensor,
    complete: Tensor,
    ends: Tensor,
    features: Tensor,
    slope: Tensor,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of `x` and `weight`, from that of the features, `slope` (B, T, 3 R).

    Means are read from the features: where these are bfloat16, the factors of the product are, too.
    """
    batch, time, rank = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    features, slope, counts = features.contiguous(), slope.contiguous(), counts.contiguous()
    x_slope, weight_slope = x.new_empty(batch, time, rank), x.new_empty(batch, time, dtype=torch.float32)
    tile = tile_of(rank)
    stretches = triton.cdiv(time, tile["rows"] * tile["tiles"])
    sums = x.new_empty(batch, stretches, 2 * rank + 1, dtype=torch.float32)
    plan, steps = lying_alike(last, complete, ends)
    lie = (*steps, time, stretches)
    with torch.cuda.device_of(x):
        _stretches_kernel[(batch * stretches,)](features, slope, counts, *plan[:2], sums, *lie, rank, **tile)
        _gradients_kernel[(batch * stretches,)](
            x, weight, sums, *plan, features, slope, counts, x_slope, weight_slope,
            *x.stride()[:2], *weight.stride(), *lie, rank, **tile,
        )  # fmt: skip
    return x_slope, weight_slope


@segment_gradients.register_fake
def _shapes(x, weight, last, complete, ends, features, slope, counts):
    return x.new_empty(x.shape), x.new_empty(weight.shape, dtype=torch.float32)
