"""Node levels (`dual`, `block`): windows of 2^k tokens that move on every 2^j tokens. Pooled first, then projected.

A tree of block sums serves all of them, and they are projected and compared at its nodes alone:

    blocks of 4      [ The cat sat on ] [ the mat . It ] [ was warm . And ]
    dual level 3     at "And":           [ current: the ...  And          ]
                     [ previous: two blocks further back ]

Dimension letters: B batch, T time, N nodes, D width, R rank, F parts of a feature.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dyadlm.model.cache import BlockState
from dyadlm.model.cost import Cost
from dyadlm.model.layout import ChunkLayout
from dyadlm.model.levels.family import LevelFamily, LevelFeatures, Weights
from dyadlm.ops.blocks import HISTORY, block_sums, granularity, node_windows, window_lag

if TYPE_CHECKING:
    from dyadlm.model.tower import Tower


class NodeLevels(LevelFamily):
    """The state is the last four blocks of each level of the tree.

    at_nodes: of each level that changes at nodes, the j of its 2^j tokens.
    """

    def __init__(self, tower: "Tower", levels: Sequence[int]):
        super().__init__(tower, levels)
        self.alignments = {k: tower.alignments[k] for k in levels}
        self.at_nodes = {k: granularity(k, a) for k, a in self.alignments.items() if a in ("block", "dual")}

    @property
    def weight_count(self) -> int:
        """One: the tokens are summed once for all levels."""
        return 1

    def read(
        self, x: Tensor, weights: Weights, layout: ChunkLayout, state: BlockState
    ) -> tuple[LevelFeatures, BlockState]:
        """Features (B, N + 1, F R) of each level, at its nodes; the first row is the last node before the chunk."""
        summed = self.tower.weigh([x], weights.sums)
        tree, blocks = block_sums(summed, layout.nodes, layout.clock, state.blocks)
        return LevelFeatures(self.compare(summed, tree, layout, x.dtype)), state._replace(blocks=blocks)

    def compare(self, summed: Tensor, tree: list[Tensor], layout: ChunkLayout, dtype: torch.dtype) -> dict[int, Tensor]:
        """The features that are read from the block tree, of what is summed at each token (B, T, D + 1)."""
        features = {}
        for k in self.at_nodes:
            lag, alignment = window_lag(self.alignments[k]), self.alignments[k]
            windows = node_windows(tree, layout.nodes, k, alignment, layout.clock)
            means = self.tower.project(k, windows / 2**k, dtype)
            features[k] = self.tower.compare(k, means[:, lag:], means[:, :-lag], layout.shares[k], dtype)
        return features

    def cost(self, time: int) -> Cost:
        """Bottlenecks at the nodes of T tokens, and the tree."""
        tower, depth = self.tower, max(granularity(k, a) for k, a in self.alignments.items())
        products = 0
        for k, j in self.at_nodes.items():
            nodes = time // 2**j + 1
            products += tower.bottleneck_rows(k, nodes + window_lag(self.alignments[k]), nodes) * tower.ranks[k]
        tree = (depth + 1) * HISTORY * (tower.config.hidden_size + tower.counted)
        return Cost(products * tower.config.hidden_size, numbers=tree)
