"""Prefix levels (`level_alignment=prefix`): the running mean of the current block beside the last complete block.

Dimension letters: B batch, T time, D width.
"""

import torch
from torch import Tensor

from dyadlm.model.cost import Cost
from dyadlm.model.layout import ChunkLayout
from dyadlm.model.levels import LevelFamily, NodeLevels
from dyadlm.model.tower import Tower
from dyadlm.ops.blocks import running_sums


class NodeAndPrefixLevels(NodeLevels):
    """Prefix levels change at every token, and are read from the block tree of the others."""

    @property
    def prefix(self) -> list[int]:
        """The prefix levels."""
        return [k for k, alignment in self.alignments.items() if alignment == "prefix"]

    def compare(self, summed: Tensor, tree: list[Tensor], layout: ChunkLayout, dtype: torch.dtype) -> dict[int, Tensor]:
        tower, features = self.tower, super().compare(summed, tree, layout, dtype)
        for k, windows in running_sums(summed, tree, layout.nodes, self.prefix, layout.clock).items():
            now, before = (tower.project(k, window / 2**k, dtype) for window in windows)
            features[k] = tower.compare(k, now, before, layout.shares[k], dtype)
        return features

    def cost(self, time: int) -> Cost:
        """Both windows of a prefix level go through its bottleneck."""
        tower = self.tower
        products = sum(tower.bottleneck_rows(k, 2 * time, time) * tower.ranks[k] for k in self.prefix)
        return super().cost(time).plus(Cost(products * tower.config.hidden_size))


class PrefixLevels(Tower):
    """A tower with prefix levels."""

    def build_families(self) -> list[LevelFamily]:
        families: list[LevelFamily] = super().build_families()
        return [NodeAndPrefixLevels(self, f.levels) if type(f) is NodeLevels else f for f in families]
