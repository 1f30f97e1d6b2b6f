"""The features of a semantic level: sums over segments, means, product and pair.

A program reads a stretch of a text tile by tile; `stretches` says how it comes to what stands open before its first
token. Sums are float32 and start at each segment: what stood before leaves no trace in the rounding. The gradient is in
`segment_gradients`, the form in torch in `dyadlm.ops.segments`.

With s the weight of a token, over the tokens of a segment so far:

    mean = sum of s x / sum of s,  feature = [open * complete, open, complete], the means of the open segment and of the
    last complete one

Dimension letters: B batch, T time, N stretches, R rank.
"""

import logging

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyadlm.kernels.segment_gradients import segment_gradients
from dyadlm.kernels.stretches import covered, lying_alike, row_of, so_far, tile_of, whole

LEAST = 1e-6  # a sum of weights, as of `segment_means`

log = logging.getLogger("dyadlm.kernels")
log.info("Semantic levels are computed by Triton kernels.")  # once: when the first of them is about to be


@triton.jit
def _weighed(x, weight, x_step, weight_step, token, there, channel, inside):
    """s x (rows, padded) and s (rows) of tokens, 0 where they are not there."""
    s = tl.load(weight + token * weight_step, mask=there, other=0.0).to(tl.float32)
    place = x + token[:, None] * x_step + channel[None, :]
    part = tl.load(place, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return s[:, None] * part, s


@triton.jit
def _add_tokens(total, count, x, weight, x_step, weight_step, first, end, channel, inside, rows: tl.constexpr):
    """Add s x (padded) and s of the tokens from `first` to before `end`."""
    for start in range(first, end, rows):
        token = start + tl.arange(0, rows)
        part, s = _weighed(x, weight, x_step, weight_step, token, token < end, channel, inside)
        total += tl.sum(part, 0)
        count += tl.sum(s, 0)
    return total, count


@triton.jit
def _add_stretches(total, count, sums, first, end, channel, inside, rank: tl.constexpr, rows: tl.constexpr):
    """Add what the stretches from the `first`-th to before the `end`-th sum to."""
    for start in range(first, end, rows):
        stretch = start + tl.arange(0, rows)
        there, place = stretch < end, sums + stretch * (rank + 1)
        part = tl.load(place[:, None] + channel[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        total += tl.sum(part, 0)
        count += tl.sum(tl.load(place + rank, mask=there, other=0.0), 0)
    return total, count


@triton.jit
def _summed(x, weight, sums, x_step, weight_step, first, end, channel, inside, rank: tl.constexpr, rows: tl.constexpr,
            tiles: tl.constexpr, padded: tl.constexpr):  # fmt: skip
    """Sums of s x (padded) and of s over the tokens from `first` to before `end`, all of one segment."""
    total = tl.zeros((padded,), tl.float32)
    count = tl.zeros((1,), tl.float32)
    begin, rest = whole(first, end, rows * tiles)
    for edge in range(2):
        start, stop = tl.where(edge == 0, first, rest), tl.where(edge == 0, begin, end)
        total, count = _add_tokens(total, count, x, weight, x_step, weight_step, start, stop, channel, inside, rows)
    return _add_stretches(
        total, count, sums, begin // (rows * tiles), rest // (rows * tiles), channel, inside, rank, rows
    )


@triton.jit
def _stretches_kernel(
    x, weight, last, sums,
    x_row, x_step, weight_row, weight_step, plan_row, plan_step, time, stretches,
    rank: tl.constexpr, rows: tl.constexpr, tiles: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Sums of s x and of s, of stretches that one segment covers; nothing else is read later."""
    row = (tl.program_id(0) // stretches).to(tl.int64)
    first = (tl.program_id(0) % stretches) * (rows * tiles)
    if covered(last + row * plan_row, first, plan_step, time, rows * tiles):
        x += row * x_row
        weight += row * weight_row
        channel = tl.arange(0, padded)
        inside = channel < rank
        total, count = tl.zeros((padded,), tl.float32), tl.zeros((1,), tl.float32)
        total, count = _add_tokens(
            total, count, x, weight, x_step, weight_step, first, first + rows * tiles, channel, inside, rows
        )
        place = sums + tl.program_id(0).to(tl.int64) * (rank + 1)
        tl.store(place + channel, total, mask=inside)
        tl.store(place + rank + tl.arange(0, 1), count)


@triton.jit
def _features_kernel(
    x, weight, sums, last, complete, features, counts,
    x_row, x_step, weight_row, weight_step, plan_row, plan_step, time, stretches,
    least: tl.constexpr, rank: tl.constexpr, rows: tl.constexpr, tiles: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // stretches).to(tl.int64)
    first = (tl.program_id(0) % stretches) * (rows * tiles)
    x += row * x_row
    weight += row * weight_row
    sums += row * stretches * (rank + 1)
    last += row * plan_row
    complete += row * plan_row
    channel, place = tl.arange(0, padded), tl.arange(0, rows)
    inside, final = channel < rank, place == rows - 1
    # What is open before the stretch, from `begun` on, and the last complete segment there, from `previous` on.
    some = first > 0
    begun = tl.where(some, tl.maximum(first - so_far(last, first - 1, plan_step, some), 0), first)
    had = some & (tl.load(complete + (first - 1) * plan_step, mask=some, other=0) >= 1)
    previous = tl.where(had, begun - so_far(last, begun - 1, plan_step, had), begun)
    total, count = _summed(
        x, weight, sums, x_step, weight_step, begun, first, channel, inside, rank, rows, tiles, padded
    )
    held, held_count = _summed(
        x, weight, sums, x_step, weight_step, previous, begun, channel, inside, rank, rows, tiles, padded
    )
    held = held / tl.maximum(held_count, least)
    for tile in range(tiles):
        start = first + tile * rows
        token = start + place
        valid = token < time
        length = so_far(last, token, plan_step, valid)
        known = tl.load(complete + token * plan_step, mask=valid, other=0) >= 1
        part, s = _weighed(x, weight, x_step, weight_step, token, valid, channel, inside)
        back = place[:, None] - place[None, :]
        own = ((back >= 0) & (back < length[:, None])).to(tl.float32)  # the tokens of the tile that a token sums
        older = length > place + 1  # its segment began before the tile
        summed = tl.dot(own, part, input_precision="ieee") + tl.where(older[:, None], total[None, :], 0.0)
        counted = tl.sum(own * s[None, :], 1) + tl.where(older, count, 0.0)
        opened = summed / tl.maximum(counted, least)[:, None]
        # The mean of the last complete segment stands at its last token: in the tile, just before it, or further back.
        where = (known[:, None] & (back == length[:, None])).to(tl.float32)
        closed = tl.dot(where, opened, input_precision="ieee")
        just = known & (length == place + 1)
        closed += tl.where(just[:, None], (total / tl.maximum(count, least))[None, :], 0.0)
        closed += tl.where((known & older)[:, None], held[None, :], 0.0)
        tl.store(counts + row * time + token, counted, mask=valid)
        target = features + (row * time + token)[:, None] * (3 * rank) + channel[None, :]
        stored = valid[:, None] & inside[None, :]
        tl.store(target, opened * closed, mask=stored)
        tl.store(target + rank, opened, mask=stored)
        tl.store(target + 2 * rank, closed, mask=stored)
        total, held = row_of(summed, final), row_of(closed, final)
        count = tl.sum(tl.where(final, counted, 0.0), 0) + tl.zeros((1,), tl.float32)


@torch.library.custom_op("dyadlm::segment_features", mutates_args=())
def segment_features(
    x: Tensor,
    weight: Tensor,
    last: Tensor,
    complete: Tensor,
    ends: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The features of a semantic level, over chunks that begin a text; differentiable in `x` and `weight`.

    Args:
        x: (B, T, R) float32, bfloat16 or float16: the tokens through the bottleneck of the level.
        weight: (B, T) float32, how much each token counts.
        last, complete: (B, T) int64, of `SegmentPlan`, for one segmentation.
        ends: (B, T) int64, the last token of each token's segment, of `segment_ends`.
        dtype: of the features.

    Returns:
        (B, T, 3 R), and the sums of weights (B, T) float32, which the gradient needs.
    """
    batch, time, rank = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    features = x.new_empty(batch, time, 3 * rank, dtype=dtype)
    counts = x.new_empty(batch, time, dtype=torch.float32)
    tile = tile_of(rank)
    stretches = triton.cdiv(time, tile["rows"] * tile["tiles"])
    sums = x.new_empty(batch, stretches, rank + 1, dtype=torch.float32)
    plan, steps = lying_alike(last, complete)
    lie = (*x.stride()[:2], *weight.stride(), *steps, time, stretches)
    with torch.cuda.device_of(x):
        _stretches_kernel[(batch * stretches,)](x, weight, plan[0], sums, *lie, rank, **tile)
        _features_kernel[(batch * stretches,)](x, weight, sums, *plan, features, counts, *lie, LEAST, rank, **tile)
    return features, counts


@segment_features.register_fake
def _shapes(x, weight, last, complete, ends, dtype):
    batch, time, rank = x.shape
    return x.new_empty(batch, time, 3 * rank, dtype=dtype), x.new_empty(batch, time, dtype=torch.float32)


def _keep(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, weight, last, complete, ends, _ = inputs
    ctx.save_for_backward(x, weight, last, complete, ends, *output)


def _backward(ctx, slope, _):
    x, weight, last, complete, ends, features, counts = ctx.saved_tensors
    if slope is None:
        return None, None, None, None, None, None
    x_slope, weight_slope = segment_gradients(x, weight, last, complete, ends, features, slope, counts)
    return x_slope, weight_slope, None, None, None, None


segment_features.register_autograd(_backward, setup_context=_keep)
