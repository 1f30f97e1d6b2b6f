"""The features of a semantic level in one kernel: sums over segments, means, product and pair.

A program reads a stretch of a text tile by tile. What stands open before its first token it sums anew, so that no
program waits for another; gradients come the same way from behind. Sums are float32 and start at each segment: what
stood before leaves no trace in the rounding. The form in torch is `dyadlm.ops.segments`.

With s the weight of a token, over the tokens of a segment so far:

    mean = sum of s x / sum of s,  feature = [open * complete, open, complete], the means of the open segment and of the
    last complete one

Dimension letters: B batch, T time, R rank.
"""

import logging

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024  # of a tile: rows times rank
OF_A_WARP = 256
STRETCH = 128  # tokens of a program
LEAST = 1e-6  # a sum of weights, as of `segment_means`

log = logging.getLogger("dyadlm.kernels")
log.info("Semantic levels are computed by Triton kernels.")  # once: when the first of them is about to be


@triton.jit
def _row(values, chosen):
    """The one chosen row of (rows, padded)."""
    return tl.sum(tl.where(chosen[:, None], values, 0.0), 0)


@triton.jit
def _so_far(last, token, step, there):
    """How many tokens of its segment there are up to a token, 1 where it is not there; from `SegmentPlan.last`."""
    return tl.where(there, token + 3 - tl.load(last + token * step, mask=there, other=0).to(tl.int32), 1)


@triton.jit
def _weighed(x, weight, x_step, weight_step, token, there, channel, inside):
    """s x (rows, padded) and s (rows) of tokens, 0 where they are not there."""
    s = tl.load(weight + token * weight_step, mask=there, other=0.0).to(tl.float32)
    place = x + token[:, None] * x_step + channel[None, :]
    part = tl.load(place, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return s[:, None] * part, s


@triton.jit
def _summed(x, weight, x_step, weight_step, first, end, channel, inside, rows: tl.constexpr, padded: tl.constexpr):
    """Sums of s x (padded) and of s over the tokens from `first` to before `end`."""
    total = tl.zeros((padded,), tl.float32)
    count = tl.zeros((1,), tl.float32)
    for start in range(first, end, rows):
        token = start + tl.arange(0, rows)
        part, s = _weighed(x, weight, x_step, weight_step, token, token < end, channel, inside)
        total += tl.sum(part, 0)
        count += tl.sum(s, 0)
    return total, count


@triton.jit
def _features_kernel(
    x, weight, last, complete, features, counts,
    x_row, x_step, weight_row, weight_step, plan_row, plan_step, time, stretches,
    least: tl.constexpr, rank: tl.constexpr, rows: tl.constexpr, tiles: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // stretches).to(tl.int64)
    first = (tl.program_id(0) % stretches) * (rows * tiles)
    x += row * x_row
    weight += row * weight_row
    last += row * plan_row
    complete += row * plan_row
    channel, place = tl.arange(0, padded), tl.arange(0, rows)
    inside, final = channel < rank, place == rows - 1
    # What is open before the stretch, from `begun` on, and the last complete segment there, from `previous` on.
    some = first > 0
    begun = tl.where(some, tl.maximum(first - _so_far(last, first - 1, plan_step, some), 0), first)
    had = some & (tl.load(complete + (first - 1) * plan_step, mask=some, other=0) >= 1)
    previous = tl.where(had, begun - _so_far(last, begun - 1, plan_step, had), begun)
    total, count = _summed(x, weight, x_step, weight_step, begun, first, channel, inside, rows, padded)
    held, held_count = _summed(x, weight, x_step, weight_step, previous, begun, channel, inside, rows, padded)
    held = held / tl.maximum(held_count, least)
    for tile in range(tiles):
        start = first + tile * rows
        token = start + place
        valid = token < time
        so_far = _so_far(last, token, plan_step, valid)
        known = tl.load(complete + token * plan_step, mask=valid, other=0) >= 1
        part, s = _weighed(x, weight, x_step, weight_step, token, valid, channel, inside)
        back = place[:, None] - place[None, :]
        own = ((back >= 0) & (back < so_far[:, None])).to(tl.float32)  # the tokens of the tile that a token sums
        older = so_far > place + 1  # its segment began before the tile
        sums = tl.dot(own, part, input_precision="ieee") + tl.where(older[:, None], total[None, :], 0.0)
        counted = tl.sum(own * s[None, :], 1) + tl.where(older, count, 0.0)
        opened = sums / tl.maximum(counted, least)[:, None]
        # The mean of the last complete segment stands at its last token: in the tile, just before it, or further back.
        where = (known[:, None] & (back == so_far[:, None])).to(tl.float32)
        closed = tl.dot(where, opened, input_precision="ieee")
        just = known & (so_far == place + 1)
        closed += tl.where(just[:, None], (total / tl.maximum(count, least))[None, :], 0.0)
        closed += tl.where((known & older)[:, None], held[None, :], 0.0)
        tl.store(counts + row * time + token, counted, mask=valid)
        target = features + (row * time + token)[:, None] * (3 * rank) + channel[None, :]
        stored = valid[:, None] & inside[None, :]
        tl.store(target, opened * closed, mask=stored)
        tl.store(target + rank, opened, mask=stored)
        tl.store(target + 2 * rank, closed, mask=stored)
        total, held = _row(sums, final), _row(closed, final)
        count = tl.sum(tl.where(final, counted, 0.0), 0) + tl.zeros((1,), tl.float32)


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
def _behind(features, slope, counts, complete, plan_step, first, end, channel, inside, rank: tl.constexpr,
            rows: tl.constexpr, padded: tl.constexpr):  # fmt: skip
    """Over the tokens from `first` to before `end`: the sum of the gradients of the complete mean (padded), of those of
    the open mean over its sum of weights (padded), and of these times the mean.
    """
    of_closed = tl.zeros((padded,), tl.float32)
    pull = tl.zeros((padded,), tl.float32)
    lost = tl.zeros((1,), tl.float32)
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
def _gradients_kernel(
    x, weight, last, complete, ends, features, slope, counts, x_slope, weight_slope,
    x_row, x_step, weight_row, weight_step, plan_row, plan_step, time, stretches,
    rank: tl.constexpr, rows: tl.constexpr, tiles: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // stretches).to(tl.int64)
    first = (tl.program_id(0) % stretches) * (rows * tiles)
    x += row * x_row
    weight += row * weight_row
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
        features, slope, counts, complete, plan_step, after, end, channel, inside, rank, rows, padded
    )
    of_next, _, _ = _behind(
        features, slope, counts, complete, plan_step, end, beyond, channel, inside, rank, rows, padded
    )
    last_count = tl.load(counts + end - 1)
    last_mean = tl.load(features + (end - 1) * (3 * rank) + rank + channel, mask=inside, other=0.0).to(tl.float32)
    pull += of_next / last_count
    lost += tl.sum(of_next * last_mean, 0) / last_count
    for step in range(tiles):
        start = first + (tiles - 1 - step) * rows
        stop, token = start + rows, start + place
        valid = token < time
        so_far = _so_far(last, token, plan_step, valid)
        known = tl.load(complete + token * plan_step, mask=valid, other=0) >= 1
        # How far the segment that stands behind the tile reaches back.
        reach = _so_far(last, stop, plan_step, stop < time) - 1
        own, closed, opened = _slopes(features, slope, token, valid, channel, inside, rank)
        closed = tl.where(known[:, None], closed, 0.0)
        count = tl.load(counts + token, mask=valid, other=1.0)
        # Gradients of a complete mean reach the last token of its segment, where it stands.
        ahead = place[None, :] - place[:, None]
        where = (ahead == so_far[None, :]).to(tl.float32)
        brought = tl.dot(where, closed, input_precision="ieee")
        brought += tl.where((rows - place == reach + 1)[:, None], of_closed[None, :], 0.0)
        own = (own + brought) / count[:, None]
        own_lost = tl.sum(own * opened, 1)
        # Those of an open mean reach all tokens of its segment up to its own.
        holds = ((ahead >= 0) & (ahead < so_far[None, :])).to(tl.float32)
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
        same = valid & (place < so_far)
        rest = tl.where(rows <= reach, of_closed, tl.zeros((padded,), tl.float32))
        of_closed = tl.sum(tl.where(same[:, None], closed, 0.0), 0) + rest
        pull = _row(pulled, head)
        lost = tl.sum(tl.where(head, lost_since, 0.0), 0) + tl.zeros((1,), tl.float32)


def _tile(rank: int) -> dict[str, int]:
    """How many tokens a tile has, its channels, the tiles of a stretch, and the warps that share a tile."""
    padded = max(16, triton.next_power_of_2(rank))
    rows = min(64, max(16, ELEMENTS // padded))
    warps = max(4, rows * padded // OF_A_WARP)
    # Two stages of loads: three take more shared memory than small cards have.
    return {"rows": rows, "tiles": STRETCH // rows, "padded": padded, "num_warps": warps, "num_stages": 2}


def _lying_alike(*plan: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
    """(B, T) tensors with their common strides: copies, where a compiler has laid them out in different ways."""
    parts = list(plan) if len({part.stride() for part in plan}) == 1 else [part.contiguous() for part in plan]
    return parts, parts[0].stride()


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
    tile = _tile(rank)
    stretches = triton.cdiv(time, tile["rows"] * tile["tiles"])
    plan, steps = _lying_alike(last, complete)
    with torch.cuda.device_of(x):
        _features_kernel[(batch * stretches,)](
            x, weight, *plan, features, counts,
            *x.stride()[:2], *weight.stride(), *steps, time, stretches, LEAST, rank, **tile,
        )  # fmt: skip
    return features, counts


@segment_features.register_fake
def _shapes(x, weight, last, complete, ends, dtype):
    batch, time, rank = x.shape
    return x.new_empty(batch, time, 3 * rank, dtype=dtype), x.new_empty(batch, time, dtype=torch.float32)


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
    x, slope = x if x.stride(2) == 1 else x.contiguous(), slope.contiguous()
    x_slope, weight_slope = x.new_empty(batch, time, rank), x.new_empty(batch, time, dtype=torch.float32)
    tile = _tile(rank)
    stretches = triton.cdiv(time, tile["rows"] * tile["tiles"])
    plan, steps = _lying_alike(last, complete, ends)
    with torch.cuda.device_of(x):
        _gradients_kernel[(batch * stretches,)](
            x, weight, *plan, features, slope, counts, x_slope, weight_slope,
            *x.stride()[:2], *weight.stride(), *steps, time, stretches, rank, **tile,
        )  # fmt: skip
    return x_slope, weight_slope


@segment_gradients.register_fake
def _gradient_shapes(x, weight, last, complete, ends, features, slope, counts):
    return x.new_empty(x.shape), x.new_empty(weight.shape, dtype=torch.float32)


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
