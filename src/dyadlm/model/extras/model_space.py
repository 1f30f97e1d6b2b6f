"""Levels that are compared before their bottleneck (`transport_space=model`), the order of the paper.

Measured (docs/experiments.md, three paired seeds): 0.005 nats better than comparing after the bottleneck, within the
noise, and a step takes 1.25 times as long.

Dimension letters: B batch, T time, D width, R rank, F parts of a feature.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dyadlm.model.levels import LevelFamily, SlidingLevels
from dyadlm.model.tower import Tower


class ModelSpaceSliding(SlidingLevels):
    """One sum of the tokens themselves serves all sliding levels."""

    @property
    def weight_count(self) -> int:
        return 1

    def summed(self, x: Tensor, weights: Tensor) -> tuple[Tensor, list[int] | None]:
        return self.tower.weigh([x], weights), None

    def ring_width(self, j: int) -> int:
        return self.tower.config.hidden_size + self.tower.counted


class ModelSpace(Tower):
    """Windows hold the tokens themselves (..., D); each part of a feature goes through the bottleneck."""

    def build_families(self) -> list[LevelFamily]:
        families: list[LevelFamily] = super().build_families()
        return [ModelSpaceSliding(self, f.levels) if type(f) is SlidingLevels else f for f in families]

    def segment_inputs(self, x: Tensor, levels: Sequence[int]) -> list[Tensor]:
        return [x] * len(levels)

    def segment_width(self, level: int) -> int:
        return self.config.hidden_size

    def bottleneck_rows(self, level: int, windows: int, features: int) -> int:
        return self.part_count(level) * features

    def project(self, level: int, means: Tensor, dtype: torch.dtype) -> Tensor:
        """Means over the level's width, still in the space of the model."""
        return means

    def joined(self, level: int, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        return self.through_bottleneck(torch.stack(parts, -2).to(dtype), level).flatten(-2)
