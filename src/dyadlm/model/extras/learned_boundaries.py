"""A semantic level whose boundaries are learned (`semantic_levels` with `learned`; H-Net, arXiv 2507.07955).

Measured in place of the rule for lines (docs/experiments.md, one seed, 0.5M tokens): +0.008 nats on fresh text.

Dimension letters: B batch, T time, D width, R rank.
"""

import torch
from torch import Tensor, nn

from dyadlm.model.cache import BlockState
from dyadlm.model.configuration import DyadConfig
from dyadlm.model.cost import Cost
from dyadlm.model.layout import ChunkLayout
from dyadlm.model.levels import LevelFamily, LevelFeatures, SegmentLevels, Weights
from dyadlm.model.tower import Tower
from dyadlm.ops.clock import Clock, accumulator
from dyadlm.ops.segments import SegmentCount, segment_plan
from dyadlm.ops.selection import real_tokens, straight_through

BOUNDARY_COST = 0.03


class BoundaryRouter(nn.Module):
    """A learned boundary: a segment begins where a token's state is unlike the one before (arXiv 2507.07955).

    The chance is (1 - cosine of query_t and key_{t-1}) / 2 and the choice hard. What is made of it is multiplied by how
    sure it was, straight through; a cost keeps the share of beginnings near a rate.
    """

    def __init__(self, width: int, rank: int, rate: float):
        super().__init__()
        self.query = nn.Linear(width, rank, bias=False)
        self.key = nn.Linear(width, rank, bias=False)
        self.rate = rate

    def forward(self, x: Tensor, clock: Clock, key: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, D), key (B, R) of the token before → begins (B, T) bool, sureness (B, T), cost, the last key."""
        query, keys = self.query(x), self.key(x)
        if key is None:
            key = accumulator(keys).new_zeros(keys.shape[0], keys.shape[2])
        before = torch.cat([key[:, None].to(keys.dtype), keys[:, :-1]], 1)
        chance = (1 - nn.functional.cosine_similarity(query, before, dim=-1)) / 2
        first = clock.index == 0
        begins = (chance > 0.5) | first
        sure = torch.where(begins, chance, 1 - chance).masked_fill(first, 1.0)
        real = real_tokens(clock)
        counted = real.sum().clamp(min=1)
        chosen, likely = (begins & real).sum() / counted, (chance * real).sum() / counted
        span = 1 / self.rate  # the cost of H-Net, 1 where the share of beginnings is 1 / span
        cost = span / (span - 1) * ((span - 1) * chosen * likely + (1 - chosen) * (1 - likely))
        last = (clock.length - 1)[:, None]
        final = accumulator(keys).gather(1, last.clamp(min=0)[..., None].expand(-1, -1, keys.shape[2])).squeeze(1)
        return begins, sure, BOUNDARY_COST * cost, torch.where(last >= 0, final, key)


class LearnedSegments(SegmentLevels):
    """One more level over segments that a router begins; its feature is multiplied by how sure the router was."""

    def read(
        self, x: Tensor, weights: Weights, layout: ChunkLayout, state: BlockState
    ) -> tuple[LevelFeatures, BlockState]:
        router: BoundaryRouter = self.tower.router  # type: ignore[assignment]  # the tower is `LearnedBoundaries`
        key, *carried = state.learned or (None,)
        boundary, sure, cost, key = router(x, layout.clock, key)
        count = SegmentCount(*carried[:2]) if carried else None
        plan, count = segment_plan(boundary[..., None], layout.clock, self.tower.config.longest_segment, count)
        own, segments = self.read_plan(x, weights, plan, layout.clock, tuple(carried[2:]))
        features = {k: part * straight_through(sure)[..., None] for k, part in own.items()}
        state = state._replace(learned=(key, *count, *segments))
        return LevelFeatures(features, plan.begins[..., 0], cost), state

    def log_keep(self, weights: Weights) -> Tensor | None:
        return None if weights.log_keep is None else weights.log_keep[..., len(self.tower.by_rule) :]

    def cost(self, time: int) -> Cost:
        """The router as well, and its key; and the count of segments is carried."""
        rank = max(self.tower.ranks)
        router = Cost(2 * time * rank * self.tower.config.hidden_size, numbers=rank, integers=2)
        return super().cost(time).plus(router)


class LearnedBoundaries(Tower):
    """A tower with a router and the level that it cuts."""

    def build_families(self) -> list[LevelFamily]:
        return [*super().build_families(), LearnedSegments(self, self.learned)]

    def build_read(self, config: DyadConfig) -> None:
        super().build_read(config)
        self.router = BoundaryRouter(config.hidden_size, max(self.ranks), config.boundary_rate)
