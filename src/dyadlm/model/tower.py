"""The levels of one block: the feature of every level of the pyramid at every token.

Each level reads the tokens through its own low-rank bottleneck, compares its current window with the one before, and
writes back through an up-projection. Pooling and projecting commute, so whichever is cheaper comes first:

- token levels (sliding, prefix, semantic) change at every token: project, then pool;
- node levels (block, dual) change every 2^j tokens: pool, then project and write back at the nodes alone. Coarse nodes
  pass their sum to finer ones, so that all node levels together cost less than one token level.

With `salience` a token counts in a centroid by a learned weight s. We accumulate sums of s x and sums of (s - 1), so
missing positions count as zero vectors of weight 1.

The levels' contributions are added up, or weighed per token and head by a selector.

Dimension letters: B batch, T time, N nodes, D width, R rank, K levels, S semantic levels, F parts of a feature,
H heads.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from dyadlm.model.boundaries import LEARNED, BoundaryRouter
from dyadlm.model.cache import BlockState
from dyadlm.model.configuration import DyadConfig
from dyadlm.model.selector import Selector
from dyadlm.ops.pyramid import (
    Clock,
    Nodes,
    Shares,
    accumulator,
    block_sums,
    broadcast,
    granularity,
    hand_down,
    level_shares,
    node_windows,
    running_sums,
    sliding_windows,
    tree_nodes,
    window_lag,
)
from dyadlm.ops.segments import SegmentCount, SegmentPlan, SegmentState, segment_plan, segment_sums, segment_windows
from dyadlm.ops.selection import straight_through
from dyadlm.ops.transport import phase_transport

SALIENCE_RANGE = 3.0  # weights between exp(-3) and exp(3)


class ChunkLayout(NamedTuple):
    """Where everything stands in a chunk: worked out once, the same for every block."""

    clock: Clock
    nodes: list[Nodes]  # of each level of the block tree
    shares: list[Shares]  # of each level of the pyramid
    segments: SegmentPlan | None  # of the semantic levels that follow rules
    ages: Tensor  # (B or 1, T, ages): how far past its last node, or into its segment, each level is
    progress: Tensor  # 0-dim: how far training is, from 0 to 1


def chunk_layout(
    clock: Clock, segments: SegmentPlan | None, progress: Tensor, config: DyadConfig, dtype: torch.dtype
) -> ChunkLayout:
    """The timing of a chunk for a model whose hidden states have `dtype`."""
    alignments = config.alignments
    changes = [granularity(k, a) for k, a in enumerate(alignments) if a != "sliding"]
    nodes = tree_nodes(clock, max(changes, default=-1))
    sums = torch.promote_types(dtype, torch.float32)
    shares = [level_shares(k, a, clock, nodes, config.early, sums) for k, a in enumerate(alignments)]
    index = clock.index[:1] if clock.fresh else clock.index
    period = 2 ** torch.tensor(changes, device=index.device, dtype=torch.int64)
    angle = (index[..., None] + 1) % period * (2 * math.pi / period)
    ages = torch.cat([angle.sin(), angle.cos()], -1)
    if segments is not None:
        into = segments.length.to(ages.dtype).log2() / math.log2(config.longest_segment)
        ages = torch.cat([ages.expand(into.shape[0], -1, -1), into], -1)
    return ChunkLayout(clock, nodes, shares, segments, ages.to(dtype), progress)


class LevelFeatures(NamedTuple):
    """The features of all levels at a chunk, and how segments were chosen."""

    features: dict[int, Tensor]  # (B, T, F R) of token levels, (B, N + 1, F R) of node levels
    boundary: Tensor | None  # (B, T) bool: where the learned boundary begins segments
    cost: Tensor | None  # scalar: how far the learned boundary is from its rate


class Tower(nn.Module):
    """Levels → bottlenecks → features → gated up-projection, with one state.

    reads: whether it has bottlenecks of its own; if not, it writes back the features of another tower.
    credit: where the gradient of the features goes; their values are the same. joint: to the bottlenecks and the
        tokens that were read; reverse: to the tokens alone; detached: to neither, so that no token is shaped by later
        ones through the tower. How tokens are weighed, forgotten and cut into learned segments is learned in each case.
    """

    credit: Literal["joint", "reverse", "detached"] = "joint"

    def __init__(self, config: DyadConfig, reads: bool = True):
        super().__init__()
        self.config = config
        width, parts = config.hidden_size, len(config.feature_parts)
        self.alignments, self.ranks = config.alignments, config.ranks
        self.feature_parts = config.feature_parts
        self.in_model_space = config.transport_space == "model"
        self.needs_pairs = config.early == "mask"
        self.sliding = [k for k, a in enumerate(self.alignments) if a == "sliding"]
        self.prefix = [k for k, a in enumerate(self.alignments) if a == "prefix"]
        self.node_levels = {k: granularity(k, a) for k, a in enumerate(self.alignments) if a in ("block", "dual")}
        partitions = {len(self.alignments) + s: name for s, name in enumerate(config.semantic_levels or ())}
        self.by_rule = [k for k, name in partitions.items() if name != LEARNED]
        self.learned = [k for k, name in partitions.items() if name == LEARNED]
        self.token_levels = sorted([*self.sliding, *self.prefix, *partitions])

        sizes = {
            k: parts * rank + (config.semantic_memory - 1) * rank * (k in partitions)
            for k, rank in enumerate(self.ranks)
        }
        self.up_tokens = None
        if self.token_levels:
            self.up_tokens = nn.Linear(sum(sizes[k] for k in self.token_levels), width, bias=False)
        self.up_nodes = nn.ModuleDict({str(k): nn.Linear(sizes[k], width, bias=False) for k in self.node_levels})
        self.token_widths = [sizes[k] for k in self.token_levels]
        self.gate = nn.Linear(width, width, bias=False)
        aged = 2 * (len(self.alignments) - len(self.sliding)) + len(self.by_rule)
        self.age = nn.Linear(aged, width, bias=False) if aged else None
        self.selector = Selector(config) if config.selector != "none" else None
        self.salience = self.forgetting = self.router = None
        if not reads:
            return
        self.bottlenecks = nn.ModuleList(nn.Linear(width, rank, bias=False) for rank in self.ranks)
        # Each level that sums alone has weights of its own; what is summed once for several levels shares them.
        alone = min(len(self.sliding), 1) if self.in_model_space else len(self.sliding)
        self.weighted = [alone, int(len(self.alignments) > len(self.sliding)), len(self.by_rule), len(self.learned)]
        if config.salience:
            self.salience = nn.Linear(width, sum(self.weighted))
        if config.forgetting and partitions:
            self.forgetting = nn.Linear(width, len(partitions))
        if self.learned:
            self.router = BoundaryRouter(width, max(self.ranks), config.boundary_rate)

    def initialize(self) -> None:
        """The levels add nothing at first, ages do not count, all tokens count alike, and segments forget slowly."""
        for linear in (*self.ups(), self.age, self.salience, self.forgetting):
            if linear is not None:
                init.zeros_(linear.weight)
        if self.salience is not None:
            init.zeros_(self.salience.bias)
        if self.forgetting is not None:
            init.constant_(self.forgetting.bias, -5.0)

    def borrow(self, owner: "Tower") -> None:
        """Read through the very bottlenecks of another tower, and have none: they are named and saved there alone."""
        del self.bottlenecks
        object.__setattr__(self, "bottlenecks", owner.bottlenecks)  # not as a part, which `self.bottlenecks =` makes it

    def ups(self) -> list[nn.Linear]:
        """Every up-projection: what the tower writes goes through one of them."""
        nodes = [self.up_nodes[str(k)] for k in self.node_levels]
        return [up for up in (self.up_tokens, *nodes) if isinstance(up, nn.Linear)]

    def output_gate(self, x: Tensor, timing: ChunkLayout) -> Tensor:
        """The output gate (B, T, D), by which the sum of the levels is multiplied."""
        gate = self.gate(x)
        if self.age is not None:
            gate = gate + self.age(timing.ages)
        return nn.functional.silu(gate)

    def read_levels(self, x: Tensor, timing: ChunkLayout, state: BlockState) -> tuple[LevelFeatures, BlockState]:
        """The feature of each level for x (B, T, D), normalised, where it changes; and the state after the chunk.

        Of a node level the first row is for the last node before the chunk.
        """
        clock, nodes, shares = timing.clock, timing.nodes, timing.shares
        features: dict[int, Tensor] = {}
        rings = state.rings
        if self.credit == "detached":
            x = x.detach()
        alone, together, by_rule, by_router = self.weights(x)
        if self.sliding:
            if self.in_model_space:
                ranks, read = None, weigh([x], alone)
            else:
                read = weigh(self.through_bottlenecks(x, self.sliding), alone)
                ranks = [self.ranks[k] + (alone is not None) for k in self.sliding]
            windows, rings = sliding_windows(read, self.sliding, ranks, clock, rings)
            for k, (now, before) in zip(self.sliding, windows, strict=True):
                features[k] = self.compare(k, now / 2**k, before / 2**k, shares[k], x.dtype)

        summed = weigh([x], together)
        tree, blocks = block_sums(summed, nodes, clock, state.blocks)
        if self.prefix:
            for k, (now, before) in running_sums(summed, tree, nodes, self.prefix, clock).items():
                now, before = self.project(k, now, x.dtype), self.project(k, before, x.dtype)
                features[k] = self.compare(k, now, before, shares[k], x.dtype)
        for k in self.node_levels:
            lag = window_lag(self.alignments[k])
            sums = self.project(k, node_windows(tree, nodes, k, self.alignments[k], clock), x.dtype)
            features[k] = self.compare(k, sums[:, lag:], sums[:, :-lag], shares[k], x.dtype)

        state = state._replace(rings=rings, blocks=blocks)
        boundary = cost = log_keep = None
        if self.forgetting is not None:
            log_keep = -nn.functional.softplus(accumulator(self.forgetting(x)))
        if timing.segments is not None:
            kept = None if log_keep is None else log_keep[..., : len(self.by_rule)]
            found, segments = self.segments(x, self.by_rule, by_rule, kept, timing.segments, clock, state.segments)
            features |= found
            state = state._replace(segments=segments)
        if self.router is not None:
            kept = None if log_keep is None else log_keep[..., len(self.by_rule) :]
            key, *carried = state.learned or (None,)
            boundary, sure, cost, key = self.router(x, clock, key)
            count = SegmentCount(*carried[:2]) if carried else None
            plan, count = segment_plan(boundary[..., None], clock, self.config.longest_segment, count)
            found, segments = self.segments(x, self.learned, by_router, kept, plan, clock, tuple(carried[2:]))
            features |= {k: feature * straight_through(sure)[..., None] for k, feature in found.items()}
            boundary = plan.begins[..., 0]
            state = state._replace(learned=(key, *count, *segments))
        return LevelFeatures(features, boundary, cost), state

    def weights(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """How much each token counts where a level sums alone, where levels share a sum, in segments by rule and by
        router; None: all alike, or nothing to count in."""
        if self.salience is None:
            return (None,) * len(self.weighted)
        bounded = SALIENCE_RANGE * torch.tanh(accumulator(self.salience(x)) / SALIENCE_RANGE)
        return tuple(part if part.shape[-1] else None for part in bounded.exp().split(self.weighted, -1))

    def segments(
        self,
        x: Tensor,
        levels: Sequence[int],
        weights: Tensor | None,
        log_keep: Tensor | None,
        plan: SegmentPlan,
        clock: Clock,
        state: tuple[Tensor, ...],
    ) -> tuple[dict[int, Tensor], tuple[Tensor, ...]]:
        """The features of semantic levels: the mean of the segment so far, beside the complete ones before it."""
        read = [x] * len(levels) if self.in_model_space else self.through_bottlenecks(x, levels)
        read = [accumulator(part) for part in read]
        if weights is None:
            weights = read[0].new_ones(1, 1, 1).expand(*x.shape[:2], len(read))
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
            older = [earlier[s]] * (self.config.semantic_memory - 1)
            features[k] = self.feature(k, current[s], last[s], paired, x.dtype, older)
        return features, tuple(carried)

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
        """Means over the level's width, through its bottleneck unless transport comes first: (..., D) → (..., R or D).

        Sums of a wide level do not fit into float16; means do. What weights there are stay beside them.
        """
        means = sums / 2**level
        if self.in_model_space:
            return means
        if self.salience is None:
            return accumulator(self.through_bottleneck(means.to(dtype), level))
        read = accumulator(self.through_bottleneck(means[..., :-1].to(dtype), level))
        return torch.cat([read, means[..., -1:]], -1)

    def compare(self, level: int, current: Tensor, previous: Tensor, shares: Shares, dtype: torch.dtype) -> Tensor:
        """The feature of a level from the means over two windows of its width (..., R or D) → (..., F R)."""
        current, previous = self.centroid(current, shares.current), self.centroid(previous, shares.previous)
        return self.feature(level, current, previous, shares.paired, dtype)

    def centroid(self, mean: Tensor, share: Tensor | None) -> Tensor:
        """A window's centroid from the mean over its width; with salience, the weights' mean less 1 is the last row."""
        if self.salience is None:
            return mean if share is None else mean * share
        mean, excess = mean[..., :-1], mean[..., -1:]
        return mean / (1 + excess) if share is None else mean * share / (1 + excess * share)

    def feature(
        self,
        level: int,
        current: Tensor,
        previous: Tensor,
        paired: Tensor,
        dtype: torch.dtype,
        older: Sequence[Tensor] = (),
    ) -> Tensor:
        """The feature of a level from two centroids (..., R or D) by `level_feature`, and older ones → (..., F R)."""
        parts = []
        for name in self.feature_parts:
            if name == "current":
                part = current
            elif name == "previous":
                part = previous
            elif name == "product":
                part = current * previous
            else:
                part = phase_transport(current, previous) if name == "transport" else current - previous
                if self.needs_pairs:  # a change needs two windows; absent is absent, not a change from zero
                    part = part * paired
            parts.append(part)
        parts += older
        if self.in_model_space:
            return self.through_bottleneck(torch.stack(parts, -2).to(dtype), level).flatten(-2)
        return torch.cat(parts, -1).to(dtype)

    def mix(self, features: dict[int, Tensor], timing: ChunkLayout) -> Tensor:
        """The sum of what all levels write back at each token, before the gate: (B, T, D)."""
        clock, nodes = timing.clock, timing.nodes
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

    def at_tokens(self, features: dict[int, Tensor], timing: ChunkLayout) -> dict[int, Tensor]:
        """The features of all levels at every token: (B, T, F R) each."""
        found = {}
        for level, feature in sorted(features.items()):
            j = self.node_levels.get(level)
            found[level] = feature if j is None else broadcast(feature, timing.nodes[j], j, timing.clock)
        return found

    def apart(self, features: dict[int, Tensor], timing: ChunkLayout, levels: Sequence[int]) -> Iterator[Tensor]:
        """What each of some levels writes back at each token, before the gate: (B, T, D) each."""
        weights = self.token_weights()
        for k in levels:
            if k in weights:
                yield nn.functional.linear(features[k], weights[k])
            else:
                j = self.node_levels[k]
                yield broadcast(self.up_nodes[str(k)](features[k]), timing.nodes[j], j, timing.clock)

    def token_weights(self) -> dict[int, Tensor]:
        """By token level, the weight (D, F R) through which it writes back."""
        if self.up_tokens is None:
            return {}
        return dict(zip(self.token_levels, self.up_tokens.weight.split(self.token_widths, 1), strict=True))

    def imagine(self, x: Tensor, current: Tensor, last: Tensor, previous: Tensor, routes: Tensor | None) -> Tensor:
        """The sum of the levels, output gate included, if at every token the levels held these nodes.

        Args:
            x: (B, T, D), what it reads. current, last, previous: (B, T, all ranks), the newest first.
            routes: (B, T, H, K) the choice that holds, of a tower that selects.

        Returns:
            (B, T, D). The gate knows no ages here.
        """
        weights = self.token_weights() | {k: cast(nn.Linear, self.up_nodes[str(k)]).weight for k in self.node_levels}
        known = torch.ones_like(x[..., :1], dtype=torch.bool)
        written = torch.zeros_like(x)
        nodes = (part.split(self.ranks, -1) for part in (current, last, previous))
        for k, (now, before, earlier) in enumerate(zip(*nodes, strict=True)):
            older = [earlier] * (self.config.semantic_memory - 1) * (k >= len(self.alignments))
            update = nn.functional.linear(self.feature(k, now, before, known, x.dtype, older), weights[k])
            written = written + (update if routes is None else by_head(update, routes[..., k] * routes.shape[-1]))
        return nn.functional.silu(self.gate(x)) * written

    def choose(
        self, x: Tensor, features: dict[int, Tensor], timing: ChunkLayout, held: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """What the levels write back together (B, T, D), the routes (B, T, H, K), and the choice that holds.

        An even choice weighs every level 1: then the sum is that without a selector.
        """
        if self.selector is None:
            return self.mix(features, timing), None, ()
        routes, held = self.selector(x, timing.clock, timing.progress, held)
        levels = routes.shape[-1]
        chosen = list(range(levels))
        if x.shape[1] == 1 and not torch.is_grad_enabled():  # over many tokens, nearly every level is chosen somewhere
            chosen = routes.amax((0, 1, 2)).nonzero().flatten().tolist()
        weights = (routes * levels).transpose(-1, -2)
        written = torch.zeros_like(x)
        for level, update in zip(chosen, self.apart(features, timing, chosen), strict=True):
            written = written + by_head(update, weights[:, :, level])
        return written, routes, held

    def contributions(self, x: Tensor, features: dict[int, Tensor], timing: ChunkLayout) -> Tensor:
        """The length of what each level adds at each token, gate included: (B, T, K)."""
        gate = self.output_gate(x, timing)
        each = list(self.apart(features, timing, range(len(self.ranks))))
        if self.selector is not None:
            routes, _ = self.selector(x, timing.clock, timing.progress, ())
            each = [by_head(update, routes[..., level] * len(each)) for level, update in enumerate(each)]
        return (gate[..., None] * torch.stack(each, -1)).norm(dim=2)


def by_head(x: Tensor, weights: Tensor) -> Tensor:
    """x (..., D), the channels h, h + H, h + 2 H … of each head h times its weight (..., H)."""
    return (x.unflatten(-1, (-1, weights.shape[-1])) * weights[..., None, :]).flatten(-2)


def weigh(parts: list[Tensor], weights: Tensor | None) -> Tensor:
    """Parts (B, T, C) side by side, each times its weight and followed by the weight less 1; as they are if None."""
    if weights is None:
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    pairs = zip(map(accumulator, parts), weights.split(1, -1), strict=True)
    return torch.cat([piece for part, weight in pairs for piece in (part * weight, weight - 1)], -1)


def _means(sums: Tensor, counted: Sequence[int]) -> Tensor:
    """Weighted means from sums with their sums of weights (..., C + S) → (..., C)."""
    parts = [part[..., :-1] / part[..., -1:].clamp(min=1e-6) for part in sums.split(list(counted), -1)]
    return torch.cat(parts, -1)
