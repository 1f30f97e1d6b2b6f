"""A linear recurrence, token by token.

Dimension letters: T time, C channels.
"""

import torch
from torch import Tensor


def linear_scan(keep: Tensor, value: Tensor, state: Tensor) -> Tensor:
    """h_t = keep_t * h_{t-1} + value_t for keep, value (T, C) and h before the first token (C,) → (T, C)."""
    rows = []
    for keep_here, value_here in zip(keep, value, strict=True):
        state = keep_here * state + value_here
        rows.append(state)
    return torch.stack(rows)
