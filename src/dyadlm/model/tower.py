"""The feature tower of one block: what every level of the pyramid says at every token.

Each level reads the tokens through its own low-rank bottleneck, compares its current window with the one before, and
writes back through an up-projection. Pooling and projecting commute, so whichever is cheaper comes first:

- token levels (sliding, prefix) change at every token: project, then pool;
- node levels (block, dual) change every 2^j tokens: pool, then project and write back at the nodes alone. Coarse nodes
  hand what they say down to finer ones, so that all node levels together cost less than one token level.

Dimension letters: B batch, T time, N nodes, D width, R rank, K levels, F parts of a feature.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dyadlm.model.cache import TowerState
from dyadlm.model.configuration import DyadConfig
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
from dyadlm.ops.transport import phase_transport


class Timing(NamedTuple):
    """Where everything stands in a chunk: worked out once, the same for every block."""

    clock: Clock
    nodes: list[Nodes]  # of each level of the block tree
    shares: list[Shares]  # of each level of the pyramid
    ages: Tensor  # (B or 1, T, 2 levels): how far past its last node each level that is not sliding is, as an angle


def chunk_timing(clock: Clock, config: DyadConfig, dtype: torch.dtype) -> Timing:
    """The timing of a chunk for a model whose hidden states have `dtype`."""
    alignments = config.alignments
    changes = [granularity(k, a) for k, a in enumerate(alignments) if a != "sliding"]
    nodes = tree_nodes(clock, max(changes, default=-1))
    sums = torch.promote_types(dtype, torch.float32)
    shares = [level_shares(k, a, clock, nodes, config.early, sums) for k, a in enumerate(alignments)]
    index = clock.index[:1] if clock.fresh else clock.index
    period = 2 ** torch.tensor(changes, device=index.device, dtype=torch.int64)
    angle = (index[..., None] + 1) % period * (2 * math.pi / period)
    return Timing(clock, nodes, shares, torch.cat([angle.sin(), angle.cos()], -1).to(dtype))


class Tower(nn.Module):
    """Levels → bottlenecks → features → gated up-projection, over one state."""

    def __init__(self, config: DyadConfig):
        super().__init__()
        self.config = config
        width, parts = config.hidden_size, len(config.feature_parts)
        self.alignments, self.ranks = config.alignments, config.ranks
        self.feature_parts = config.feature_parts
        self.in_model_space = config.transport_space == "model"
        self.needs_pairs = config.early == "mask"
        self.sliding = [k for k, a in enumerate(self.alignments) if a == "sliding"]
        self.prefix = [k for k, a in enumerate(self.alignments) if a == "prefix"]
        self.token_levels = sorted(self.sliding + self.prefix)
        self.node_levels = {k: granularity(k, a) for k, a in enumerate(self.alignments) if a in ("block", "dual")}

        self.bottlenecks = nn.ModuleList(nn.Linear(width, rank, bias=False) for rank in self.ranks)
        token_width = sum(parts * self.ranks[k] for k in self.token_levels)
        self.up_tokens = nn.Linear(token_width, width, bias=False) if self.token_levels else None
        self.up_nodes = nn.ModuleDict(
            {str(k): nn.Linear(parts * self.ranks[k], width, bias=False) for k in self.node_levels}
        )
        self.gate = nn.Linear(width, width, bias=False)
        aged = len(self.alignments) - len(self.sliding)
        self.age = nn.Linear(2 * aged, width, bias=False) if aged else None

    def ups(self) -> list[nn.Linear]:
        """Every up-projection: what the tower writes goes through one of them."""
        nodes = [self.up_nodes[str(k)] for k in self.node_levels]
        return [up for up in (self.up_tokens, *nodes) if isinstance(up, nn.Linear)]

    def forward(self, x: Tensor, timing: Timing, state: TowerState) -> tuple[Tensor, TowerState]:
        """x (B, T, D), normalised → (B, T, D) and the state after the chunk."""
        features, state = self.features(x, timing, state)
        return self.open(x, timing) * self.mix(features, timing), state

    def open(self, x: Tensor, timing: Timing) -> Tensor:
        """The gate (B, T, D): how much of what the levels say is let through."""
        gate = self.gate(x)
        if self.age is not None:
            gate = gate + self.age(timing.ages)
        return nn.functional.silu(gate)

    def features(self, x: Tensor, timing: Timing, state: TowerState) -> tuple[dict[int, Tensor], TowerState]:
        """What each level says, where it changes.

        Returns:
            Features by level: (B, T, F R) of token levels, (B, N + 1, F R) of node levels, the first for the last node
            before the chunk; and the new state.
        """
        clock, nodes, shares, _ = timing
        features: dict[int, Tensor] = {}
        rings = state.rings
        if self.sliding:
            ranks = None if self.in_model_space else [self.ranks[k] for k in self.sliding]
            read = x if ranks is None else torch.cat([self.bottlenecks[k](x) for k in self.sliding], -1)
            windows, rings = sliding_windows(read, self.sliding, ranks, clock, rings)
            for k, (now, before) in zip(self.sliding, windows, strict=True):
                features[k] = self.feature(k, now / 2**k, before / 2**k, shares[k], x.dtype)

        tree, blocks = block_sums(x, nodes, clock, state.blocks)
        if self.prefix:
            for k, (now, before) in running_sums(x, tree, nodes, self.prefix, clock).items():
                now, before = self.project(k, now, x.dtype), self.project(k, before, x.dtype)
                features[k] = self.feature(k, now, before, shares[k], x.dtype)
        for k in self.node_levels:
            lag = window_lag(self.alignments[k])
            sums = self.project(k, node_windows(tree, nodes, k, self.alignments[k], clock), x.dtype)
            features[k] = self.feature(k, sums[:, lag:], sums[:, :-lag], shares[k], x.dtype)
        return features, TowerState(rings, blocks)

    def project(self, level: int, sums: Tensor, dtype: torch.dtype) -> Tensor:
        """Means over the level's width, through its bottleneck unless transport comes first: (..., D) → (..., R or D).

        Sums of a wide level do not fit into float16; means do.
        """
        means = sums / 2**level
        return means if self.in_model_space else accumulator(self.bottlenecks[level](means.to(dtype)))

    def feature(self, level: int, current: Tensor, previous: Tensor, shares: Shares, dtype: torch.dtype) -> Tensor:
        """What a level says of two windows, given as means (..., R or D), as `level_feature` tells → (..., F R)."""
        if shares.current is not None:
            current = current * shares.current
        if shares.previous is not None:
            previous = previous * shares.previous
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
                    part = part * shares.paired
            parts.append(part)
        if self.in_model_space:
            return self.bottlenecks[level](torch.stack(parts, -2).to(dtype)).flatten(-2)
        return torch.cat(parts, -1).to(dtype)

    def mix(self, features: dict[int, Tensor], timing: Timing) -> Tensor:
        """The sum of what all levels write back at each token, before the gate: (B, T, D)."""
        clock, nodes = timing.clock, timing.nodes
        coarse, said = 0, None  # what all node levels so far say, at the nodes of granularity 2^coarse
        for k in sorted(self.node_levels, key=lambda level: self.node_levels[level], reverse=True):
            here, j = self.up_nodes[str(k)](features[k]), self.node_levels[k]
            if said is not None:
                here = here + (said if j == coarse else hand_down(said, nodes[coarse], nodes[j], coarse - j, clock))
            coarse, said = j, here
        mixed = None if said is None else broadcast(said, nodes[coarse], coarse, clock)
        if self.up_tokens is not None:
            near = self.up_tokens(torch.cat([features[k] for k in self.token_levels], -1))
            mixed = near if mixed is None else near + mixed
        assert mixed is not None, "a tower has at least one level"
        return mixed

    def contributions(self, x: Tensor, timing: Timing) -> Tensor:
        """The length of what each level adds at each token, gate included, from a fresh start: (B, T, K)."""
        features, _ = self.features(x, timing, TowerState())
        gate = self.open(x, timing)
        lengths = []
        for level in range(len(self.ranks)):
            alone = {k: f if k == level else torch.zeros_like(f) for k, f in features.items()}
            lengths.append((gate * self.mix(alone, timing)).norm(dim=-1))
        return torch.stack(lengths, -1)
