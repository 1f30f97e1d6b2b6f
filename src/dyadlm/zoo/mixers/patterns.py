"""Attention that sees a pattern of earlier tokens: strided, dilated, Longformer, BigBird, blocks.

Strided: Child et al. 2019, arXiv 1904.10509. Dilated and Longformer: Beltagy et al. 2020, arXiv 2004.05150. BigBird:
Zaheer et al. 2020, arXiv 2007.14062. Blocks: Qiu et al. 2019, arXiv 1911.02972. The libraries' own classes of these
models see later tokens, so the patterns stand here as masks on one causal layer. The mask takes T² numbers: what is
compared is what a model learns from a pattern, not its speed.

Dimension letters: B batch, T tokens, D width, H heads.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dyadlm.errors import UserError
from dyadlm.zoo.mixer import Mixer, MixerConfig
from dyadlm.zoo.mixers.rotary import rotated

PATTERNS = ("strided", "dilated", "longformer", "bigbird", "block")


def pattern(name: str, time: int, window: int, device: torch.device | None = None) -> Tensor:
    """Which earlier tokens a token sees, (T, T) bool; the token itself and those before it alone.

    near: the last `window`. strided: the same, and every `window`-th. dilated: every second of the last 2 `window`.
    longformer: the last `window`, and the first 4. bigbird: the same, and about 4 at random places, the same for every
    text. block: those of its block of `window` and of the block before.
    """
    token = torch.arange(time, device=device)
    distance = token[:, None] - token
    near = distance < window
    if name == "near":
        seen = near
    elif name == "strided":
        seen = near | (distance % window == 0)
    elif name == "dilated":
        seen = (distance < 2 * window) & (distance % 2 == 0)
    elif name == "block":
        seen = token[:, None] // window - token // window <= 1
    else:
        seen = near | (token < 4)
        if name == "bigbird":
            # By a hash of the two places, so that no longer text changes what a token sees.
            mixed = (token[:, None] * 1_000_003 + token * 998_244_353) % 65_537
            seen = seen | (mixed * (token[:, None] + 1) < 4 * 65_537)
    return seen & (distance >= 0)


class PatternAttention(Mixer):
    """Causal attention with rotary positions under one pattern. window: tokens of its near part."""

    def __init__(self, config: MixerConfig, pattern: str = "longformer", window: int = 32, **options: Any):
        super().__init__(config, **options)
        if pattern not in PATTERNS:
            raise UserError(f"There is no pattern {pattern!r}; there are {', '.join(PATTERNS)}.")
        self.pattern, self.window = pattern, window
        self.query = nn.Linear(self.width, self.width, bias=False)
        self.key = nn.Linear(self.width, self.width, bias=False)
        self.value = nn.Linear(self.width, self.width, bias=False)
        self.out = nn.Linear(self.width, self.width, bias=False)

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        queries, keys, values = (self.split(part(x)) for part in (self.query, self.key, self.value))
        queries, keys = rotated(queries), rotated(keys)
        mask = self.mask(x.shape[1], x.device)
        read = scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.out(read.transpose(1, 2).flatten(2)), None

    def mask(self, time: int, device: torch.device | None = None) -> Tensor:
        """What each head sees, (T, T) or (H, T, T) bool. Half of the heads have no dilation and keep the nearest tokens
        (Beltagy et al. 2020, section 3.1)."""
        seen = pattern(self.pattern, time, self.window, device)
        if self.pattern != "dilated":
            return seen
        near = pattern("near", time, self.window, device)
        return torch.stack([near if head < self.heads // 2 else seen for head in range(self.heads)])
