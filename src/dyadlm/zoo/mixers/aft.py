"""An attention-free transformer: each number of a token is a mean of the values so far, weighted by exp of keys.

Zhai et al. 2021, arXiv 2105.14103, section 3: AFT-conv. The key of each of the last tokens is raised by a learned
weight of its distance, one for each head; farther ones have none, so that the state has a constant size.

Dimension letters: B batch, T tokens, D width, H heads, W window.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d

from dyadlm.zoo.mixer import Mixer, MixerConfig

# Sums of weighted values and of weights, (B, 2 D), of all tokens but the last W - 1, and these, (B, W - 1, 2 D).
State = tuple[Tensor, Tensor]
LARGEST = 15.0  # of a key, so that sums of exp stay in range without a look at later keys


class AttentionFree(Mixer):
    """sigmoid(query) times the weighted mean of all values up to the token. window: distances with a weight."""

    keeps_state: ClassVar[bool] = True

    def __init__(self, config: MixerConfig, window: int = 32, **options: Any):
        super().__init__(config, **options)
        self.query = nn.Linear(self.width, self.width, bias=False)
        self.key = nn.Linear(self.width, self.width, bias=False)
        self.value = nn.Linear(self.width, self.width, bias=False)
        self.out = nn.Linear(self.width, self.width, bias=False)
        self.near = nn.Parameter(torch.empty(self.heads, window))
        self.gain = nn.Parameter(torch.empty(self.heads, 1))
        self.bias = nn.Parameter(torch.empty(self.heads, 1))
        self.reset()

    def reset(self) -> None:
        """All distances count alike at first, as in the paper."""
        nn.init.normal_(self.near, std=1e-2)
        nn.init.zeros_(self.gain)
        nn.init.zeros_(self.bias)

    def distance_weights(self) -> Tensor:
        """What is added to the key of each distance, the farthest first: (H, W)."""
        centred = self.near - self.near.mean(-1, keepdim=True)
        return self.gain * centred / self.near.std(-1, keepdim=True) + self.bias

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        weights = torch.exp(self.key(x).clamp(-LARGEST, LARGEST))
        both = torch.cat([weights * self.value(x), weights], -1)
        raised = self.distance_weights().exp().repeat_interleave(self.width // self.heads, 0).repeat(2, 1)
        time, window = both.shape[1], raised.shape[-1]
        if state is None:
            state = both.new_zeros(len(both), both.shape[-1]), both.new_zeros(len(both), window - 1, both.shape[-1])
        last = torch.cat([state[1], both], 1)
        near = conv1d(last.transpose(1, 2), raised[:, None], groups=len(raised)).transpose(1, 2)
        # What has left the window is summed as it leaves, so that nothing is subtracted and weights stay above 0.
        left = torch.cat([state[0][:, None], last[:, :time]], 1).cumsum(1)
        weighted, weight = (left[:, :-1] + near).chunk(2, -1)
        read = torch.sigmoid(self.query(x)) * (weighted / weight)
        return self.out(read), (left[:, -1], last[:, time:])
