"""The feature tower of one block: what every level of the pyramid says at every token.

Each level reads the tokens through its own low-rank bottleneck, compares its current window with the one before, and
writes back through an up-projection. Pooling and projecting commute, so whichever is cheaper comes first:

- token levels (sliding, prefix) change at every token: project, then pool;
- node levels (block, dual) change every 2^j tokens: pool, then project and write back at the nodes alone. Coarse nodes
  hand what they say down to finer ones, so that all node levels together cost less than one token level.

Dimension letters: B batch, T time, N nodes, D width, R rank, K levels, F parts of a feature.
"""

import math

import torch
from torch import Tensor, nn

from dyadlm.model.cache import TowerState
from dyadlm.model.configuration import DyadConfig
from dyadlm.ops.pyramid import (
    Clock,
    Nodes,
    block_tree,
    broadcast,
    granularity,
    hand_down,
    node_columns,
    running_sums,
    share,
    sliding_windows,
)
from dyadlm.ops.transport import phase_transport


def ages(clock: Clock, config: DyadConfig) -> Tensor:
    """How far each token is past the last node of each node or prefix level, as an angle: (B or 1, T, 2 levels)."""
    levels = [granularity(k, a) for k, a in enumerate(config.alignments) if a != "sliding"]
    index = clock.index[:1] if clock.fresh else clock.index
    period = 2 ** torch.tensor(levels, device=index.device)
    angle = (index[..., None] + 1) % period * (2 * math.pi / period)
    return torch.cat([angle.sin(), angle.cos()], -1)


class Tower(nn.Module):
    """Levels → bottlenecks → features → gated up-projection, over one state."""

    def __init__(self, config: DyadConfig):
        super().__init__()
        self.config = config
        width, parts = config.hidden_size, len(config.feature_parts)
        self.alignments, self.ranks = config.alignments, config.ranks
        self.in_model_space = config.transport_space == "model"
        self.sliding = [k for k, a in enumerate(self.alignments) if a == "sliding"]
        self.prefix = [k for k, a in enumerate(self.alignments) if a == "prefix"]
        self.token_levels = sorted(self.sliding + self.prefix)
        self.node_levels = {k: granularity(k, a) for k, a in enumerate(self.alignments) if a in ("block", "dual")}
        self.tree_depth = max([*self.node_levels.values(), *self.prefix], default=-1)

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

    def forward(self, x: Tensor, clock: Clock, ages: Tensor, state: TowerState) -> tuple[Tensor, TowerState]:
        """x (B, T, D), normalised → (B, T, D) and the state after the chunk."""
        features, tree, state = self.features(x, clock, state)
        mixed = self.mix(features, tree, clock)
        return self.open(x, ages) * mixed, state

    def open(self, x: Tensor, ages: Tensor) -> Tensor:
        """The gate (B, T, D): how much of what the levels say is let through."""
        gate = self.gate(x)
        if self.age is not None:
            gate = gate + self.age(ages.to(x.dtype))
        return nn.functional.silu(gate)

    def features(self, x: Tensor, clock: Clock, state: TowerState) -> tuple[dict[int, Tensor], list[Nodes], TowerState]:
        """What each level says, where it changes.

        Returns:
            Features by level: (B, T, F R) of token levels, (B, N + 1, F R) of node levels, the first for the last node
            before the chunk; the block tree; the new state.
        """
        features: dict[int, Tensor] = {}
        rings, blocks = state.rings, state.blocks
        tree: list[Nodes] = []
        early, seen = self.config.early, clock.index + 1

        if self.sliding:
            ranks = None if self.in_model_space else [self.ranks[k] for k in self.sliding]
            read = x if ranks is None else torch.cat([self.bottlenecks[k](x) for k in self.sliding], -1)
            windows, rings = sliding_windows(read, self.sliding, ranks, clock, rings)
            for k, (now, before) in zip(self.sliding, windows, strict=True):
                width = 2**k
                if early == "zero":  # the sums already leave out what lies before the document
                    now, before = now / width, before / width
                else:
                    now = now * share(seen.clamp(max=width), width, width, early, now.dtype)
                    before = before * share((seen - width).clamp(0, width), width, width, early, now.dtype)
                features[k] = self.feature(k, now, before, (seen >= 2 * width)[..., None], x.dtype)

        if self.tree_depth >= 0:
            tree, blocks = block_tree(x, self.tree_depth, clock, blocks)
        if self.prefix:
            for k, (now, before) in running_sums(x, tree, self.prefix, clock).items():
                now = self.project(k, now / (clock.index % 2**k + 1)[..., None], x.dtype)
                complete = (clock.index // 2**k).clamp(max=1)
                before = self.project(k, before * share(complete, 1, 2**k, early, before.dtype), x.dtype)
                features[k] = self.feature(k, now, before, complete[..., None] == 1, x.dtype)
        for k in self.node_levels:
            columns = node_columns(tree, k, self.alignments[k], early, clock.fresh)
            sums = self.project(k, columns.sums, x.dtype)
            now = sums[:, columns.lag :] * columns.current_share
            before = sums[:, : -columns.lag] * columns.previous_share
            features[k] = self.feature(k, now, before, columns.paired, x.dtype)
        return features, tree, TowerState(rings, blocks)

    def project(self, level: int, pooled: Tensor, dtype: torch.dtype) -> Tensor:
        """Through the level's bottleneck, unless transport is taken before it: (..., D) → (..., R or D)."""
        return pooled if self.in_model_space else self.bottlenecks[level](pooled.to(dtype))

    def feature(self, level: int, current: Tensor, previous: Tensor, paired: Tensor, dtype: torch.dtype) -> Tensor:
        """What a level says of two centroids (..., R or D), as `level_feature` tells → (..., F R)."""
        parts = []
        for name in self.config.feature_parts:
            if name == "current":
                part = current
            elif name == "previous":
                part = previous
            else:
                part = phase_transport(current, previous) if name == "transport" else current - previous
                if self.config.early == "mask":  # a change needs two windows; absent is absent, not a change from zero
                    part = part * paired
            parts.append(part.to(dtype))
        if self.in_model_space:
            return self.bottlenecks[level](torch.stack(parts, -2)).flatten(-2)
        return torch.cat(parts, -1)

    def mix(self, features: dict[int, Tensor], tree: list[Nodes], clock: Clock) -> Tensor:
        """The sum of what all levels write back at each token, before the gate: (B, T, D)."""
        mixed = None
        if self.up_tokens is not None:
            mixed = self.up_tokens(torch.cat([features[k] for k in self.token_levels], -1))
        coarse, said = -1, None
        for j in sorted(set(self.node_levels.values()), reverse=True):
            here = sum(self.up_nodes[str(k)](features[k]) for k, at in self.node_levels.items() if at == j)
            said = here if said is None else here + hand_down(said, tree[coarse], tree[j], coarse, j)
            coarse = j
        if said is not None:
            seen = broadcast(said, tree[coarse], coarse, clock)
            mixed = seen if mixed is None else mixed + seen
        assert mixed is not None, "a tower has at least one level"
        return mixed

    def contributions(self, x: Tensor, clock: Clock, ages: Tensor) -> Tensor:
        """The length of what each level adds at each token, gate included, from a fresh start: (B, T, K)."""
        features, tree, _ = self.features(x, clock, TowerState())
        gate = self.open(x, ages)
        lengths = []
        for level in range(len(self.ranks)):
            alone = {k: f if k == level else torch.zeros_like(f) for k, f in features.items()}
            lengths.append((gate * self.mix(alone, tree, clock)).norm(dim=-1))
        return torch.stack(lengths, -1)
