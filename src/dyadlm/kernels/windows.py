"""The features of a sliding level in one kernel: weights, both windows, centroids, product and pair.

The windows of 2^k tokens are summed directly, in float32, from rows that lie in the caches of the device; no sum is
written to memory. The form in torch is `dyadlm.ops.sliding` with `Tower.compare`.

With s the weight of a token and f the share of a window over its width:

    S = sum of s x,  E = sum of (s - 1),  centroid = f S / (1 + f E),  feature = [product, current, previous]

Dimension letters: B batch, T time, R rank, W = 2^k width of a window.
"""

import logging

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # of a tile: rows times rank
OF_A_WARP = 256

log = logging.getLogger("dyadlm.kernels")
log.info("Sliding levels are computed by Triton kernels.")  # once: when the first of them is about to be


@triton.jit
def _rows_of_text(tile, time, tiles, rows: tl.constexpr):
    """The row of the batch, and the tokens (rows) that a tile has."""
    return (tile // tiles).to(tl.int64), (tile % tiles) * rows + tl.arange(0, rows)


@triton.jit
def _window(x, weight, x_step, weight_step, token, channel, inside, reach, first, width, rows: tl.constexpr,
            padded: tl.constexpr):  # fmt: skip
    """Sums of s x (rows, padded) and of s - 1 (rows) over the tokens from `first` to first + width - 1 steps back."""
    total = tl.zeros((rows, padded), tl.float32)
    excess = tl.zeros((rows,), tl.float32)
    for back in range(first, first + width):
        there = back <= reach
        s = tl.load(weight + (token - back) * weight_step, mask=there, other=0.0).to(tl.float32)
        place = (token - back)[:, None] * x_step + channel[None, :]
        part = tl.load(x + place, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += s[:, None] * part
        excess += tl.where(there, s - 1.0, 0.0)
    return total, excess


@triton.jit
def _factor(share, share_row, share_step, row, token, valid, width: tl.constexpr):
    """f: the share of each window over its width; a share of None is 1."""
    factor = tl.full(token.shape, 1.0 / width, tl.float32)
    if share is not None:
        factor *= tl.load(share + row * share_row + token * share_step, mask=valid, other=0.0)
    return factor


@triton.jit
def _features_kernel(
    x, weight, index, share, share_before, features, scales,
    x_row, x_step, weight_row, weight_step, share_row, share_step, time, tiles,
    rank: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    row, token = _rows_of_text(tl.program_id(0), time, tiles, rows)
    channel = tl.arange(0, padded)
    inside, valid = channel < rank, token < time
    # How many steps back a token's document, and the chunk, reach.
    reach = tl.minimum(tl.load(index + row * time + token, mask=valid, other=-1), token)
    x += row * x_row
    weight += row * weight_row
    now, excess = _window(x, weight, x_step, weight_step, token, channel, inside, reach, 0, width, rows, padded)
    before, excess_before = _window(
        x, weight, x_step, weight_step, token, channel, inside, reach, width, width, rows, padded
    )
    factor = _factor(share, share_row, share_step, row, token, valid, width)
    factor_before = _factor(share_before, share_row, share_step, row, token, valid, width)
    scale = factor / (1.0 + excess * factor)
    scale_before = factor_before / (1.0 + excess_before * factor_before)
    current, previous = now * scale[:, None], before * scale_before[:, None]
    at = row * time + token
    tl.store(scales + at * 2, scale, mask=valid)
    tl.store(scales + at * 2 + 1, scale_before, mask=valid)
    place = features + at[:, None] * (3 * rank) + channel[None, :]
    stored = valid[:, None] & inside[None, :]
    tl.store(place, current * previous, mask=stored)
    tl.store(place + rank, current, mask=stored)
    tl.store(place + 2 * rank, previous, mask=stored)


@triton.jit
def _pulled(features, slope, scales, index, row, token, channel, inside, time, first, own: tl.constexpr,
            rank: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, padded: tl.constexpr):  # fmt: skip
    """What reaches a token's s x (rows, padded), and its s - 1 before the sum over channels, from the windows that
    hold it: the current ones (own = 0) of the tokens from `first` on, or the previous ones (own = 1).
    """
    pull = tl.zeros((rows, padded), tl.float32)
    lost = tl.zeros((rows, padded), tl.float32)
    for ahead in range(first, first + width):
        later = token + ahead
        there = later < time
        there = there & (ahead <= tl.load(index + row * time + later, mask=there, other=-1))
        at = row * time + later
        scale = tl.load(scales + at * 2 + own, mask=there, other=0.0)
        place = at[:, None] * (3 * rank) + channel[None, :]
        read = there[:, None] & inside[None, :]
        mine = tl.load(features + place + (1 + own) * rank, mask=read, other=0.0).to(tl.float32)
        other = tl.load(features + place + (2 - own) * rank, mask=read, other=0.0).to(tl.float32)
        slope_product = tl.load(slope + place, mask=read, other=0.0).to(tl.float32)
        slope_mine = tl.load(slope + place + (1 + own) * rank, mask=read, other=0.0).to(tl.float32)
        reaching = (slope_product * other + slope_mine) * scale[:, None]
        pull += reaching
        lost += reaching * mine
    return pull, lost


@triton.jit
def _gradients_kernel(
    x, weight, index, features, slope, scales, x_slope, weight_slope,
    x_row, x_step, weight_row, weight_step, time, tiles,
    rank: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    row, token = _rows_of_text(tl.program_id(0), time, tiles, rows)
    channel = tl.arange(0, padded)
    inside, valid = channel < rank, token < time
    pull, lost = _pulled(
        features, slope, scales, index, row, token, channel, inside, time, 0, 0, rank, width, rows, padded
    )
    pull_before, lost_before = _pulled(
        features, slope, scales, index, row, token, channel, inside, time, width, 1, rank, width, rows, padded
    )
    pull += pull_before
    stored = valid[:, None] & inside[None, :]
    part = tl.load(x + row * x_row + token[:, None] * x_step + channel[None, :], mask=stored, other=0.0)
    s = tl.load(weight + row * weight_row + token * weight_step, mask=valid, other=0.0).to(tl.float32)
    at = row * time + token
    tl.store(x_slope + at[:, None] * rank + channel[None, :], s[:, None] * pull, mask=stored)
    summed = part.to(tl.float32) * pull - lost - lost_before
    tl.store(weight_slope + at, tl.sum(summed, 1), mask=valid)


def _tile(rank: int) -> dict[str, int]:
    """How many tokens a tile has, its channels, and the warps that share it: powers of two."""
    padded = max(16, triton.next_power_of_2(rank))
    rows = min(64, max(1, ELEMENTS // padded))
    return {"rows": rows, "padded": padded, "num_warps": max(4, rows * padded // OF_A_WARP)}


@torch.library.custom_op("dyadlm::window_features", mutates_args=())
def window_features(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    share: Tensor | None,
    share_before: Tensor | None,
    level: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The features of a sliding level, over chunks that begin a text; differentiable in `x` and `weight`.

    Args:
        x: (B, T, R) float32, bfloat16 or float16: the tokens through the bottleneck of the level.
        weight: (B, T) float32, how much each token counts.
        index: (B, T) int64, of `Clock`.
        share, share_before: (B or 1, T, 1) float32, of `Shares`; None for 1.
        level: k, at most `dyadlm.kernels.WIDEST_LEVEL`.
        dtype: of the features.

    Returns:
        (B, T, 3 R), and f / (1 + f E) of both windows (B, T, 2) float32, which the gradient needs.
    """
    batch, time, rank = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    features = x.new_empty(batch, time, 3 * rank, dtype=dtype)
    scales = x.new_empty(batch, time, 2, dtype=torch.float32)
    tile = _tile(rank)
    tiles = triton.cdiv(time, tile["rows"])
    shares = [part if part is None else part.expand(batch, -1, -1) for part in (share, share_before)]
    steps = (0, 0) if shares[1] is None else shares[1].stride()[:2]
    assert shares[0] is None or shares[0].stride()[:2] == steps, "shares of one level lie alike"
    with torch.cuda.device_of(x):
        _features_kernel[(batch * tiles,)](
            x, weight, index.contiguous(), *shares, features, scales, *x.stride()[:2], *weight.stride(), *steps,
            time, tiles, rank, 2**level, **tile,
        )  # fmt: skip
    return features, scales


@window_features.register_fake
def _shapes(x, weight, index, share, share_before, level, dtype):
    batch, time, rank = x.shape
    return x.new_empty(batch, time, 3 * rank, dtype=dtype), x.new_empty(batch, time, 2, dtype=torch.float32)


@torch.library.custom_op("dyadlm::window_gradients", mutates_args=())
def window_gradients(
    x: Tensor, weight: Tensor, index: Tensor, features: Tensor, slope: Tensor, scales: Tensor, level: int
) -> tuple[Tensor, Tensor]:
    """The gradients of `x` and `weight`, from that of the features, `slope` (B, T, 3 R).

    Centroids are read from the features: where these are bfloat16, the factors of the product are, too.
    """
    batch, time, rank = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    features, slope, scales = features.contiguous(), slope.contiguous(), scales.contiguous()
    x_slope, weight_slope = x.new_empty(batch, time, rank), x.new_empty(batch, time, dtype=torch.float32)
    tile = _tile(rank)
    tiles = triton.cdiv(time, tile["rows"])
    with torch.cuda.device_of(x):
        _gradients_kernel[(batch * tiles,)](
            x, weight, index.contiguous(), features, slope, scales, x_slope, weight_slope,
            *x.stride()[:2], *weight.stride(), time, tiles, rank, 2**level, **tile,
        )  # fmt: skip
    return x_slope, weight_slope


@window_gradients.register_fake
def _gradient_shapes(x, weight, index, features, slope, scales, level):
    return x.new_empty(x.shape), x.new_empty(weight.shape, dtype=torch.float32)


def _keep(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, weight, index, _, _, ctx.level, _ = inputs
    ctx.save_for_backward(x, weight, index, *output)


def _backward(ctx, slope, _):
    x, weight, index, features, scales = ctx.saved_tensors
    if slope is None:
        return None, None, None, None, None, None, None
    x_slope, weight_slope = window_gradients(x, weight, index, features, slope, scales, ctx.level)
    return x_slope, weight_slope, None, None, None, None, None


window_features.register_autograd(_backward, setup_context=_keep)
