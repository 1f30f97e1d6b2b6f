"""Windows that end at every token, by doubling.

S_{j+1}(t) = S_j(t) + S_j(t - 2^j), in float32 (a running sum drifts; sums of pairs do not). The state is a ring of the
last 2^j sums of each level.

Dimension letters: B batch, T time (columns of the chunk), C channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dyadlm.ops.clock import Clock, accumulator, next_position, take


class Windows(NamedTuple):
    """Two adjacent windows of one level, as sums."""

    current: Tensor  # (B, T or nodes, D)
    previous: Tensor  # (B, T or nodes, D)


def latest(history: Tensor, count: int, clock: Clock) -> Tensor:
    """The last `count` of a (B, count + T, D) history of all tokens, as of each row's last real token.

    What belongs to an earlier document is dropped: the state after a document is that of the document alone.
    """
    if not clock.padded and not clock.restarts:
        return history[:, -count:]
    slots = torch.arange(count, device=history.device)
    own = next_position(clock)[:, None] >= count - slots
    return take(history, clock.length[:, None] + slots) * own[..., None]


def sliding_windows(
    x: Tensor, levels: Sequence[int], channels: Sequence[int] | None, clock: Clock, rings: tuple[Tensor, ...] = ()
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
        if clock.restarts:
            shifted = shifted * (clock.index >= width)[..., None]
        if j in levels:
            own = total.shape[-1] if channels is None else channels[len(windows)]
            windows.append(Windows(total[..., :own], shifted[..., :own]))
            if channels is not None:
                total, shifted = total[..., own:], shifted[..., own:]
        if j < levels[-1]:
            total = total + shifted
    return windows, tuple(carried)
