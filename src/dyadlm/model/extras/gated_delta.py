"""One more level, whose window is a memory under the gated delta rule (`mixers` with `delta`).

A token stores its value (what passes the level's bottleneck) under a key, in place of what the memory has there, and
recalls by a query. Heads are small. What a head keeps at a token is learned, and the beginnings of segments, which
semantic levels know, have a say in it: a head may forget where a sentence begins, or a word.

Predicted and not yet measured: "mixers" in docs/experiments.md.

Dimension letters: B batch, T time, D width, H heads, R rank, K numbers of a key, S semantic levels.
"""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from dyadlm.model.cache import BlockState
from dyadlm.model.configuration import DELTA_HEAD, DyadConfig
from dyadlm.model.cost import Cost
from dyadlm.model.layout import ChunkLayout
from dyadlm.model.levels import LevelFamily, LevelFeatures, Weights
from dyadlm.model.tower import Tower
from dyadlm.ops.clock import accumulator
from dyadlm.ops.gated_delta import gated_delta, gated_delta_products

NAME = "delta"
SHORTEST, LONGEST = 16.0, 256.0  # tokens after which the first and the last head have forgotten 63 %, at first


class DeltaMemory(nn.Module):
    """Keys, queries and decays of H heads of K = 16 numbers. segments: S."""

    def __init__(self, width: int, heads: int, segments: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, heads * DELTA_HEAD, bias=False)
        self.key = nn.Linear(width, heads * DELTA_HEAD, bias=False)
        self.strength = nn.Linear(width, heads)
        self.decay = nn.Linear(width, heads)
        self.boundary = nn.Linear(segments, heads, bias=False) if segments else None

    def initialize(self) -> None:
        """At first half of each value is stored, and what is kept depends on the head alone."""
        init.zeros_(self.strength.bias)
        init.zeros_(self.decay.weight)
        spans = torch.logspace(0, 1, self.heads, LONGEST / SHORTEST, device=self.decay.bias.device) * SHORTEST
        init.copy_(self.decay.bias, spans.reciprocal().expm1().log())
        if self.boundary is not None:
            init.zeros_(self.boundary.weight)

    def forward(self, x: Tensor, value: Tensor, layout: ChunkLayout, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, D), value (B, T, R), memory (B, H, K, R / H) or None at the start → recalled (B, T, R), memory."""
        query, key = (
            nn.functional.normalize(accumulator(linear(x)).unflatten(-1, (self.heads, -1)), dim=-1)
            for linear in (self.query, self.key)
        )
        decay = self.decay(x)
        if self.boundary is not None:
            assert layout.segments is not None, "a model with semantic levels plans its segments"
            decay = decay + self.boundary(layout.segments.begins.to(x.dtype))
        log_keep = -nn.functional.softplus(accumulator(decay))
        entries = value.unflatten(-1, (self.heads, -1))
        recalled, memory = gated_delta(query, key, entries, self.strength(x).sigmoid(), log_keep, layout.clock, state)
        return recalled.flatten(2).to(x.dtype), memory

    def cost(self, time: int, rank: int) -> Cost:
        """Of T tokens with values of R numbers."""
        products, fixed = gated_delta_products(time, DELTA_HEAD, rank // self.heads)
        of_token = sum(
            part.in_features * part.out_features for part in (self.query, self.key, self.strength, self.decay)
        )
        begins = 0 if self.boundary is None else time * self.boundary.in_features * self.heads
        return Cost(
            time * of_token + begins + self.heads * products, begins + self.heads * fixed, numbers=DELTA_HEAD * rank
        )


class DeltaLevel(LevelFamily):
    """The state is the memory of all heads."""

    @property
    def weight_count(self) -> int:
        """None: how much is stored is learned apart."""
        return 0

    def read(
        self, x: Tensor, weights: Weights, layout: ChunkLayout, state: BlockState
    ) -> tuple[LevelFeatures, BlockState]:
        """Features (B, T, R) of the level: what is recalled."""
        (level,), (value,) = self.levels, self.tower.through_bottlenecks(x, self.levels)
        memory = state.memory[0] if state.memory else None
        recalled, memory = cast(GatedDelta, self.tower).delta(x, value, layout, memory)
        return LevelFeatures({level: recalled}), state._replace(memory=(memory,))

    def cost(self, time: int) -> Cost:
        """Bottleneck, memory, and the state."""
        tower, (level,) = cast(GatedDelta, self.tower), self.levels
        rank = tower.ranks[level]
        return Cost(time * rank * tower.config.hidden_size).plus(tower.delta.cost(time, rank))


class GatedDelta(Tower):
    """A tower with such a level, the feature of which is one vector."""

    delta: DeltaMemory

    def build_families(self) -> list[LevelFamily]:
        return [*super().build_families(), DeltaLevel(self, [self.config.level_keys.index(NAME)])]

    def build_read(self, config: DyadConfig) -> None:
        super().build_read(config)
        heads = self.ranks[config.level_keys.index(NAME)] // DELTA_HEAD
        self.delta = DeltaMemory(config.hidden_size, heads, len(self.by_rule))

    def part_count(self, level: int) -> int:
        return 1 if level == self.config.level_keys.index(NAME) else super().part_count(level)
