"""What every family of levels has in common: the interface, and what is handed around between tower and families.

A family is the levels that share one kind of window. It has three forms, which give the same values:

- parallel: `read` with an empty state, over whole sequences; this is how a model is trained;
- chunk: `read` with the state that an earlier chunk left, over a part of a sequence;
- step: one token at a time, in `dyadlm.engine`.

Dimension letters: B batch, T time, N nodes, D width, R rank, F parts of a feature.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from dyadlm import kernels
from dyadlm.model.cache import BlockState
from dyadlm.model.cost import Cost
from dyadlm.model.layout import ChunkLayout

if TYPE_CHECKING:
    from dyadlm.model.tower import Tower


class LevelFeatures(NamedTuple):
    """The features of levels at a chunk, and how segments were chosen."""

    features: dict[int, Tensor]  # (B, T, F R) of token levels, (B, N + 1, F R) of node levels
    boundary: Tensor | None = None  # (B, T) bool: where the learned boundary begins segments
    cost: Tensor | None = None  # scalar: how far the learned boundary is from its rate


class Weights(NamedTuple):
    """How much each token counts in the sums of one family."""

    sums: Tensor  # (B, T, `weight_count` of the family)
    log_keep: Tensor | None = None  # (B, T, semantic levels): log of what open segments keep; None: all of it


class LevelFamily(ABC):
    """Levels of one kind of window. Bottlenecks, weights and the comparison of windows belong to the tower.

    levels: their numbers, ascending. weight_count: the sums it keeps that have a weight of their own.
    """

    def __init__(self, tower: "Tower", levels: Sequence[int]):
        self.tower, self.levels = tower, list(levels)

    @property
    @abstractmethod
    def weight_count(self) -> int:
        """How many weights of a token the family uses."""

    @abstractmethod
    def read(
        self, x: Tensor, weights: Weights, layout: ChunkLayout, state: BlockState
    ) -> tuple[LevelFeatures, BlockState]:
        """The features of the levels for x (B, T, D), normalised, where they change; and the state after the chunk.

        state: of the whole block; the family replaces its own part. Empty for a fresh start.
        """

    def has_kernel(self, x: Tensor, layout: ChunkLayout) -> bool:
        """Whether a kernel computes the features of a level for x (B, T, D): plain ones, and no state is left."""
        narrow = max(self.tower.ranks[k] for k in self.levels) <= kernels.WIDEST_RANK
        return self.tower.plain and not layout.keep and narrow and kernels.usable(x)

    @abstractmethod
    def cost(self, time: int) -> Cost:
        """Of reading T tokens from a fresh start, bottlenecks included; and of the state."""
