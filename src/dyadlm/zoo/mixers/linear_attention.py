"""Attention without softmax: queries read a sum of keys times values, whose size does not grow.

Linear transformers: Katharopoulos et al. 2020, arXiv 2006.16236. Performer: Choromanski et al. 2021, arXiv 2009.14794.
Both were published with positions added to the embeddings, which end where training ends. Here features are turned by
rotary positions, as Su et al. 2021 (arXiv 2104.09864, equation 19 and section 4.4) do with both: sums of turned keys do
not grow, and the weights that the mean is divided by stay positive, since they are not turned.

Dimension letters: B batch, T tokens, D width, H heads, E = D / H, F features of a key.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import elu

from dyadlm.zoo.mixer import Mixer, MixerConfig
from dyadlm.zoo.mixers.rotary import rotated

State = tuple[Tensor, Tensor, Tensor]  # sums of turned keys times values (B, H, F, E), of keys (B, H, F); tokens (B,)


LEAST = 1e-4  # of a random feature


def elu_features(x: Tensor) -> Tensor:
    """elu + 1, which is positive."""
    return elu(x) + 1


class LinearAttention(Mixer):
    """Features of queries and keys: elu + 1, which are positive."""

    keeps_state: ClassVar[bool] = True

    def __init__(self, config: MixerConfig, **options: Any):
        super().__init__(config, **options)
        self.query = nn.Linear(self.width, self.width, bias=False)
        self.key = nn.Linear(self.width, self.width, bias=False)
        self.value = nn.Linear(self.width, self.width, bias=False)
        self.out = nn.Linear(self.width, self.width, bias=False)

    def features(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, T, E) each, as positive features (B, H, T, F)."""
        return elu_features(queries), elu_features(keys)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        queries, keys, values = (self.split(part(x)) for part in (self.query, self.key, self.value))
        read, state = linear_attention(*self.features(queries, keys), values, state)
        return self.out(read.transpose(1, 2).flatten(2)), state


class PerformerAttention(LinearAttention):
    """Positive random features of the softmax kernel; they are drawn once and kept with the weights. features: F; 0
    takes E log E, as in the paper (theorem 4)."""

    projection: Tensor

    def __init__(self, config: MixerConfig, features: int = 0, **options: Any):
        super().__init__(config, **options)
        size = self.width // self.heads
        self.register_buffer("projection", torch.empty(self.heads, features or round(size * math.log(size)), size))
        self.reset()

    def reset(self) -> None:
        """Draw rows that are orthogonal to each other, in groups of E, with the lengths of normal vectors."""
        size = self.projection.shape[-1]
        for head in self.projection:
            for begin in range(0, len(head), size):
                square, _ = torch.linalg.qr(torch.randn(size, size, device=head.device))
                rows = square[: len(head) - begin]
                head[begin : begin + size] = (
                    rows * torch.randn(len(rows), size, device=head.device).norm(dim=1)[:, None]
                )

    def features(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        # The largest of a query is taken off, which divides out. Of the keys it would have to be that of a whole text,
        # and later tokens would change earlier ones.
        scores = self.scores(queries)
        of_queries = torch.exp(scores - scores.amax(-1, keepdim=True)) + LEAST
        return of_queries, torch.exp(self.scores(keys).clamp(max=30)) + LEAST

    def scores(self, x: Tensor) -> Tensor:
        """Logarithms of features."""
        x = x * x.shape[-1] ** -0.25
        return x @ self.projection.transpose(-1, -2) - (x**2).sum(-1, keepdim=True) / 2


def linear_attention(queries: Tensor, keys: Tensor, values: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Each query reads the values up to its token, weighted by the product of turned query and key; the sum is divided
    by that of the products without turning.

    queries, keys: (B, H, T, F), positive; values: (B, H, T, E). Returns (B, H, T, E) and the sums after the last token.
    """
    begin = queries.new_zeros(len(queries), dtype=torch.int64) if state is None else state[2]
    turned, turned_keys = rotated(queries, begin), rotated(keys, begin)
    read = (turned @ turned_keys.transpose(-1, -2)).tril() @ values
    weight = (queries @ keys.transpose(-1, -2)).tril().sum(-1)
    sums = turned_keys.transpose(-1, -2) @ values, keys.sum(-2)
    if state is not None:
        read = read + turned @ state[0]
        weight = weight + (queries @ state[1][..., None]).squeeze(-1)
        sums = sums[0] + state[0], sums[1] + state[1]
    return read / weight.clamp(min=1e-6)[..., None], (*sums, begin + queries.shape[2])
