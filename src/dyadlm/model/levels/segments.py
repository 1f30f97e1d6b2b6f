"""Semantic levels: segments of the text (syllable, word, sentence, line), begun by rules on the tokens.

The feature compares the open segment so far with the last complete one:

    level "word"     The  quick  fox
    at "qui|ck"      [-----]          previous: the mean of "The "
                          [---]       current: the mean of "qui"

Dimension letters: B batch, T time, D width, R rank, F parts of a feature, S levels of the family, C channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dyadlm.model.cache import BlockState
from dyadlm.model.cost import Cost, tile_products
from dyadlm.model.layout import ChunkLayout
from dyadlm.model.levels.family import LevelFamily, LevelFeatures, Weights
from dyadlm.ops.clock import Clock, accumulator
from dyadlm.ops.segments import SegmentPlan, SegmentState, segment_sums, segment_windows


class SegmentLevels(LevelFamily):
    """The state is the open sum of each level, and the means of its last two complete segments."""

    @property
    def weight_count(self) -> int:
        """One for each level."""
        return len(self.levels)

    def read(
        self, x: Tensor, weights: Weights, layout: ChunkLayout, state: BlockState
    ) -> tuple[LevelFeatures, BlockState]:
        """Features (B, T, F R) of each level."""
        assert layout.segments is not None, "a model with semantic levels plans its segments"
        if layout.segment_ends is not None and self.has_kernel(x, layout):
            return LevelFeatures(self.read_by_kernel(x, weights.sums, layout.segments, layout.segment_ends)), state
        features, segments = self.read_plan(x, weights, layout.segments, layout.clock, state.segments)
        return LevelFeatures(features), state._replace(segments=segments)

    def read_plan(
        self, x: Tensor, weights: Weights, plan: SegmentPlan, clock: Clock, state: tuple[Tensor, ...]
    ) -> tuple[dict[int, Tensor], tuple[Tensor, ...]]:
        """As `read`, for segments that a plan lays out; the state is that of the segments."""
        read = [accumulator(part) for part in self.tower.segment_inputs(x, self.levels)]
        widths = [part.shape[-1] for part in read]
        counted = [width + 1 for width in widths]  # the sum of weights beside each sum
        pairs = zip(read, weights.sums.split(1, -1), strict=True)
        weighed = torch.cat([piece for part, weight in pairs for piece in (part * weight, weight)], -1)
        if state:
            carried = SegmentState(*state)
        else:
            nothing = weighed.new_zeros(x.shape[0], sum(counted))
            carried = SegmentState(nothing, *(nothing[:, : sum(widths)],) * 2)
        sums = segment_sums(weighed, counted, plan, carried.running, self.log_keep(weights))
        means = segment_means(carried.running, counted)
        windows, carried = segment_windows(segment_means(sums, counted), sums, widths, plan, clock, carried, means)
        features = {}
        current, last, earlier = (window.split(widths, -1) for window in windows)
        for s, k in enumerate(self.levels):
            paired = (plan.complete[..., s] >= 1)[..., None]
            features[k] = self.tower.segment_feature(k, current[s], last[s], earlier[s], paired, x.dtype)
        return features, tuple(carried)

    def read_by_kernel(self, x: Tensor, weights: Tensor, plan: SegmentPlan, ends: Tensor) -> dict[int, Tensor]:
        """Features (B, T, 3 R) of each level, from a fresh state."""
        from dyadlm.kernels.segments import segment_features

        features = {}
        projected = self.tower.through_bottlenecks(x, self.levels)
        for s, (k, part, weight) in enumerate(zip(self.levels, projected, weights.unbind(-1), strict=True)):
            places = (plan.last[..., s], plan.complete[..., s], ends[..., s])
            features[k], _ = segment_features(part, weight, *places, x.dtype)
        return features

    def log_keep(self, weights: Weights) -> Tensor | None:
        """The part of `log_keep` that is about these levels, (B, T, S)."""
        return None if weights.log_keep is None else weights.log_keep[..., : len(self.levels)]

    def cost(self, time: int) -> Cost:
        """Bottlenecks and sums over T tokens, and the state."""
        tower = self.tower
        products = sum(tower.bottleneck_rows(k, time, time) * tower.ranks[k] for k in self.levels)
        # Each sum is as wide as the widest. Which tokens share a segment has no gradient, unless segments forget.
        summed = tile_products(time) * len(self.levels) * max(tower.segment_width(k) + 1 for k in self.levels)
        state = sum(3 * tower.segment_width(k) + 1 for k in self.levels)
        return Cost(products * tower.config.hidden_size + summed, 0 if tower.forgets else summed, numbers=state)


def segment_means(sums: Tensor, counted: Sequence[int]) -> Tensor:
    """Weighted means from sums with their sums of weights (..., C + S) → (..., C)."""
    if len(set(counted)) == 1:
        together = sums.unflatten(-1, (len(counted), -1))
        return (together[..., :-1] / together[..., -1:].clamp(min=1e-6)).flatten(-2)
    parts = [part[..., :-1] / part[..., -1:].clamp(min=1e-6) for part in sums.split(list(counted), -1)]
    return torch.cat(parts, -1)
