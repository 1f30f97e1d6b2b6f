"""What is read from slots, in one kernel: the value that a plan names at each token and table, and a flag for "found".

The gradient follows the plan the other way: each value adds up the gradients of the tokens that read it, by table and
time, in float32. No two programs add to one number. The form in torch is `dyadlm.ops.slots.slot_read`.

Dimension letters: B batch, T time, N tables, A sets, W ways, M width of a value.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # of a tile: rows times width


@triton.jit
def _read_kernel(
    values, found, column, slot, stored, recalled, total, time, tables, cells,
    own: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)  # token and table
    channel = tl.arange(0, padded)
    valid, inside = at < total, channel < width
    row, table = at // (time * tables), at % tables
    hit = tl.load(found + at, mask=valid, other=False)
    source = tl.load(column + at, mask=hit, other=0)
    held = hit & (source < 0)
    source = row * time + source
    if own:
        source = source * tables + table
    value = tl.load(
        values + source[:, None] * width + channel[None, :], mask=(hit & ~held)[:, None] & inside[None, :], other=0.0
    )
    if stored is not None:
        cell = (row * tables + table) * cells + tl.load(slot + at, mask=held, other=0)
        old = tl.load(
            stored + cell[:, None] * width + channel[None, :], mask=held[:, None] & inside[None, :], other=0.0
        )
        value = tl.where(held[:, None], old.to(value.dtype), value)
    target = recalled + at * (width + 1)
    tl.store(target[:, None] + channel[None, :], value, mask=valid[:, None] & inside[None, :])
    # By float32, for Triton's interpreter makes bits, and no 1, of a boolean in bfloat16.
    tl.store(target + width, tl.where(hit, 1.0, 0.0).to(value.dtype), mask=valid)


@triton.jit
def _gradients_kernel(
    slope, found, column, following, value_slope, time, tables, tiles, own: tl.constexpr, width: tl.constexpr,
    rows: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    part = (tl.program_id(0) // tiles).to(tl.int64)  # a row of the batch, or a table of one
    written = (tl.program_id(0) % tiles) * rows + tl.arange(0, rows)  # the column of a value
    channel = tl.arange(0, padded)
    valid, inside = written < time, channel < width
    if own:
        row, first, end = part // tables, part % tables, part % tables + 1
    else:
        row, first, end = part, 0, tables
    total = tl.zeros((rows, padded), tl.float32)
    for table in range(first, end):
        items = following + (row * tables + table) * (time + 1)
        # An item is read at the column before its own. Those that read a value follow each other.
        item = tl.load(items + written, mask=valid, other=-1)
        reading = item > 0
        while tl.max(reading.to(tl.int32), 0) > 0:
            at = (row * time + item - 1) * tables + table
            reading = reading & tl.load(found + at, mask=reading, other=False)
            reading = reading & (tl.load(column + at, mask=reading, other=-1) == written)
            place = slope + (at * (width + 1))[:, None] + channel[None, :]
            total += tl.load(place, mask=reading[:, None] & inside[None, :], other=0.0).to(tl.float32)
            item = tl.load(items + item, mask=reading, other=-1)
            reading = item > 0
    target = row * time + written
    if own:
        target = target * tables + first
    tl.store(value_slope + target[:, None] * width + channel[None, :], total, mask=valid[:, None] & inside[None, :])


def _tile(width: int) -> dict[str, int]:
    """How many values a tile has, and their channels."""
    padded = triton.next_power_of_2(width)
    return {"rows": min(128, max(1, ELEMENTS // padded)), "padded": padded}


@torch.library.custom_op("dyadlm::slot_recall", mutates_args=())
def slot_recall(
    values: Tensor, found: Tensor, column: Tensor, slot: Tensor | None, stored: Tensor | None, following: Tensor | None
) -> Tensor:
    """The value read at every token, and behind it 1 where one is found; differentiable in `values`.

    Args:
        values: (B, T, N, M), or (B, T, 1, M) for a value shared by all tables; float32, bfloat16 or float16.
        found, column, slot: (B, T, N) of `SlotLookup`; slot: None at the start.
        stored: (B, N, A, W, M), the values of `SlotState`; None at the start.
        following: (B, N, T + 1) int32, of `SlotLookup`; None where no gradient is asked for.

    Returns:
        (B, T, N, M + 1) of the dtype of `values`, zero where nothing is found.
    """
    batch, time, own, width = values.shape
    tables = found.shape[2]
    values, found, column = values.contiguous(), found.contiguous(), column.contiguous()
    slot, stored = (part if part is None else part.contiguous() for part in (slot, stored))
    recalled = values.new_empty(batch, time, tables, width + 1)
    cells = 0 if stored is None else stored.shape[2] * stored.shape[3]
    tile = _tile(width)
    with torch.cuda.device_of(values):
        _read_kernel[(triton.cdiv(found.numel(), tile["rows"]),)](
            values, found, column, slot, stored, recalled, found.numel(), time, tables, cells, own > 1, width, **tile
        )
    return recalled


@slot_recall.register_fake
def _shapes(values, found, column, slot, stored, following):
    return values.new_empty(*found.shape, values.shape[3] + 1)


@torch.library.custom_op("dyadlm::slot_recall_gradients", mutates_args=())
def slot_recall_gradients(slope: Tensor, found: Tensor, column: Tensor, following: Tensor, own: int) -> Tensor:
    """The gradient of values (B, T, own, M), from that of what is recalled, `slope` (B, T, N, M + 1)."""
    batch, time, tables, width = *slope.shape[:3], slope.shape[3] - 1
    slope, found, column, following = (part.contiguous() for part in (slope, found, column, following))
    value_slope = slope.new_empty(batch, time, own, width)
    tile = _tile(width)
    tiles = triton.cdiv(time, tile["rows"])
    with torch.cuda.device_of(slope):
        _gradients_kernel[(batch * own * tiles,)](
            slope, found, column, following, value_slope, time, tables, tiles, own > 1, width, **tile
        )
    return value_slope


@slot_recall_gradients.register_fake
def _gradient_shapes(slope, found, column, following, own):
    return slope.new_empty(*slope.shape[:2], own, slope.shape[3] - 1)


def _keep(ctx, inputs, output):
    values, found, column, _, _, following = inputs
    ctx.own = values.shape[2]
    ctx.save_for_backward(found, column, following)


def _backward(ctx, slope):
    found, column, following = ctx.saved_tensors
    return slot_recall_gradients(slope, found, column, following, ctx.own), None, None, None, None, None


slot_recall.register_autograd(_backward, setup_context=_keep)
