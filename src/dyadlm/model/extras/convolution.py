"""A short causal convolution before the tower and before the SwiGLU of each block (`mixers` with `convolution`).

What both read at a token is what they would read without it, and beside that a weighted sum of it over the last 4
tokens, one weight for each channel and distance. Convolutions as short help mixers that are linear in the past
(H3, arXiv 2212.14052; Mamba, arXiv 2312.00752; canon layers, arXiv 2512.17351).

Predicted and not yet measured: "mixers" in docs/experiments.md.

What a planner imagines of tokens to come has no convolution.

Dimension letters: B batch, T time, D width, N taps.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from dyadlm.model.block import DyadBlock
from dyadlm.model.cache import BlockState
from dyadlm.model.configuration import DyadConfig
from dyadlm.model.cost import Cost
from dyadlm.ops.clock import Clock
from dyadlm.ops.convolution import short_convolution

TAPS = 4


class ShortConvolution(nn.Module):
    """x + convolution(x), which is x at first."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(TAPS, width))

    def initialize(self) -> None:
        """It adds nothing at first."""
        init.zeros_(self.weight)

    def forward(self, x: Tensor, clock: Clock, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) and the last N - 1 of it (B, N - 1, D) before the chunk, None at the start → the same after."""
        mixed, state = short_convolution(x, self.weight, clock, state)
        return x + mixed.to(x.dtype), state


class Convolved(DyadBlock):
    """A block with both convolutions. Their state is `BlockState.convolved`: first the tower's, then the SwiGLU's."""

    def __init__(self, config: DyadConfig, index: int):
        super().__init__(config, index)
        self.tower_convolution = ShortConvolution(config.hidden_size)
        self.mlp_convolution = ShortConvolution(config.hidden_size)

    def cost(self, time: int) -> Cost:
        """The state; a weight times a token is no matrix product."""
        return super().cost(time).plus(Cost(numbers=2 * (TAPS - 1) * self.tower.config.hidden_size))

    def tower_input(
        self, hidden: Tensor, identity: Tensor, clock: Clock, state: BlockState
    ) -> tuple[Tensor, BlockState]:
        read, state = super().tower_input(hidden, identity, clock, state)
        before, *rest = state.convolved or (None,)
        read, after = self.tower_convolution(read, clock, before)
        return read, state._replace(convolved=(after, *rest))

    def mlp_input(self, hidden: Tensor, identity: Tensor, clock: Clock, state: BlockState) -> tuple[Tensor, BlockState]:
        read, state = super().mlp_input(hidden, identity, clock, state)
        first, *before = state.convolved
        read, after = self.mlp_convolution(read, clock, *before or (None,))
        return read, state._replace(convolved=(first, after))
