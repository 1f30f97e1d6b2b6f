"""One more level, which asks each scale of the past by a key (`mixers` with `outer`): linear attention in windows.

Each window of the geometric and the semantic levels holds a sum of outer products of keys and values (what passes the
level's bottleneck), and a token's query reads every one of them apart; the feature is all that it finds.

Predicted and not yet measured: "mixers" in docs/experiments.md.

Learned boundaries and forgetting do not reach these windows.

Dimension letters: B batch, T time, D width, R rank, K numbers of a key, W windows, S semantic levels.
"""

from typing import cast

from torch import Tensor, nn

from dyadlm.model.cache import BlockState
from dyadlm.model.configuration import DyadConfig
from dyadlm.model.cost import Cost, tile_products
from dyadlm.model.layout import ChunkLayout
from dyadlm.model.levels import LevelFamily, LevelFeatures, Weights
from dyadlm.model.tower import Tower
from dyadlm.ops.clock import accumulator
from dyadlm.ops.outer_products import OuterState, ask, outer_numbers, outer_windows

NAME = "outer"
KEY_WIDTH = 8


class OuterKeys(nn.Module):
    """Keys and queries of length 1."""

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Linear(width, KEY_WIDTH, bias=False)
        self.key = nn.Linear(width, KEY_WIDTH, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) → queries and keys (B, T, K)."""
        query, key = (nn.functional.normalize(accumulator(part(x)), dim=-1) for part in (self.query, self.key))
        return query, key


class OuterLevel(LevelFamily):
    """The state is an `OuterState`, its tensors one after another."""

    @property
    def weight_count(self) -> int:
        """One: each token is entered once for all windows."""
        return 1

    def read(
        self, x: Tensor, weights: Weights, layout: ChunkLayout, state: BlockState
    ) -> tuple[LevelFeatures, BlockState]:
        """Features (B, T, W R) of the level."""
        tower = cast(OuterProducts, self.tower)
        (level,), (value,) = self.levels, tower.through_bottlenecks(x, self.levels)
        query, key = tower.outer(x)
        entries = (weights.sums * key)[..., :, None] * accumulator(value)[..., None, :]
        windows, after = outer_windows(
            entries.flatten(2), weights.sums, tower.alignments, layout.nodes, layout.segments, layout.clock,
            self.parted(state.outer),
        )  # fmt: skip
        found = ask(query, windows).to(x.dtype)
        return LevelFeatures({level: found}), state._replace(outer=(*after.rings, *after.blocks, *after.segments))

    def parted(self, state: tuple[Tensor, ...]) -> OuterState:
        """The tensors of a state by kind; segments carry three."""
        if not state:
            return OuterState()
        sliding = max((k + 1 for k, a in enumerate(self.tower.alignments) if a == "sliding"), default=0)
        end = len(state) - 3 * bool(self.tower.by_rule)
        return OuterState(state[:sliding], state[sliding:end], state[end:])

    def cost(self, time: int) -> Cost:
        """Bottleneck, keys and queries, sums over segments, and the state. What is asked is no matrix product."""
        tower, (level,) = self.tower, self.levels
        rank, segmentations = tower.ranks[level], len(tower.by_rule)
        size = KEY_WIDTH * rank
        read = time * tower.config.hidden_size * (rank + 2 * KEY_WIDTH)
        # Which tokens share a segment has no gradient.
        summed = tile_products(time) * segmentations * (size + 1)
        return Cost(read + summed, summed, numbers=outer_numbers(tower.alignments, segmentations, size))


class OuterProducts(Tower):
    """A tower with such a level, the feature of which has one vector for each window."""

    outer: OuterKeys

    def build_families(self) -> list[LevelFamily]:
        return [*super().build_families(), OuterLevel(self, [self.config.level_keys.index(NAME)])]

    def build_read(self, config: DyadConfig) -> None:
        super().build_read(config)
        self.outer = OuterKeys(config.hidden_size)

    def part_count(self, level: int) -> int:
        if level == self.config.level_keys.index(NAME):
            return len(self.alignments) + 2 * len(self.by_rule)
        return super().part_count(level)
