"""Layers of other libraries in the skeleton: S5 and retention.

S5: Smith et al. 2023, arXiv 2208.04933, by s5-pytorch. Retention: Sun et al. 2023, arXiv 2307.08621, by
yet-another-retnet. Dimension letters: B batch, T tokens, D width.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.nn.utils.parametrize import register_parametrization

from dyadlm.zoo.mixer import Mixer, MixerConfig


class AsComplex(nn.Module):
    """Complex numbers kept as two real ones each, which every optimizer can train."""

    def forward(self, real: Tensor, imaginary: Tensor) -> Tensor:
        return torch.complex(real, imaginary)

    def right_inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return value.real.clone(), value.imag.clone()  # each in memory of its own, to be saved


class SimplifiedStateSpace(Mixer):
    """One state space for all D numbers of a token. state: its complex numbers."""

    keeps_state: ClassVar[bool] = True

    def __init__(self, config: MixerConfig, state: int = 64, **options: Any):
        super().__init__(config, **options)
        from s5 import S5

        self.size, self.layer = state, S5(self.width, state)
        space: Any = self.layer.seq
        for name in ("Lambda", "C"):
            register_parametrization(space, name, AsComplex())
        space.B._no_weight_decay = True  # as its authors train it
        self.out = nn.Linear(self.width, self.width, bias=False)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if state is None:
            state = x.new_zeros(len(x), self.size, dtype=torch.complex64)
        with torch.autocast(x.device.type, enabled=False):  # the library's scan takes no bfloat16
            mixed, state = self.layer(x.float(), state=state, return_state=True)
        return self.out(gelu(mixed)), state


class Retention(Mixer):
    """Attention without softmax that fades with distance, in heads that fade at different speeds."""

    keeps_state: ClassVar[bool] = True

    def __init__(self, config: MixerConfig, **options: Any):
        super().__init__(config, **options)
        from yet_another_retnet.retention import MultiScaleRetention

        self.layer = MultiScaleRetention(self.width, self.heads, bias=False)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        begin, before = (0, None) if state is None else (int(state[1][0]), state[0])
        x = x.float()
        with torch.autocast(x.device.type, enabled=False):  # slow decays are 1 in bfloat16
            mixed, after = self.layer.forward_chunkwise(x, x, x, start_idx=begin, prev_state=before)
        return mixed, (after, torch.full((len(x),), begin + x.shape[1], device=x.device))
