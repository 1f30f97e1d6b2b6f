"""A short causal convolution of each channel by itself: a weighted sum of the last few tokens of the document.

    y_t = sum over i of weight_i * x_{t-i}        what stands before the document counts as zero

The state is the tokens that the next ones still reach back to.

Dimension letters: B batch, T time, C channels, N taps.
"""

import torch
from torch import Tensor

from dyadlm.ops.clock import Clock, accumulator
from dyadlm.ops.sliding import latest


def short_convolution(x: Tensor, weight: Tensor, clock: Clock, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The convolution of a chunk, in float32 at least.

    Args:
        x: (B, T, C).
        weight: (N, C), row i for the token i back.
        state: (B, N - 1, C) as returned; None for a fresh start.

    Returns:
        (B, T, C), and the last N - 1 tokens of each row's open document: zeros for those that it does not have.
    """
    x, back, time = accumulator(x), len(weight) - 1, x.shape[1]
    weight = weight.to(x.dtype)
    before = x.new_zeros(x.shape[0], back, x.shape[2]) if state is None else state
    history = torch.cat([before, x], 1)
    summed = x * weight[0]
    for i in range(1, back + 1):
        earlier = history[:, back - i : back - i + time]
        if clock.restarts:
            earlier = earlier * (clock.index >= i)[..., None]
        summed = torch.addcmul(summed, earlier, weight[i])
    return summed, latest(history, back, clock)
