"""A gated recurrence whose gate does not read the state, so that it is a scan: minGRU.

Feng et al. 2024, arXiv 2410.01201, whose language models have a convolution over 4 tokens before each recurrence.

Dimension letters: B batch, T tokens, D width, I width of the recurrence.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from dyadlm.zoo.mixer import Mixer, MixerConfig

NEAR = 4  # tokens of the convolution
TILE = 256  # tokens whose logarithms are summed at once: float32 has no room for those of a long text
State = tuple[Tensor, Tensor]  # the last inputs of the convolution (B, NEAR - 1, D), and h (B, I)


class MinGru(Mixer):
    """h[t] = (1 - z[t]) h[t-1] + z[t] g(c[t]), with gates z and candidates c of the last 4 tokens. expand: I / D."""

    keeps_state: ClassVar[bool] = True

    def __init__(self, config: MixerConfig, expand: int = 1, **options: Any):
        super().__init__(config, **options)
        inner = expand * self.width
        self.near = nn.Conv1d(self.width, self.width, NEAR, groups=self.width)
        self.gate = nn.Linear(self.width, inner, bias=False)
        self.candidate = nn.Linear(self.width, inner, bias=False)
        self.out = nn.Linear(inner, self.width, bias=False)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        last = pad(x, (0, 0, NEAR - 1, 0)) if state is None else torch.cat([state[0], x], 1)
        near = self.near(last.transpose(1, 2)).transpose(1, 2)
        hidden = recurrence(self.gate(near), self.candidate(near), None if state is None else state[1])
        return self.out(hidden), (last[:, 1 - NEAR :], hidden[:, -1])


def recurrence(gate: Tensor, candidate: Tensor, before: Tensor | None) -> Tensor:
    """h (B, T, I), float32 or float64. gate, candidate: (B, T, I) before their activations. before: h (B, I) of the
    token before."""
    if gate.dtype == torch.bfloat16:  # too coarse for sums of logarithms
        gate, candidate = gate.float(), candidate.float()
    keep, take = -softplus(gate), -softplus(-gate)  # logarithms of 1 - z and z
    # g(c) = c + 0.5 where c > 0, else sigmoid(c): positive, so that sums can be taken in logarithms.
    value = torch.where(candidate > 0, torch.log(candidate.clamp(min=0) + 0.5), -softplus(-candidate))
    read: list[Tensor] = []
    for kept, taken in zip(keep.split(TILE, 1), (value + take).split(TILE, 1), strict=True):
        total = kept.cumsum(1)
        terms = torch.logcumsumexp(taken - total, 1)
        if before is not None:
            terms = torch.logaddexp(terms, torch.log(before.clamp(min=1e-30))[:, None])
        read.append(torch.exp(total + terms))
        before = read[-1][:, -1]
    return torch.cat(read, 1)
