"""Levels in which all tokens count alike (`salience=False`): plain sums, without a column of weights beside them.

Dimension letters: B batch, T time, C channels, D width, R rank.
"""

import torch
from torch import Tensor

from dyadlm.model.configuration import DyadConfig
from dyadlm.model.levels import Weights
from dyadlm.model.tower import Tower
from dyadlm.ops.clock import accumulator


class Unweighted(Tower):
    """Every weight is 1."""

    counted = 0

    def build_read(self, config: DyadConfig) -> None:
        super().build_read(config)
        del self.salience

    def weights(self, x: Tensor) -> list[Weights]:
        ones = accumulator(x).new_ones(1, 1, 1)
        return [Weights(ones.expand(*x.shape[:2], family.weight_count)) for family in self.families]

    def weight_count(self) -> int:
        return 0

    def weigh(self, parts: list[Tensor], weights: Tensor) -> Tensor:
        """Parts (B, T, C) side by side."""
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def project(self, level: int, means: Tensor, dtype: torch.dtype) -> Tensor:
        """Means over the level's width, through its bottleneck: (..., D) → (..., R)."""
        return accumulator(self.through_bottleneck(means.to(dtype), level))

    def centroid(self, mean: Tensor, share: Tensor | None) -> Tensor:
        return mean if share is None else mean * share
