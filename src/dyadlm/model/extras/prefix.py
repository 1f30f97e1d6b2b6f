"""Prefix levels (`level_alignment=prefix`): the running mean of the current block beside the last complete block.

Dimension letters: B batch, T time, D width.
"""

import torch
from torch import Tensor

from dyadlm.model.layout import ChunkLayout
from dyadlm.model.tower import Tower
from dyadlm.ops.blocks import running_sums


class PrefixLevels(Tower):
    """They are token levels that are read from the block tree."""

    def read_products(self, time: int, rows: dict[int, int]) -> int:
        """Both windows of a prefix level go through its bottleneck."""
        twice = [k for k, alignment in enumerate(self.alignments) if alignment == "prefix"]
        if self.config.transport_space == "model":  # parts do, which are counted already
            twice = []
        return super().read_products(time, rows) + time * sum(self.ranks[k] for k in twice)

    def compare_nodes(
        self, summed: Tensor, tree: list[Tensor], layout: ChunkLayout, dtype: torch.dtype
    ) -> dict[int, Tensor]:
        features = super().compare_nodes(summed, tree, layout, dtype)
        prefix = [k for k, alignment in enumerate(self.alignments) if alignment == "prefix"]
        for k, (now, before) in running_sums(summed, tree, layout.nodes, prefix, layout.clock).items():
            now, before = self.project(k, now, dtype), self.project(k, before, dtype)
            features[k] = self.compare(k, now, before, layout.shares[k], dtype)
        return features
