"""Phase transport: the difference of two vectors, carried back along the minimal rotation between them.

Dimension letters: D, the width of the vectors (any leading dimensions).
"""

import torch
from torch import Tensor

GUARD = 1e-2


def phase_transport(current: Tensor, previous: Tensor, eps: float = GUARD) -> Tensor:
    """The difference `current - previous`, turned into the frame of `previous` (docs/extras.md).

    With q = current, p = previous and R the minimal rotation that carries q/|q| to p/|p|, this is R (q - p). It is
    computed without cancellation as

        (q - p) + (|p| - |q|) u + |u|^2 p,        u = q/|q| - p/|p|,

    where |p| - |q| = (p - q)·(p + q) / (|p| + |q|). It has the length of q - p, commutes with every orthogonal map and
    with positive scaling, and is regular at the antipode.

    Guard: where the shorter vector is less than `eps` times the longer, the rotation is ill-defined and the plain
    difference is returned; up to `2 * eps` the two forms are blended smoothly.

    Args:
        current: (..., D), any floating dtype; norms must have representable squares (below 1e19 in float32).
        previous: (..., D), broadcast against `current`.
        eps: ratio of norms below which the rotation is dropped; dimensionless.

    Returns:
        (..., D) in the dtype of the inputs. Computed in float32 at least; values and gradients are finite everywhere,
        at zero vectors too.
    """
    dtype = torch.promote_types(current.dtype, previous.dtype)
    working = torch.promote_types(dtype, torch.float32)
    q, p = current.to(working), previous.to(working)

    difference = q - p
    q_squared, p_squared = (q * q).sum(-1, keepdim=True), (p * p).sum(-1, keepdim=True)
    larger, smaller = torch.maximum(q_squared, p_squared), torch.minimum(q_squared, p_squared)
    # Both branches of a `where` are differentiated: where the rotation is dropped, its inputs must be harmless.
    turned = (smaller > eps * eps * larger) & (smaller > torch.finfo(working).tiny)
    q_norm = torch.where(turned, q_squared, 1.0).sqrt()
    p_norm = torch.where(turned, p_squared, 1.0).sqrt()
    product = torch.where(turned, (difference * (q + p)).sum(-1, keepdim=True), 0.0)
    norm_change = -product / (q_norm + p_norm)
    turn = torch.where(turned, q, 0.0) / q_norm - torch.where(turned, p, 0.0) / p_norm
    turn_squared = (turn * turn).sum(-1, keepdim=True)

    ratio = torch.minimum(q_norm, p_norm) / torch.maximum(q_norm, p_norm)
    blend = (ratio / eps - 1.0).clamp(0.0, 1.0)
    weight = torch.where(turned, blend * blend * (3.0 - 2.0 * blend), 0.0)

    along_current = weight * norm_change / q_norm
    along_previous = weight * (turn_squared - norm_change / p_norm)
    return (difference + along_current * q + along_previous * p).to(dtype)
