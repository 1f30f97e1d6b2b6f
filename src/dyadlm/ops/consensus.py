"""Two opinions on the next token: one says what is allowed, the other what is best among it.

Dimension letters: V vocabulary (any leading dimensions).
"""

import torch
from torch import Tensor

from dyadlm.ops.pyramid import accumulator


def nucleus(log_probabilities: Tensor, mass: float) -> Tensor:
    """The smallest set of likeliest tokens that together reach a mass: (..., V) → (..., V) bool; none for mass 0, and
    for mass 1 all that are possible.

    Of tokens that are equally likely, those of lower number come first.
    """
    if mass >= 1:  # however a sum of them is rounded
        return log_probabilities > -torch.inf
    ordered, order = accumulator(log_probabilities).sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.exp()
    before = probabilities.cumsum(-1) - probabilities
    # What rounding leaves of the sum must not end the set at the first token.
    inside = (before < mass) & (probabilities > 0)
    return torch.zeros_like(inside).scatter(-1, order, inside)


def consensus(engineer: Tensor, artist: Tensor, mass: float, weight: Tensor | float = 1.0) -> Tensor:
    """What engineer and artist agree on.

    Inside the engineer's nucleus p_E p_A^weight, a logarithmic opinion pool (Genest and Zidek 1986,
    doi:10.1214/ss/1177013825), scaled to the nucleus' mass; outside it the engineer's alone. That is a distribution,
    so text has a likelihood under it.

    Args:
        engineer: (..., V) logits. artist: (..., V) logits.
        mass: of the nucleus; 0: the engineer's distribution as it is.
        weight: how far the artist is believed, one number or (...): 0 is the engineer alone, 1 the product of both.

    Returns:
        (..., V) log-probabilities, float32 at least. Where the artist allows nothing of the nucleus, the engineer's.
    """
    alone, opinion = accumulator(engineer).log_softmax(-1), accumulator(artist).log_softmax(-1)
    if not mass:
        return alone
    inside = nucleus(alone, mass)
    weight = torch.as_tensor(weight, dtype=alone.dtype, device=alone.device)[..., None]
    possible = opinion > -torch.inf
    # What the artist excludes is excluded where it is believed at all.
    excluded = torch.where(weight > 0, -torch.inf, 0.0)
    opinion = torch.where(possible, weight * opinion.masked_fill(~possible, 0.0), excluded)
    heard = (inside & (opinion > -torch.inf)).any(-1, keepdim=True)
    allowed = alone.masked_fill(~inside, -torch.inf)
    both = allowed + torch.where(heard, opinion, 0.0)
    scale = allowed.logsumexp(-1, keepdim=True) - both.logsumexp(-1, keepdim=True)
    return torch.where(inside, both + scale, alone)
