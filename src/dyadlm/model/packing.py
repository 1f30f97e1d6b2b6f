"""Padding anywhere in a row and several documents in one: the order in which a chunk is read, and its clock.

Dimension letters: B batch, T time.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyadlm.errors import UserError
from dyadlm.model.cache import DyadCache
from dyadlm.ops.pyramid import Clock, make_clock


class Arrangement(NamedTuple):
    """The order in which a chunk is read: real tokens first in each row; and its clock."""

    order: Tensor | None  # (B, T) int64; None where the real tokens fill the chunk
    clock: Clock

    def pack(self, x: Tensor) -> Tensor:
        """The columns of x (B, T, ...) in the order in which they are read."""
        return x if self.order is None else reorder(x, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """The columns of x (B, T, ...) back in the order in which they came."""
        return x if self.order is None else reorder(x, self.order.argsort(1))


def arrange(
    embedded: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: DyadCache | None,
    others: dict[str, Any],
) -> Arrangement:
    """How a chunk (B, T, D) is read after a cache. others: arguments that tell of packing in another way.

    Raises:
        UserError: an empty chunk, masks or positions of another shape, a state of other rows, unknown packing.
    """
    batch, time = embedded.shape[:2]
    require_fitting(batch, time, attention_mask, position_ids, others)
    if cache is not None and cache.batch_size not in (0, batch):
        raise UserError(f"The state has {cache.batch_size} rows but the input {batch}; use a state of as many rows.")
    order = left_packing(attention_mask, batch, time)
    return Arrangement(order, chunk_clock(batch, time, attention_mask, position_ids, order, cache, embedded.device))


def require_fitting(
    batch: int, time: int, attention_mask: Tensor | None, position_ids: Tensor | None, others: dict[str, Any]
) -> None:
    """Raise `UserError` for an empty chunk, masks or positions of another shape, and other ways of packing."""
    if time == 0:
        raise UserError("The input is empty; give at least one token.")
    for name, given in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if given is not None and (given.dim() != 2 or given.shape[0] not in (1, batch) or given.shape[1] < time):
            raise UserError(
                f"{name} has the shape {tuple(given.shape)}; it must be ({batch}, {time}) or longer in time."
            )
    if position_ids is None and any(others.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx")):
        raise UserError("Packed documents need position_ids that restart at 0; let the collator return them.")


def left_packing(attention_mask: Tensor | None, batch: int, time: int) -> Tensor | None:
    """(B, T) int64: the order that brings each row's real tokens to the front; None if they fill the chunk.

    Pads then neither count nor write, wherever they stood.
    """
    if attention_mask is None:
        return None
    pad = attention_mask[:, -time:] == 0
    if pad.shape[0] == 1:
        pad = pad.expand(batch, -1)
    return pad.long().argsort(dim=1, stable=True) if bool(pad.any()) else None


def reorder(output: Tensor, order: Tensor) -> Tensor:
    """The columns of (B, T, ...) in the order (B, T) int64."""
    return output.gather(1, order.view(*order.shape, *[1] * (output.dim() - 2)).expand_as(output))


def chunk_clock(
    batch: int,
    time: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    order: Tensor | None,
    cache: DyadCache | None,
    device: torch.device,
) -> Clock:
    """The clock of a chunk, in the order of `left_packing`: documents start where position_ids are 0."""
    length = starts = None
    if order is not None and attention_mask is not None:
        length = (attention_mask[:, -time:] != 0).sum(1).expand(batch)
    if position_ids is not None:
        starts = (position_ids[..., -time:] == 0).expand(batch, -1)
        if order is not None:
            starts = starts.gather(1, order)
        inside = starts if cache is not None and not cache.is_empty else starts[:, 1:]
        if length is not None:  # what stands in the padding is no document
            inside = inside & (torch.arange(time, device=device)[-inside.shape[1] :] < length[:, None])
        if not bool(inside.any()):
            starts = None
    position = cache.position if cache is not None else None
    begins = cache is None or cache.may_begin
    return make_clock(batch, time, position=position, length=length, starts=starts, device=device, begins=begins)
