"""Long convolutions between gates: Hyena of order 2.

Poli et al. 2023, arXiv 2302.10866. The filter is made by a small network from the distance, and has one value for each
distance up to the length that the model is trained at; HyenaDNA is the same operator at longer lengths.

Dimension letters: B batch, T tokens, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dyadlm.zoo.mixer import Mixer, MixerConfig

FREQUENCIES, FILTER_WIDTH = 8, 32


class Hyena(Mixer):
    """out(first * filter(second * value)), each of the three behind a convolution over three tokens."""

    def __init__(self, config: MixerConfig, **options: Any):
        super().__init__(config, **options)
        self.inputs = nn.Linear(self.width, 3 * self.width, bias=False)
        self.short = nn.Conv1d(3 * self.width, 3 * self.width, 3, groups=3 * self.width, padding=2, bias=False)
        self.filter_in = nn.Linear(2 * FREQUENCIES + 1, FILTER_WIDTH)
        self.filter_out = nn.Linear(FILTER_WIDTH, self.width, bias=False)
        self.decay = nn.Parameter(torch.empty(self.width))
        self.skip = nn.Parameter(torch.empty(self.width))
        self.out = nn.Linear(self.width, self.width, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Filters that fade within 1 to 1 / 50 of the length, and convolutions that begin as the token itself."""
        self.decay.copy_(torch.linspace(1.0, 50.0, self.width, device=self.decay.device).log())
        self.skip.fill_(1.0)
        self.short.weight.zero_()
        self.short.weight[:, :, -1] = 1.0
        for linear in (self.filter_in, self.filter_out):
            nn.init.xavier_uniform_(linear.weight)
            linear._is_hf_initialized = True  # type: ignore[assignment]

    def filter(self, time: int) -> Tensor:
        """(D, T): what a token adds to the one that stands so far behind it."""
        distance = torch.arange(time, device=self.decay.device, dtype=self.decay.dtype) / self.length
        angles = 2 * torch.pi * distance[:, None] * torch.arange(1, FREQUENCIES + 1, device=distance.device)
        features = torch.cat([distance[:, None], angles.sin(), angles.cos()], 1)
        values = self.filter_out(torch.sin(self.filter_in(features)))
        return (values * torch.exp(-distance[:, None] * self.decay.exp())).T

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        time = x.shape[1]
        mixed = self.short(self.inputs(x).transpose(1, 2))[..., :time]
        first, second, value = mixed.chunk(3, 1)
        inputs, size = second * value, 2 * time
        spectrum = torch.fft.rfft(inputs, size) * torch.fft.rfft(self.filter(time), size)
        read = torch.fft.irfft(spectrum, size)[..., :time] + self.skip[:, None] * inputs
        return self.out((first * read).transpose(1, 2)), None
