"""The time mixing of RWKV-7: a matrix for each head that decays, forgets what is at a key, and stores a value there.

Peng et al. 2025, arXiv 2503.14456, section 4. For each head, with keys and values as columns:

    S[t] = S[t-1] (diag(w) - c (a * c)^T) + v k^T        y[t] = S[t] r[t]

w: decay of each number of a key, above 0.545; c: the normalised key that is forgotten; a: how much. Left out is the
mixing of values between layers, and the feed-forward part is that of the zoo. `recurrence` reads tiles of 16 tokens by
matrix products: inside a tile, what tokens forget of each other solves a triangular system.

Dimension letters: B batch, T tokens, D width, H heads, E = D / H, C tokens of a tile, R rank.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dyadlm.zoo.mixer import Mixer, MixerConfig

TILE = 16  # 0.545 to its power is 6e-5, by which float32 can divide
DECAY = 0.606531  # exp(-1/2): a decay is exp of minus at most this
PARTS = ("r", "w", "k", "v", "a", "g")
State = tuple[Tensor, Tensor]  # the last token (B, 1, D), and S (B, H, E, E)


def recurrence(decay: Tensor, r: Tensor, k: Tensor, v: Tensor, c: Tensor, a: Tensor, state: Tensor) -> State:
    """y (B, H, T, E) and the state (B, H, E, E) after it. decay: logarithm of w; all (B, H, T, E)."""
    read = []
    for log_w, r_, k_, v_, c_, a_ in zip(*(part.split(TILE, 2) for part in (decay, r, k, v, c, a)), strict=True):
        total = log_w.cumsum(2)
        kept, before = total.exp(), (total - log_w).exp()  # since the tile began, this token included, and not
        forget, reads = -c_ * before, r_ * kept
        stored, undone = k_ / kept, a_ * c_ / kept
        own = (forget @ undone.transpose(-1, -2)).tril(-1)
        known = forget @ state.transpose(-1, -2) + (forget @ stored.transpose(-1, -2)).tril(-1) @ v_
        unit = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
        removed = torch.linalg.solve_triangular(unit - own, known, upper=False, unitriangular=True)
        read.append(
            reads @ state.transpose(-1, -2)
            + (reads @ undone.transpose(-1, -2)).tril() @ removed
            + (reads @ stored.transpose(-1, -2)).tril() @ v_
        )
        state = state + removed.transpose(-1, -2) @ undone + v_.transpose(-1, -2) @ stored
        state = state * kept[:, :, -1:]
    return torch.cat(read, 2), state


class TimeMixing(Mixer):
    """rank: R of the maps that make decays, rates and gates."""

    keeps_state: ClassVar[bool] = True

    def __init__(self, config: MixerConfig, rank: int = 16, **options: Any):
        super().__init__(config, **options)
        width = self.width
        self.shift = nn.Parameter(torch.empty(len(PARTS), width))  # share of the token before
        self.maps = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in ("r", "k", "v")})
        self.decay, self.rate = (
            nn.Sequential(nn.Linear(width, rank, bias=False), between, nn.Linear(rank, width))
            for between in (nn.Tanh(), nn.Identity())
        )
        self.gate = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Sigmoid(), nn.Linear(rank, width, bias=False))
        self.key_scales = nn.Parameter(torch.empty(3, width))  # of c, of k by a, and of the token itself
        for scales in (self.shift, self.key_scales):  # vectors that stand in one matrix
            scales._no_weight_decay = True  # type: ignore[attr-defined]
        self.norm = nn.GroupNorm(self.heads, width, eps=64e-5)
        self.out = nn.Linear(width, width, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Decays from fast to slow over the width, as the paper sets them; half of the token before."""
        self.shift.fill_(0.5)
        self.key_scales.copy_(torch.tensor([0.85, 1.0, 0.0], device=self.shift.device)[:, None].expand(3, self.width))
        share = torch.linspace(0, 1, self.width, device=self.shift.device)
        bias: Any = self.decay[2].bias
        bias.copy_(-6 + 6 * share**0.85)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        last = x.new_zeros(len(x), 1, self.width) if state is None else state[0]
        matrix = x.new_zeros(len(x), self.heads, *[self.width // self.heads] * 2) if state is None else state[1]
        change = torch.cat([last, x], 1)[:, :-1] - x
        mixed = {name: x + change * share for name, share in zip(PARTS, self.shift, strict=True)}
        r, k, v = (self.maps[name](mixed[name]) for name in ("r", "k", "v"))
        decay = -DECAY * torch.sigmoid(self.decay(mixed["w"]))
        a = torch.sigmoid(self.rate(mixed["a"]))
        gate = self.gate(mixed["g"])
        c = normalize(self.split((k * self.key_scales[0]).float()), dim=-1)
        k = k * (1 + (a - 1) * self.key_scales[1])
        split = self.split
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse for products of many decays
            of_keys = split(decay.float()), split(r.float()), split(k.float()), split(v.float())
            read, matrix = recurrence(*of_keys, c, split(a.float()), matrix)
        flat = self.norm(read.transpose(1, 2).flatten(2).flatten(0, 1)).view_as(x)
        own = split(r * k * self.key_scales[2]).sum(-1, keepdim=True) * split(v)
        return self.out((flat + own.transpose(1, 2).flatten(2)) * gate), (x[:, -1:], matrix)
