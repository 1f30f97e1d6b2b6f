"""Sliding levels: windows of 2^k tokens that end at every token. Each token is projected, then pooled.

    level 2        The  cat  sat  on   the  mat
    at "the"            [ current window  ]         cat sat on the
               [ previous ]                         (what exists of it) The

Dimension letters: B batch, T time, R rank, F parts of a feature.
"""

import torch
from torch import Tensor

from dyadlm.model.cache import BlockState
from dyadlm.model.cost import Cost
from dyadlm.model.layout import ChunkLayout
from dyadlm.model.levels.family import SIDE_BY_SIDE, LevelFamily, LevelFeatures, Weights
from dyadlm.ops.centroids import Shares
from dyadlm.ops.sliding import sliding_windows


class SlidingLevels(LevelFamily):
    """The state is a ring of the last 2^j sums for each j up to the widest level."""

    @property
    def weight_count(self) -> int:
        """One for each level, since each sums its own projection."""
        return len(self.levels)

    def read(
        self, x: Tensor, weights: Weights, layout: ChunkLayout, state: BlockState
    ) -> tuple[LevelFeatures, BlockState]:
        """Features (B, T, F R) of each level."""
        tower = self.tower
        summed, channels = self.summed(x, weights.sums)
        windows, rings = sliding_windows(summed, self.levels, channels, layout.clock, state.rings)
        shares = [layout.shares[k] for k in self.levels]
        if len({window.current.shape for window in windows}) > 1 or x.shape[:2].numel() > SIDE_BY_SIDE:
            compared = (
                tower.compare(k, now / 2**k, before / 2**k, share, x.dtype)
                for k, (now, before), share in zip(self.levels, windows, shares, strict=True)
            )
            return LevelFeatures(dict(zip(self.levels, compared, strict=True))), state._replace(rings=rings)
        width = summed.new_tensor([[2.0**k] for k in self.levels])
        now, before = (torch.stack(sums, 2) / width for sums in zip(*windows, strict=True))
        together = Shares(
            _stacked([share.current for share in shares]),
            _stacked([share.previous for share in shares]),
            torch.stack([share.paired for share in shares], 2),
        )
        features = tower.compare_together(self.levels, now, before, together, x.dtype)
        return LevelFeatures(dict(zip(self.levels, features, strict=True))), state._replace(rings=rings)

    def summed(self, x: Tensor, weights: Tensor) -> tuple[Tensor, list[int] | None]:
        """What is summed (B, T, C): the channels of all levels side by side, and how wide each is."""
        projected = self.tower.through_bottlenecks(x, self.levels)
        return self.tower.weigh(projected, weights), [self.tower.ranks[k] + self.tower.counted for k in self.levels]

    def ring_width(self, j: int) -> int:
        """How many numbers ring j holds of each token."""
        return sum(self.tower.ranks[k] + self.tower.counted for k in self.levels if k >= j)

    def cost(self, time: int) -> Cost:
        """Bottlenecks over T tokens, and the rings."""
        rings = sum(2**j * self.ring_width(j) for j in range(max(self.levels) + 1))
        products = sum(self.tower.bottleneck_rows(k, time, time) * self.tower.ranks[k] for k in self.levels)
        return Cost(products * self.tower.config.hidden_size, numbers=rings)


def _stacked(parts: list[Tensor | None]) -> Tensor | None:
    """The shares of several levels (B or 1, T, 1) side by side, (B or 1, T, levels, 1); None if there are none."""
    there = [part for part in parts if part is not None]
    return torch.stack(there, 2) if there else None
