"""A state space with a diagonal matrix: each number of a token goes through a filter that decays and turns.

Gu et al. 2022 (S4D), arXiv 2206.11893. Trained as one long convolution, streamed as a recurrence.

Dimension letters: B batch, T tokens, D width, N complex numbers of the state of each of the D.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import glu

from dyadlm.zoo.mixer import Mixer, MixerConfig


class DiagonalStateSpace(Mixer):
    """S4D-Lin, with the output gate of S4. state: N; the kernel is that of the zero-order hold."""

    keeps_state: ClassVar[bool] = True

    def __init__(self, config: MixerConfig, state: int = 16, **options: Any):
        super().__init__(config, **options)
        self.size = state
        self.log_step = nn.Parameter(torch.empty(self.width))
        self.log_decay = nn.Parameter(torch.empty(self.width, state))
        self.turn = nn.Parameter(torch.empty(self.width, state))
        self.read_real = nn.Parameter(torch.empty(self.width, state))
        self.read_imaginary = nn.Parameter(torch.empty(self.width, state))
        self.skip = nn.Parameter(torch.empty(self.width))
        for weight in (self.log_decay, self.turn, self.read_real, self.read_imaginary):
            weight._no_weight_decay = True  # type: ignore[attr-defined]
        self.out = nn.Linear(self.width, 2 * self.width, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Decays of one half, turns of n pi, and steps between 0.001 and 0.1, as the paper sets them."""
        self.log_step.uniform_(math.log(0.001), math.log(0.1))
        self.log_decay.fill_(math.log(0.5))
        self.turn.copy_(math.pi * torch.arange(self.size, device=self.turn.device).expand_as(self.turn))
        for part in (self.read_real, self.read_imaginary):
            part.normal_(std=math.sqrt(0.5))
        self.skip.fill_(1.0)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        time = x.shape[1]
        poles = torch.complex(-self.log_decay.exp(), self.turn)  # (D, N)
        step = self.log_step.exp()[:, None]
        turned = poles * step  # the logarithm of what one token does to the state
        taken = torch.expm1(turned) / poles  # what the state takes of a token
        read = torch.complex(self.read_real, self.read_imaginary)
        places = torch.arange(time + 1, device=x.device, dtype=x.dtype)
        powers = torch.exp(turned[..., None] * places)  # (D, N, T + 1)
        kernel = 2 * torch.einsum("dn,dnt->dt", read * taken, powers[..., :time]).real
        inputs = x.transpose(1, 2)  # (B, D, T)
        size = 2 * time
        mixed = torch.fft.irfft(torch.fft.rfft(inputs, size) * torch.fft.rfft(kernel, size), size)[..., :time]
        after = torch.einsum("bdt,dnt->bdn", inputs.to(powers.dtype), powers[..., :time].flip(-1)) * taken
        if state is not None:
            mixed = mixed + 2 * torch.einsum("dn,bdn,dnt->bdt", read, state, powers[..., 1:]).real
            after = after + state * powers[..., time]
        mixed = mixed.transpose(1, 2) + self.skip * x
        return glu(self.out(torch.nn.functional.gelu(mixed)), -1), after
