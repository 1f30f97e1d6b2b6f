"""Rotary positions (Su et al. 2021, arXiv 2104.09864). Dimension letters: B batch, H heads, T tokens, E numbers."""

import torch
from torch import Tensor

BASE = 10_000.0


def rotated(x: Tensor, begin: Tensor | None = None) -> Tensor:
    """(B, H, T, E) turned by the positions of its tokens. begin: (B,) int64, that of the first one; None: 0."""
    half = x.shape[-1] // 2
    # float64, so that positions far into a stream are still exact.
    speed = BASE ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    position = torch.arange(x.shape[-2], device=x.device, dtype=torch.float64)
    if begin is not None:
        position = position + begin[:, None, None]
    angle = position[..., None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half : 2 * half]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, x[..., 2 * half :]], -1)
