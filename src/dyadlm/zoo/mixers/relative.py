"""Attention with a learned bias for each distance and head, and no other positions.

Raffel et al. 2020 (T5), arXiv 1910.10683: near distances have a bias each, farther ones share one by the logarithm of
the distance, and all beyond 128 the last. With `memories` every token also reads that many learned keys and values, a
memory that does not change (Sukhbaatar et al. 2019, arXiv 1907.01470).

Dimension letters: B batch, T tokens, D width, H heads, E = D / H,
P memories.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dyadlm.zoo.mixer import Mixer, MixerConfig

BUCKETS, FARTHEST = 32, 128
State = tuple[Tensor, Tensor]  # keys and values of all tokens so far, (B, H, T, E) each


def bucket(distance: Tensor) -> Tensor:
    """Which bias each distance >= 0 has, int64: one of its own below half of `BUCKETS`, then by the logarithm."""
    near = BUCKETS // 2
    share = torch.log(distance.clamp(min=near) / near) / math.log(FARTHEST / near)
    return torch.where(distance < near, distance, (near + share * (BUCKETS - near)).long().clamp(max=BUCKETS - 1))


class RelativeAttention(Mixer):
    """Causal attention; the bias of a distance is added to its score. memories: P."""

    keeps_state: ClassVar[bool] = True

    def __init__(self, config: MixerConfig, memories: int = 0, **options: Any):
        super().__init__(config, **options)
        self.query = nn.Linear(self.width, self.width, bias=False)
        self.key = nn.Linear(self.width, self.width, bias=False)
        self.value = nn.Linear(self.width, self.width, bias=False)
        self.out = nn.Linear(self.width, self.width, bias=False)
        self.bias = nn.Parameter(torch.zeros(BUCKETS, self.heads))
        kept = torch.empty(2, self.heads, memories, self.width // self.heads)
        self.memories = nn.Parameter(kept) if memories else None
        self.reset()

    def reset(self) -> None:
        nn.init.zeros_(self.bias)
        if self.memories is not None:
            nn.init.normal_(self.memories, std=self.memories.shape[-1] ** -0.5)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        queries, keys, values = (self.split(part(x)) for part in (self.query, self.key, self.value))
        if state is not None:
            keys, values = torch.cat([state[0], keys], 2), torch.cat([state[1], values], 2)
        time, seen = queries.shape[2], keys.shape[2]
        distance = torch.arange(seen - time, seen, device=x.device)[:, None] - torch.arange(seen, device=x.device)
        bias = self.bias[bucket(distance.clamp(min=0))].permute(2, 0, 1)
        mask = bias.masked_fill(distance < 0, float("-inf")).to(x.dtype)
        state = keys, values
        if self.memories is not None:
            keys, values = (
                torch.cat([memory.expand(len(x), -1, -1, -1), part], 2)
                for memory, part in zip(self.memories, state, strict=True)
            )
            mask = nn.functional.pad(mask, (self.memories.shape[2], 0))
        read = scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.out(read.transpose(1, 2).flatten(2)), state
