"""Sliding levels: windows of 2^k tokens that end at every token. Each token is projected, then pooled.

    level 2        The  cat  sat  on   the  mat
    at "the"            [ current window  ]         cat sat on the
               [ previous ]                         (what exists of it) The

Dimension letters: B batch, T time, R rank, F parts of a feature.
"""

from torch import Tensor

from dyadlm import kernels
from dyadlm.model.cache import BlockState
from dyadlm.model.cost import Cost
from dyadlm.model.layout import ChunkLayout
from dyadlm.model.levels.family import LevelFamily, LevelFeatures, Weights
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
        if self.levels[-1] <= kernels.WIDEST_LEVEL and self.has_kernel(x, layout):
            return LevelFeatures(self.read_by_kernel(x, weights.sums, layout)), state
        summed, channels = self.summed(x, weights.sums)
        windows, rings = sliding_windows(summed, self.levels, channels, layout.clock, state.rings)
        shares = [layout.shares[k] for k in self.levels]
        compared = (
            tower.compare(k, now / 2**k, before / 2**k, share, x.dtype)
            for k, (now, before), share in zip(self.levels, windows, shares, strict=True)
        )
        return LevelFeatures(dict(zip(self.levels, compared, strict=True))), state._replace(rings=rings)

    def read_by_kernel(self, x: Tensor, weights: Tensor, layout: ChunkLayout) -> dict[int, Tensor]:
        """Features (B, T, 3 R) of each level, from a fresh state."""
        from dyadlm.kernels.windows import window_features

        projected = self.tower.through_bottlenecks(x, self.levels)
        features = {}
        for k, part, weight in zip(self.levels, projected, weights.unbind(-1), strict=True):
            current, previous, _ = layout.shares[k]
            features[k], _ = window_features(part, weight, layout.clock.index, current, previous, k, x.dtype)
        return features

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
