"""A gated recurrence whose gate does not read the state, so that it is a scan: minGRU.

Feng et al. 2024, arXiv 2410.01201. Dimension letters: B batch, T tokens, D width.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dyadlm.zoo.mixer import Mixer, MixerConfig


class MinGru(Mixer):
    """h[t] = (1 - z[t]) h[t-1] + z[t] g(c[t]), with gates z and candidates c of the token alone."""

    keeps_state: ClassVar[bool] = True

    def __init__(self, config: MixerConfig, expand: int = 1, **options: Any):
        super().__init__(config, **options)
        inner = expand * self.width
        self.gate = nn.Linear(self.width, inner, bias=False)
        self.candidate = nn.Linear(self.width, inner, bias=False)
        self.out = nn.Linear(inner, self.width, bias=False)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        gate, candidate = self.gate(x), self.candidate(x)
        keep, take = -softplus(gate), -softplus(-gate)  # logarithms of 1 - z and z
        # g(c) = c + 0.5 where c > 0, else sigmoid(c): positive, so that sums can be taken in logarithms.
        value = torch.where(candidate > 0, torch.log(candidate.clamp(min=0) + 0.5), -softplus(-candidate))
        kept = keep.cumsum(1)
        terms = torch.logcumsumexp(value + take - kept, 1)
        if state is not None:
            terms = torch.logaddexp(terms, torch.log(state.clamp(min=1e-30))[:, None])
        hidden = torch.exp(kept + terms)
        return self.out(hidden), hidden[:, -1]
