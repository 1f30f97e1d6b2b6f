"""Near tokens by attention in a band, far ones by linear attention: the decomposition of the fast multipole method.

Nguyen et al. 2021 (FMMformer), arXiv 2108.02347, with rotary positions in both parts, which share queries, keys and
values.

Dimension letters: B batch, T tokens, D width, H heads, E = D / H.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dyadlm.zoo.mixer import Mixer, MixerConfig
from dyadlm.zoo.mixers.linear_attention import State as Sums
from dyadlm.zoo.mixers.linear_attention import elu_features, linear_attention
from dyadlm.zoo.mixers.rotary import rotated

State = tuple[Sums, tuple[Tensor, Tensor]]  # of the far part; keys and values of the last tokens of the band


class FastMultipole(Mixer):
    """The band's mean and the far mean, each weighted for each head. band: how many tokens a token sees in it."""

    keeps_state: ClassVar[bool] = True

    def __init__(self, config: MixerConfig, band: int = 32, **options: Any):
        super().__init__(config, **options)
        self.band = band
        self.query = nn.Linear(self.width, self.width, bias=False)
        self.key = nn.Linear(self.width, self.width, bias=False)
        self.value = nn.Linear(self.width, self.width, bias=False)
        self.out = nn.Linear(self.width, self.width, bias=False)
        self.near_weight = nn.Parameter(torch.zeros(self.heads))  # by the logistic function
        self.far_weight = nn.Parameter(torch.zeros(self.heads))

    def reset(self) -> None:
        nn.init.zeros_(self.near_weight)
        nn.init.zeros_(self.far_weight)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        queries, keys, values = (self.split(part(x)) for part in (self.query, self.key, self.value))
        sums, cached = (None, None) if state is None else state
        begin = None if sums is None else sums[2]
        far, sums = linear_attention(elu_features(queries), elu_features(keys), values, sums)
        queries, keys = rotated(queries, begin), rotated(keys, begin)
        if cached is not None:
            keys, values = torch.cat([cached[0], keys], 2), torch.cat([cached[1], values], 2)
        time, seen = queries.shape[2], keys.shape[2]
        distance = torch.arange(seen - time, seen, device=x.device)[:, None] - torch.arange(seen, device=x.device)
        mask = (distance >= 0) & (distance < self.band)
        near = scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        near_weight, far_weight = (w.sigmoid()[:, None, None] for w in (self.near_weight, self.far_weight))
        mixed = (near_weight * near + far_weight * far).transpose(1, 2).flatten(2)
        last = tuple(part[:, :, -self.band :] for part in (keys, values))
        return self.out(mixed), (sums, (last[0], last[1]))
