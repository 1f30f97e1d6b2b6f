"""Levels that are compared before their bottleneck (`transport_space=model`), the order of the paper.

Measured (docs/experiments.md, three paired seeds): 0.005 nats better than comparing after the bottleneck, within the
noise, and a step takes 1.25 times as long.

Dimension letters: B batch, T time, D width, R rank, F parts of a feature.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dyadlm.model.layout import ChunkLayout
from dyadlm.model.tower import Tower, Weights


class ModelSpace(Tower):
    """Windows sum the tokens themselves (..., D); each part of a feature goes through the bottleneck."""

    def sliding_sums(self) -> int:
        return min(len(self.sliding), 1)

    def read_sliding(
        self, x: Tensor, weights: Weights, layout: ChunkLayout, rings: tuple[Tensor, ...]
    ) -> tuple[dict[int, Tensor], tuple[Tensor, ...]]:
        if not self.sliding:
            return {}, rings
        return self.compare_sliding(self.weigh([x], weights.sliding), None, layout, rings, x.dtype)

    def segment_inputs(self, x: Tensor, levels: Sequence[int]) -> list[Tensor]:
        return [x] * len(levels)

    def read_products(self, time: int, rows: dict[int, int]) -> int:
        """Each part of a feature goes through the bottleneck by itself."""
        token_levels = [k for k in self.token_levels if k not in self.learned]
        parts = time * sum(self.part_count(k) * self.ranks[k] for k in token_levels)
        parts += sum(count * self.part_count(k) * self.ranks[k] for k, count in rows.items())
        return parts + time * self.weight_count()

    def segment_width(self, level: int) -> int:
        return self.config.hidden_size

    def ring_width(self, j: int) -> int:
        return self.config.hidden_size + self.counted

    def project(self, level: int, sums: Tensor, dtype: torch.dtype) -> Tensor:
        """Means over the level's width, still in the space of the model."""
        return sums / 2**level

    def joined(self, level: int, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        return self.through_bottleneck(torch.stack(parts, -2).to(dtype), level).flatten(-2)
