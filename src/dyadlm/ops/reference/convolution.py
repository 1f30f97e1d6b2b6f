"""A short causal convolution, token by token.

Dimension letters: T time, C channels, N taps.
"""

import torch
from torch import Tensor


def short_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """y_t = sum of weight_i * x_{t-i} over the i < N that one document x (T, C) has; weight (N, C) → (T, C)."""
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[t])
        for i in range(min(len(weight), t + 1)):
            row = row + weight[i] * x[t - i]
        rows.append(row)
    return torch.stack(rows)
