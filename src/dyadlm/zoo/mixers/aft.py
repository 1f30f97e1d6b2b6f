"""An attention-free transformer: each number of a token is a mean of the values so far, weighted by exp of keys.

Zhai et al. 2021, arXiv 2105.14103, section 3: AFT-simple, the form without weights for pairs of positions; it has a
state of constant size. Dimension letters: B batch, T tokens, D width.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dyadlm.zoo.mixer import Mixer, MixerConfig

State = tuple[Tensor, Tensor]  # sums of weighted values and of weights, (B, D) each
LARGEST = 15.0  # of a key, so that sums of exp stay in range without a look at later keys


class AttentionFree(Mixer):
    """sigmoid(query) times the weighted mean of all values up to the token."""

    keeps_state: ClassVar[bool] = True

    def __init__(self, config: MixerConfig, **options: Any):
        super().__init__(config, **options)
        self.query = nn.Linear(self.width, self.width, bias=False)
        self.key = nn.Linear(self.width, self.width, bias=False)
        self.value = nn.Linear(self.width, self.width, bias=False)
        self.out = nn.Linear(self.width, self.width, bias=False)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        weights = torch.exp(self.key(x).clamp(-LARGEST, LARGEST))
        weighted, total = (weights * self.value(x)).cumsum(1), weights.cumsum(1)
        if state is not None:
            weighted, total = weighted + state[0][:, None], total + state[1][:, None]
        read = torch.sigmoid(self.query(x)) * (weighted / total)
        return self.out(read), (weighted[:, -1], total[:, -1])
