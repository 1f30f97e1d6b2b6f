"""The levels of one block: families of windows → bottlenecks → features → gated up-projection.

Each level reads the tokens through its own low-rank bottleneck, compares its current window with the one before, and
writes back through an up-projection. Pooling and projecting commute, so whichever is cheaper comes first:

- token levels (sliding, semantic) change at every token: project, then pool;
- node levels (block, dual) change every 2^j tokens: pool, then project and write back at the nodes alone. Coarse nodes
  pass their sum to finer ones, so that all node levels together cost less than one token level.

A token counts in a centroid by a learned weight s (salience). We accumulate sums of s x and sums of (s - 1), so missing
positions count as zero vectors of weight 1.

This is what the presets use. Variants are subclasses in `dyadlm.model.extras`, each of which changes a method or two.

Dimension letters: B batch, T time, N nodes, D width, R rank, K levels, F parts of a feature.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from dyadlm.model.boundaries import LEARNED
from dyadlm.model.cache import BlockState
from dyadlm.model.configuration import DyadConfig
from dyadlm.model.cost import Cost
from dyadlm.model.layout import ChunkLayout
from dyadlm.model.levels import (
    LevelFamily,
    LevelFeatures,
    NodeLevels,
    SegmentLevels,
    SlidingLevels,
    Weights,
)
from dyadlm.model.linear import effective_weight
from dyadlm.ops.blocks import broadcast, granularity, hand_down
from dyadlm.ops.centroids import Shares
from dyadlm.ops.clock import accumulator

SALIENCE_RANGE = 3.0  # weights between exp(-3) and exp(3)


class Tower(nn.Module):
    """All families of levels of a block, with one state.

    reads: whether it has bottlenecks of its own; if not, it writes back the features of another tower.
    credit: where the gradient of the features goes; their values are the same. joint: to the bottlenecks and the
        tokens that were read; reverse: to the tokens alone; detached: to neither, so that no token is shaped by later
        ones through the tower. How tokens are weighed and cut into segments is learned in each case.
    """

    credit: Literal["joint", "reverse", "detached"] = "joint"
    counted = 1  # columns that stand beside each sum: the sum of (s - 1)
    forgets = False  # whether what open segments keep is learned

    def __init__(self, config: DyadConfig, reads: bool = True):
        super().__init__()
        self.config, self.reads = config, reads
        self.alignments, self.ranks = config.alignments, config.ranks
        self.node_levels = {k: granularity(k, a) for k, a in enumerate(self.alignments) if a in ("block", "dual")}
        semantic = {len(self.alignments) + s: name for s, name in enumerate(config.semantic_levels or ())}
        self.by_rule = [k for k, name in semantic.items() if name != LEARNED]
        self.learned = [k for k, name in semantic.items() if name == LEARNED]
        self.token_levels = [k for k in range(len(self.ranks)) if k not in self.node_levels]
        self.token_widths = [self.part_count(k) * self.ranks[k] for k in self.token_levels]
        # Whether weights and features are those of this class, which kernels compute, and not those of a variant.
        self.plain = not self.forgets and all(
            getattr(type(self), name) is getattr(Tower, name)
            for name in (
                "weigh",
                "compare",
                "centroid",
                "parts",
                "feature",
                "joined",
                "segment_inputs",
                "segment_feature",
            )
        )
        self.families = [family for family in self.build_families() if family.levels]
        self.build_write(config)
        if reads:
            self.build_read(config)

    # ---- Parts

    def build_families(self) -> list[LevelFamily]:
        """The families, in the order of their weights."""
        sliding = [k for k, a in enumerate(self.alignments) if a == "sliding"]
        others = [k for k, a in enumerate(self.alignments) if a != "sliding"]
        return [SlidingLevels(self, sliding), NodeLevels(self, others), SegmentLevels(self, self.by_rule)]

    def build_write(self, config: DyadConfig) -> None:
        """The up-projections and the output gate."""
        width = config.hidden_size
        self.up_tokens = nn.Linear(sum(self.token_widths), width, bias=False) if self.token_levels else None
        self.up_nodes = nn.ModuleDict(
            {str(k): nn.Linear(self.part_count(k) * self.ranks[k], width, bias=False) for k in self.node_levels}
        )
        self.gate = nn.Linear(width, width, bias=False)
        aged = 2 * sum(a != "sliding" for a in self.alignments) + len(self.by_rule)
        self.age = nn.Linear(aged, width, bias=False) if aged else None

    def build_read(self, config: DyadConfig) -> None:
        """The bottlenecks and the weights of tokens."""
        width = config.hidden_size
        self.bottlenecks = nn.ModuleList(nn.Linear(width, rank, bias=False) for rank in self.ranks)
        self.salience = nn.Linear(width, sum(family.weight_count for family in self.families))

    def initialize(self) -> None:
        """The levels add nothing at first, ages do not count, and all tokens count alike."""
        for linear in (*self.ups(), self.age, getattr(self, "salience", None)):
            if linear is not None:
                init.zeros_(linear.weight)
                if linear.bias is not None:
                    init.zeros_(linear.bias)

    def borrow(self, owner: "Tower") -> None:
        """Read through the very bottlenecks of another tower, and have none: they are named and saved there alone."""
        del self.bottlenecks
        object.__setattr__(self, "bottlenecks", owner.bottlenecks)  # not as a part, which `self.bottlenecks =` makes it

    def ups(self) -> list[nn.Linear]:
        """Every up-projection: what the tower writes goes through one of them."""
        nodes = [self.up_nodes[str(k)] for k in self.node_levels]
        return [up for up in (self.up_tokens, *nodes) if isinstance(up, nn.Linear)]

    def before_pass(self) -> None:
        """Called before each training pass. A pass may be run twice, so what changes between passes changes here."""

    def cost(self, time: int) -> Cost:
        """Of one block over T tokens."""
        width = self.config.hidden_size
        written = time * sum(self.token_widths)
        written += sum((time // 2**j + 1) * self.part_count(k) * self.ranks[k] for k, j in self.node_levels.items())
        aged = 0 if self.age is None else self.age.in_features
        writing = Cost((written + time * (width + aged)) * width)
        if not self.reads:
            return writing
        weighing = Cost(time * self.weight_count() * width)
        return writing.plus(weighing, *(family.cost(time) for family in self.families))

    # ---- Reading: from tokens to features

    def read_levels(self, x: Tensor, layout: ChunkLayout, state: BlockState) -> tuple[LevelFeatures, BlockState]:
        """The feature of each level for x (B, T, D), normalised, where it changes; and the state after the chunk.

        The first row of a node level belongs to the last node before the chunk.
        """
        if self.credit == "detached":
            x = x.detach()
        features: dict[int, Tensor] = {}
        boundary = cost = None
        for family, weights in zip(self.families, self.weights(x), strict=True):
            found, state = family.read(x, weights, layout, state)
            features |= found.features
            boundary, cost = found.boundary if boundary is None else boundary, found.cost if cost is None else cost
        return LevelFeatures(features, boundary, cost), state

    def weights(self, x: Tensor) -> list[Weights]:
        """How much each of the tokens x (B, T, D) counts in each family, between exp(-3) and exp(3)."""
        bounded = SALIENCE_RANGE * torch.tanh(accumulator(self.salience(x)) / SALIENCE_RANGE)
        return [Weights(part) for part in bounded.exp().split([family.weight_count for family in self.families], -1)]

    def weight_count(self) -> int:
        """How many weights a token has."""
        return sum(family.weight_count for family in self.families)

    def weigh(self, parts: list[Tensor], weights: Tensor) -> Tensor:
        """Parts (B, T, C) side by side, each times its weight and followed by the weight less 1."""
        pairs = zip(map(accumulator, parts), weights.split(1, -1), strict=True)
        return torch.cat([piece for part, weight in pairs for piece in (part * weight, weight - 1)], -1)

    def through_bottlenecks(self, x: Tensor, levels: Sequence[int]) -> list[Tensor]:
        """x (B, T, D) through the bottleneck of each of some levels: (B, T, R) each."""
        modules = [self.bottlenecks[k] for k in levels]
        if not all(type(module) is nn.Linear for module in modules):  # such as adapters around them
            return [self.through_bottleneck(x, k) for k in levels]
        # One wide product is faster than several narrow ones.
        together = torch.cat([cast(nn.Linear, module).weight for module in modules])
        if self.credit != "joint":
            together = together.detach()
        return list(nn.functional.linear(x, together).split([self.ranks[k] for k in levels], -1))

    def through_bottleneck(self, x: Tensor, level: int) -> Tensor:
        """x (..., D) through the bottleneck of one level: (..., R)."""
        bottleneck = self.bottlenecks[level]
        if self.credit == "joint":
            return bottleneck(x)
        fixed = {name: weight.detach() for name, weight in bottleneck.named_parameters()}
        read: Tensor = torch.func.functional_call(bottleneck, fixed, (x,))
        return read

    def segment_inputs(self, x: Tensor, levels: Sequence[int]) -> list[Tensor]:
        """What segments sum of x (B, T, D), for each of some levels."""
        return self.through_bottlenecks(x, levels)

    def segment_width(self, level: int) -> int:
        """How many numbers a semantic level sums, without the weight beside them."""
        return self.ranks[level]

    def bottleneck_rows(self, level: int, windows: int, features: int) -> int:
        """How many vectors go through the bottleneck of a level with so many windows and features."""
        return windows

    def project(self, level: int, means: Tensor, dtype: torch.dtype) -> Tensor:
        """Means over the level's width, through its bottleneck: (..., D + 1) → (..., R + 1), the weights staying last.

        Sums of a wide level do not fit into float16; means do.
        """
        read = accumulator(self.through_bottleneck(means[..., :-1].to(dtype), level))
        return torch.cat([read, means[..., -1:]], -1)

    def compare(self, level: int, current: Tensor, previous: Tensor, shares: Shares, dtype: torch.dtype) -> Tensor:
        """The feature of a level from the means over two windows of its width (..., R + 1) → (..., F R)."""
        current, previous = self.centroid(current, shares.current), self.centroid(previous, shares.previous)
        return self.feature(level, current, previous, shares.paired, dtype)

    def centroid(self, mean: Tensor, share: Tensor | None) -> Tensor:
        """A window's centroid from the mean over its width, whose last column is the mean of (s - 1)."""
        mean, excess = mean[..., :-1], mean[..., -1:]
        return mean / (1 + excess) if share is None else mean * share / (1 + excess * share)

    def part_count(self, level: int) -> int:
        """F, how many vectors of rank R make up the feature of a level."""
        return 3

    def parts(self, current: Tensor, previous: Tensor, paired: Tensor) -> list[Tensor]:
        """The parts of a feature from two centroids (..., R): product, current, previous.

        paired: (..., 1) bool, whether both windows are complete.
        """
        return [current * previous, current, previous]

    def feature(self, level: int, current: Tensor, previous: Tensor, paired: Tensor, dtype: torch.dtype) -> Tensor:
        """The feature of a level from two centroids (..., R) → (..., F R)."""
        return self.joined(level, self.parts(current, previous, paired), dtype)

    def segment_feature(
        self, level: int, current: Tensor, last: Tensor, earlier: Tensor, paired: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The feature of a semantic level from the open segment and the two complete ones before it."""
        return self.feature(level, current, last, paired, dtype)

    def joined(self, level: int, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The parts of a feature side by side."""
        return torch.cat(parts, -1).to(dtype)

    # ---- Writing: from features to the residual stream

    def output_gate(self, x: Tensor, layout: ChunkLayout) -> Tensor:
        """The output gate (B, T, D), by which the sum of the levels is multiplied."""
        gate = self.gate(x)
        if self.age is not None:
            gate = gate + self.age(layout.ages)
        return nn.functional.silu(gate)

    def choose(
        self, x: Tensor, features: dict[int, Tensor], layout: ChunkLayout, held: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """What the levels write back together (B, T, D); routes and a held choice only where a selector makes them."""
        return self.mix(features, layout), None, ()

    def mix(self, features: dict[int, Tensor], layout: ChunkLayout) -> Tensor:
        """The sum of what all levels write back at each token, before the gate: (B, T, D)."""
        clock, nodes = layout.clock, layout.nodes
        coarse, written = 0, None  # the sum of all node levels so far, at the nodes of granularity 2^coarse
        for k in sorted(self.node_levels, key=lambda level: self.node_levels[level], reverse=True):
            here, j = self.up_nodes[str(k)](features[k]), self.node_levels[k]
            if written is not None:
                here = here + (
                    written if j == coarse else hand_down(written, nodes[coarse], nodes[j], coarse - j, clock)
                )
            coarse, written = j, here
        mixed = None if written is None else broadcast(written, nodes[coarse], coarse, clock)
        if self.up_tokens is not None:
            near = self.up_tokens(torch.cat([features[k] for k in self.token_levels], -1))
            mixed = near if mixed is None else near + mixed
        assert mixed is not None, "a tower has at least one level"
        return mixed

    def apart(self, features: dict[int, Tensor], layout: ChunkLayout, levels: Sequence[int]) -> Iterator[Tensor]:
        """What each of some levels writes back at each token, before the gate: (B, T, D) each."""
        weights = self.token_weights()
        for k in levels:
            if k in weights:
                yield nn.functional.linear(features[k], weights[k])
            else:
                j = self.node_levels[k]
                yield broadcast(self.up_nodes[str(k)](features[k]), layout.nodes[j], j, layout.clock)

    def token_weights(self) -> dict[int, Tensor]:
        """By token level, the weight (D, F R) through which it writes back."""
        if self.up_tokens is None:
            return {}
        return dict(zip(self.token_levels, effective_weight(self.up_tokens).split(self.token_widths, 1), strict=True))

    def weighted_levels(
        self, x: Tensor, features: dict[int, Tensor], layout: ChunkLayout, held: tuple[Tensor, ...] = ()
    ) -> list[Tensor]:
        """What each level writes back at each token, as it counts in the sum: (B, T, D) each. held: as of `choose`."""
        return list(self.apart(features, layout, range(len(self.ranks))))
