"""A linear recurrence whose factors are known beforehand, over a whole chunk at once.

    h_t = keep_t * h_{t-1} + value_t

It is associative, so tiles run side by side, token by token inside, and the same recurrence runs over the tiles' ends.
(Parallel scans of such recurrences: minGRU, arXiv 2410.01201.) The work is linear in time; nothing is divided by and no
logarithm is taken, so that a factor may be zero: what came before is then forgotten exactly.

Dimension letters: B batch, T time, C channels, N tiles, L tokens of a tile.
"""

import torch
from torch import Tensor

TILE = 16


def linear_scan(keep: Tensor, value: Tensor, state: Tensor) -> Tensor:
    """The recurrence at every token.

    Args:
        keep: (B, T, C), T >= 1.
        value: (B, T, C), of the same dtype.
        state: (B, C), h before the first token.

    Returns:
        (B, T, C); the last row is the state after the chunk.
    """
    batch, time, channels = value.shape
    if time == 1:
        return keep * state[:, None] + value
    size = min(TILE, time)
    count = -(-time // size)
    short = (0, 0, 0, count * size - time)
    keeps = torch.nn.functional.pad(keep, short).view(batch, count, size, channels).unbind(2)
    values = torch.nn.functional.pad(value, short).view(batch, count, size, channels).unbind(2)
    kept, local = [keeps[0]], [values[0]]  # since the tile began: (B, N, C) each
    for keep_here, value_here in zip(keeps[1:], values[1:], strict=True):
        kept.append(keep_here * kept[-1])
        local.append(torch.addcmul(value_here, keep_here, local[-1]))
    before = state[:, None]
    if count > 1:
        before = torch.cat([before, linear_scan(kept[-1][:, :-1], local[-1][:, :-1], state)], 1)
    scanned = torch.addcmul(torch.stack(local, 2), torch.stack(kept, 2), before[:, :, None])
    return scanned.flatten(1, 2)[:, :time]
