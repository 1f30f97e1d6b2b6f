"""Where each column of a chunk stands in its document, and small helpers that every operator uses.

Dimension letters: B batch, T time (columns of the chunk), N rows of a sequence, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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
    begins: bool = True  # some row may stand at the start of a document; False only where that is known


def make_clock(
    batch: int,
    time: int,
    *,
    position: Tensor | None = None,
    length: Tensor | None = None,
    starts: Tensor | None = None,
    device: torch.device | None = None,
    begins: bool = True,
) -> Clock:
    """The clock of a chunk of `time` columns.

    Args:
        position: (B,) int64 tokens already seen of each row's document; None for a fresh start.
        length: (B,) int64 real tokens per row; None if all are.
        starts: (B, T) bool, True where a new document begins; None if none does.
        begins: False if every row is known to continue a document.
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
    return Clock(index, length, position, padded, restarts, fresh, begins or restarts)


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
