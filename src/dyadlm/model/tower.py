"""The levels of one block: the feature of every level of the pyramid at every token.

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
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from dyadlm.model.boundaries import LEARNED
from dyadlm.model.cache import BlockState
from dyadlm.model.configuration import DyadConfig
from dyadlm.model.cost import Cost, tile_products
from dyadlm.model.layout import ChunkLayout
from dyadlm.ops.blocks import HISTORY, block_sums, broadcast, granularity, hand_down, node_windows, window_lag
from dyadlm.ops.centroids import Shares
from dyadlm.ops.clock import Clock, accumulator
from dyadlm.ops.segments import SegmentPlan, SegmentState, segment_sums, segment_windows
from dyadlm.ops.sliding import sliding_windows

SALIENCE_RANGE = 3.0  # weights between exp(-3) and exp(3)


class LevelFeatures(NamedTuple):
    """The features of all levels at a chunk, and how segments were chosen."""

    features: dict[int, Tensor]  # (B, T, F R) of token levels, (B, N + 1, F R) of node levels
    boundary: Tensor | None = None  # (B, T) bool: where the learned boundary begins segments
    cost: Tensor | None = None  # scalar: how far the learned boundary is from its rate


class Weights(NamedTuple):
    """How much each token counts: by level where a level sums alone, and once where levels share a sum."""

    sliding: Tensor  # (B, T, sliding levels)
    nodes: Tensor  # (B, T, 1 or 0)
    segments: Tensor  # (B, T, semantic levels by rule)
    learned: Tensor  # (B, T, 1 or 0)
    log_keep: Tensor | None = None  # (B, T, all semantic levels): log of what open segments keep; None: all of it


class Tower(nn.Module):
    """Levels → bottlenecks → features → gated up-projection, with one state.

    reads: whether it has bottlenecks of its own; if not, it writes back the features of another tower.
    credit: where the gradient of the features goes; their values are the same. joint: to the bottlenecks and the
        tokens that were read; reverse: to the tokens alone; detached: to neither, so that no token is shaped by later
        ones through the tower. How tokens are weighed and cut into segments is learned in each case.
    """

    credit: Literal["joint", "reverse", "detached"] = "joint"
    counted = 1  # columns that stand beside each sum: the sum of (s - 1)

    def __init__(self, config: DyadConfig, reads: bool = True):
        super().__init__()
        self.config, self.reads = config, reads
        self.alignments, self.ranks = config.alignments, config.ranks
        self.sliding = [k for k, a in enumerate(self.alignments) if a == "sliding"]
        self.node_levels = {k: granularity(k, a) for k, a in enumerate(self.alignments) if a in ("block", "dual")}
        semantic = {len(self.alignments) + s: name for s, name in enumerate(config.semantic_levels or ())}
        self.by_rule = [k for k, name in semantic.items() if name != LEARNED]
        self.learned = [k for k, name in semantic.items() if name == LEARNED]
        self.token_levels = [k for k in range(len(self.ranks)) if k not in self.node_levels]
        self.token_widths = [self.part_count(k) * self.ranks[k] for k in self.token_levels]
        # Sliding and semantic levels have weights of their own; what is summed once for several levels shares them.
        alone = self.sliding_sums()
        shared = int(len(self.alignments) > len(self.sliding))
        self.weighted = [alone, shared, len(self.by_rule), len(self.learned)]
        self.build_write(config)
        if reads:
            self.build_read(config)

    def build_write(self, config: DyadConfig) -> None:
        """The up-projections and the output gate."""
        width = config.hidden_size
        self.up_tokens = nn.Linear(sum(self.token_widths), width, bias=False) if self.token_levels else None
        self.up_nodes = nn.ModuleDict(
            {str(k): nn.Linear(self.part_count(k) * self.ranks[k], width, bias=False) for k in self.node_levels}
        )
        self.gate = nn.Linear(width, width, bias=False)
        aged = 2 * (len(self.alignments) - len(self.sliding)) + len(self.by_rule)
        self.age = nn.Linear(aged, width, bias=False) if aged else None

    def build_read(self, config: DyadConfig) -> None:
        """The bottlenecks and the weights of tokens."""
        width = config.hidden_size
        self.bottlenecks = nn.ModuleList(nn.Linear(width, rank, bias=False) for rank in self.ranks)
        self.salience = nn.Linear(width, sum(self.weighted))

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

    # ---- Costs

    def cost(self, time: int) -> Cost:
        """Of one block over T tokens."""
        width = self.config.hidden_size
        rows = {k: time // 2**j + 1 for k, j in self.node_levels.items()}
        written = time * sum(self.token_widths)
        written += sum(count * self.part_count(k) * self.ranks[k] for k, count in rows.items())
        aged = 0 if self.age is None else self.age.in_features
        writing = Cost((written + time * (width + aged)) * width)
        if not self.reads:
            return writing
        read = self.read_products(time, rows) * width
        summed = self.segment_products(time, self.by_rule)
        fixed = 0 if self.config.forgetting else summed  # which tokens share a segment has no gradient
        return writing.plus(Cost(read + summed, fixed), self.state_cost())

    def read_products(self, time: int, rows: dict[int, int]) -> int:
        """Products, for one channel of the model, of bottlenecks and weights. rows: of each node level, its nodes."""
        windows = {k: rows[k] + window_lag(self.alignments[k]) for k in rows}
        token_levels = [k for k in self.token_levels if k not in self.learned]
        return time * (sum(self.ranks[k] for k in token_levels) + self.weight_count()) + sum(
            windows[k] * self.ranks[k] for k in rows
        )

    def weight_count(self) -> int:
        """How many weights a token has."""
        return sum(self.weighted)

    def segment_width(self, level: int) -> int:
        """How many numbers a semantic level sums, without the weight beside them."""
        return self.ranks[level]

    def segment_products(self, time: int, levels: Sequence[int]) -> int:
        """Products of the sums over segments of some levels, each as wide as the widest."""
        return tile_products(time) * len(levels) * max((self.segment_width(k) + 1 for k in levels), default=0)

    def state_cost(self) -> Cost:
        """The state of the levels."""
        rings = sum(2**j * self.ring_width(j) for j in range(max(self.sliding, default=-1) + 1))
        deep = [granularity(k, a) for k, a in enumerate(self.alignments) if a != "sliding"]
        tree = (max(deep, default=-1) + 1) * HISTORY * (self.config.hidden_size + self.counted)
        segments = sum(3 * self.segment_width(k) + 1 for k in (*self.by_rule, *self.learned))
        return Cost(numbers=rings + tree + segments)

    def ring_width(self, j: int) -> int:
        """How many numbers ring j holds of each token."""
        return sum(self.ranks[k] + self.counted for k in self.sliding if k >= j)

    def before_pass(self) -> None:
        """Called before each training pass. A pass may be run twice, so what changes between passes changes here."""

    # ---- Reading: from tokens to features

    def read_levels(self, x: Tensor, layout: ChunkLayout, state: BlockState) -> tuple[LevelFeatures, BlockState]:
        """The feature of each level for x (B, T, D), normalised, where it changes; and the state after the chunk.

        Of a node level the first row is for the last node before the chunk.
        """
        if self.credit == "detached":
            x = x.detach()
        return self.read_weighted(x, self.weights(x), layout, state)

    def read_weighted(
        self, x: Tensor, weights: Weights, layout: ChunkLayout, state: BlockState
    ) -> tuple[LevelFeatures, BlockState]:
        """As `read_levels`, with the weights of the tokens."""
        features, rings = self.read_sliding(x, weights, layout, state.rings)
        nodes, blocks = self.read_nodes(x, weights, layout, state.blocks)
        features |= nodes
        state = state._replace(rings=rings, blocks=blocks)
        if layout.segments is not None:
            keep = None if weights.log_keep is None else weights.log_keep[..., : len(self.by_rule)]
            found, segments = self.read_segments(
                x, self.by_rule, weights.segments, keep, layout.segments, layout.clock, state.segments
            )
            features |= found
            state = state._replace(segments=segments)
        return LevelFeatures(features), state

    def weights(self, x: Tensor) -> Weights:
        """How much each of the tokens x (B, T, D) counts, between exp(-3) and exp(3)."""
        bounded = SALIENCE_RANGE * torch.tanh(accumulator(self.salience(x)) / SALIENCE_RANGE)
        return Weights(*bounded.exp().split(self.weighted, -1))

    def weigh(self, parts: list[Tensor], weights: Tensor) -> Tensor:
        """Parts (B, T, C) side by side, each times its weight and followed by the weight less 1."""
        pairs = zip(map(accumulator, parts), weights.split(1, -1), strict=True)
        return torch.cat([piece for part, weight in pairs for piece in (part * weight, weight - 1)], -1)

    def sliding_sums(self) -> int:
        """How many sums the sliding levels have, each with weights of its own."""
        return len(self.sliding)

    def read_sliding(
        self, x: Tensor, weights: Weights, layout: ChunkLayout, rings: tuple[Tensor, ...]
    ) -> tuple[dict[int, Tensor], tuple[Tensor, ...]]:
        """The features of sliding levels (B, T, F R), and their rings after the chunk."""
        if not self.sliding:
            return {}, rings
        read = self.weigh(self.through_bottlenecks(x, self.sliding), weights.sliding)
        channels = [self.ranks[k] + self.counted for k in self.sliding]
        return self.compare_sliding(read, channels, layout, rings, x.dtype)

    def compare_sliding(
        self,
        read: Tensor,
        channels: Sequence[int] | None,
        layout: ChunkLayout,
        rings: tuple[Tensor, ...],
        dtype: torch.dtype,
    ) -> tuple[dict[int, Tensor], tuple[Tensor, ...]]:
        """As `read_sliding`, from what is summed (B, T, C), the channels of all levels side by side."""
        windows, rings = sliding_windows(read, self.sliding, channels, layout.clock, rings)
        features = {
            k: self.compare(k, now / 2**k, before / 2**k, layout.shares[k], dtype)
            for k, (now, before) in zip(self.sliding, windows, strict=True)
        }
        return features, rings

    def read_nodes(
        self, x: Tensor, weights: Weights, layout: ChunkLayout, blocks: tuple[Tensor, ...]
    ) -> tuple[dict[int, Tensor], tuple[Tensor, ...]]:
        """The features of block and dual levels at their nodes (B, N + 1, F R), and the block tree after the chunk."""
        if not layout.nodes:
            return {}, blocks
        summed = self.weigh([x], weights.nodes)
        tree, blocks = block_sums(summed, layout.nodes, layout.clock, blocks)
        return self.compare_nodes(summed, tree, layout, x.dtype), blocks

    def compare_nodes(
        self, summed: Tensor, tree: list[Tensor], layout: ChunkLayout, dtype: torch.dtype
    ) -> dict[int, Tensor]:
        """The features that are read from the block tree, of what is summed at each token (B, T, D + 1)."""
        features = {}
        for k in self.node_levels:
            lag = window_lag(self.alignments[k])
            sums = self.project(k, node_windows(tree, layout.nodes, k, self.alignments[k], layout.clock), dtype)
            features[k] = self.compare(k, sums[:, lag:], sums[:, :-lag], layout.shares[k], dtype)
        return features

    def read_segments(
        self,
        x: Tensor,
        levels: Sequence[int],
        weights: Tensor,
        log_keep: Tensor | None,
        plan: SegmentPlan,
        clock: Clock,
        state: tuple[Tensor, ...],
    ) -> tuple[dict[int, Tensor], tuple[Tensor, ...]]:
        """The features of semantic levels: the mean of the segment so far, beside the complete ones before it."""
        read = [accumulator(part) for part in self.segment_inputs(x, levels)]
        widths = [part.shape[-1] for part in read]
        counted = [width + 1 for width in widths]  # the sum of weights beside each sum
        pairs = zip(read, weights.split(1, -1), strict=True)
        weighed = torch.cat([piece for part, weight in pairs for piece in (part * weight, weight)], -1)
        if state:
            carried = SegmentState(*state)
        else:
            nothing = weighed.new_zeros(x.shape[0], sum(counted))
            carried = SegmentState(nothing, *(nothing[:, : sum(widths)],) * 2)
        sums = segment_sums(weighed, counted, plan, carried.running, log_keep)
        windows, carried = segment_windows(
            _means(sums, counted), sums, widths, plan, clock, carried, _means(carried.running, counted)
        )
        features = {}
        current, last, earlier = (window.split(widths, -1) for window in windows)
        for s, k in enumerate(levels):
            paired = (plan.complete[..., s] >= 1)[..., None]
            features[k] = self.segment_feature(k, current[s], last[s], earlier[s], paired, x.dtype)
        return features, tuple(carried)

    def segment_inputs(self, x: Tensor, levels: Sequence[int]) -> list[Tensor]:
        """What segments sum of x (B, T, D), for each of some levels."""
        return self.through_bottlenecks(x, levels)

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

    def project(self, level: int, sums: Tensor, dtype: torch.dtype) -> Tensor:
        """Means over the level's width, through its bottleneck: (..., D + 1) → (..., R + 1), the weights staying last.

        Sums of a wide level do not fit into float16; means do.
        """
        means = sums / 2**level
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

    def at_tokens(self, features: dict[int, Tensor], layout: ChunkLayout) -> dict[int, Tensor]:
        """The features of all levels at every token: (B, T, F R) each."""
        found = {}
        for level, feature in sorted(features.items()):
            j = self.node_levels.get(level)
            found[level] = feature if j is None else broadcast(feature, layout.nodes[j], j, layout.clock)
        return found

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
        return dict(zip(self.token_levels, self.up_tokens.weight.split(self.token_widths, 1), strict=True))

    def contributions(self, x: Tensor, features: dict[int, Tensor], layout: ChunkLayout) -> Tensor:
        """The length of what each level adds at each token, output gate included: (B, T, K)."""
        each = self.weighted_levels(x, features, layout)
        return (self.output_gate(x, layout)[..., None] * torch.stack(each, -1)).norm(dim=2)

    def weighted_levels(self, x: Tensor, features: dict[int, Tensor], layout: ChunkLayout) -> list[Tensor]:
        """What each level writes back at each token, as it counts in the sum: (B, T, D) each."""
        return list(self.apart(features, layout, range(len(self.ranks))))


def _means(sums: Tensor, counted: Sequence[int]) -> Tensor:
    """Weighted means from sums with their sums of weights (..., C + S) → (..., C)."""
    parts = [part[..., :-1] / part[..., -1:].clamp(min=1e-6) for part in sums.split(list(counted), -1)]
    return torch.cat(parts, -1)
