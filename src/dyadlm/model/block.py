"""Residual block: levels and slots, then SwiGLU.

Dimension letters: B batch, T time, D width, H heads, K levels.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from dyadlm.model.cache import BlockState
from dyadlm.model.configuration import DyadConfig
from dyadlm.model.cost import Cost
from dyadlm.model.layout import ChunkLayout
from dyadlm.model.levels import LevelFeatures
from dyadlm.model.slots import IdentitySlots
from dyadlm.model.tower import Tower
from dyadlm.model.variants import variant_of
from dyadlm.ops.clock import Clock
from dyadlm.ops.contexts import Contexts
from dyadlm.ops.slots import SlotLookup


class SwiGLU(nn.Module):
    """The feed-forward part of a block (Shazeer 2020): down(silu(gate x) * up x)."""

    def __init__(self, config: DyadConfig):
        super().__init__()
        assert config.intermediate_size is not None
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def initialize(self) -> None:
        """It adds nothing at first."""
        init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class BlockAux(NamedTuple):
    """Auxiliary outputs of a block; None where it has no such part."""

    routes: Tensor | None  # (B, T, H, K)
    boundary: Tensor | None  # (B, T) bool
    cost: Tensor | None  # scalar, for the loss


class BlockInputs(NamedTuple):
    """What all blocks read of a chunk, besides their hidden state."""

    identity: Tensor  # (B, T, D), written by no block
    layout: ChunkLayout
    contexts: Contexts | None  # what slots are addressed by
    plan: SlotLookup | None  # what is read from slots, if the tokens alone say so
    features: LevelFeatures | None  # the features of the levels, if one tower reads for all blocks
    keep: bool  # whether the state after the chunk is wanted


class DyadBlock(GradientCheckpointingLayer):
    """Tower and slots, then SwiGLU, each reading the normalised hidden state beside the identity channel."""

    def __init__(self, config: DyadConfig, index: int):
        super().__init__()
        self.tower_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.tower_identity = nn.Parameter(torch.empty(config.hidden_size))
        self.tower = variant_of(Tower, config)(config, reads=config.tower == "layer" or index == 0)
        self.build_slots(config, index)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp_identity = nn.Parameter(torch.empty(config.hidden_size))
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def build_slots(self, config: DyadConfig, index: int) -> None:
        """The slots of block `index`, if it has any."""
        has_slots = bool(config.slot_contexts) and index in (config.slot_layers or ())
        self.slots = variant_of(IdentitySlots, config)(config) if has_slots else None

    def initialize(self) -> None:
        """Both gains of the identity channel start at 0.1. Parts without parameters of their own, which transformers
        does not initialise, are initialised here too."""
        for part in self.modules():
            own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
            initialize: Any = getattr(part, "initialize", None)
            if initialize is not None and not own:
                initialize()
        init.constant_(self.tower_identity, 0.1)
        init.constant_(self.mlp_identity, 0.1)

    def cost(self, time: int) -> Cost:
        """Levels, slots and SwiGLU over T tokens."""
        cost = self.tower.cost(time).plus(Cost(3 * time * self.mlp.down.in_features * self.mlp.down.out_features))
        return cost if self.slots is None else cost.plus(self.slots.cost(time))

    def forward(self, hidden: Tensor, inputs: BlockInputs, state: BlockState) -> tuple[Tensor, BlockState, BlockAux]:
        """hidden (B, T, D) → hidden (B, T, D), the state after the chunk, and auxiliary outputs."""
        identity, clock = inputs.identity, inputs.layout.clock
        read, state = self.tower_input(hidden, identity, clock, state)
        past, state, aux = self.levels_and_slots(read, inputs, state)
        hidden = hidden + self.dropout(past)
        read, state = self.mlp_input(hidden, identity, clock, state)
        return hidden + self.dropout(self.mlp(read)), state, aux

    def tower_input(
        self, hidden: Tensor, identity: Tensor, clock: Clock, state: BlockState
    ) -> tuple[Tensor, BlockState]:
        """What tower and slots read, (B, T, D), of hidden and identity (B, T, D); and the state after it."""
        return self.tower_norm(hidden) + self.tower_identity * identity, state

    def mlp_input(self, hidden: Tensor, identity: Tensor, clock: Clock, state: BlockState) -> tuple[Tensor, BlockState]:
        """The same of the SwiGLU."""
        return self.mlp_norm(hidden) + self.mlp_identity * identity, state

    def levels_and_slots(
        self, read: Tensor, inputs: BlockInputs, state: BlockState
    ) -> tuple[Tensor, BlockState, BlockAux]:
        """The sum of levels and slots: read (B, T, D) → (B, T, D).

        What slots recall is exact, so the output gate does not scale it.
        """
        found = inputs.features
        if found is None:
            found, state = self.tower.read_levels(read, inputs.layout, state)
        mixed, routes, state = self.mix_levels(read, found.features, inputs.layout, state)
        past, costs = self.tower.output_gate(read, inputs.layout) * mixed, [found.cost]
        if self.slots is not None:
            recalled, slots, cost = self.slots(
                read, inputs.contexts, inputs.layout.clock, inputs.plan, state.slots, inputs.keep
            )
            past, state = past + recalled, state._replace(slots=slots)
            costs.append(cost)
        given = [cost for cost in costs if cost is not None]
        return past, state, BlockAux(routes, found.boundary, torch.stack(given).sum() if given else None)

    def mix_levels(
        self, read: Tensor, features: dict[int, Tensor], layout: ChunkLayout, state: BlockState
    ) -> tuple[Tensor, Tensor | None, BlockState]:
        """What the levels write back together (B, T, D), the routes of a selector, and the state."""
        mixed, routes, held = self.tower.choose(read, features, layout, state.held)
        return mixed, routes, state._replace(held=held)
