"""The gated delta rule: a memory that forgets, and that stores only what it does not yet know.

    S_t = keep_t * S_{t-1} + strength_t * k_t (v_t - keep_t * S_{t-1}^T k_t)^T,       o_t = S_t^T q_t

(Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464.) The rows that are stored, u_t = strength_t (v_t - ...), depend on
those before them: inside a tile of 32 tokens they solve a triangular system, once for all tiles. The memory goes from
tile to tile.

Dimension letters: B batch, H heads, T time, K numbers of a key, M of a value, N tiles, L tokens of a tile.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from dyadlm.ops.clock import Clock, accumulator

TILE = 32


def gated_delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    strength: Tensor,
    log_keep: Tensor,
    clock: Clock,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What each token recalls, its own entry included, in float32 at least.

    Args:
        query, key: (B, T, H, K), keys of length 1 at most.
        value: (B, T, H, M).
        strength: (B, T, H) between 0 and 1.
        log_keep: (B, T, H) at most 0: the logarithm of what is kept of the memory when t is stored. A document begins
            with an empty memory.
        state: (B, H, K, M) as returned; None for a fresh start.

    Returns:
        (B, T, H, M), and the memory after the chunk.
    """
    # Sums over many tokens, so that what autocast would make of them is too narrow.
    with torch.autocast(query.device.type, enabled=False):
        return _gated_delta(query, key, value, strength, log_keep, clock, state)


def _gated_delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    strength: Tensor,
    log_keep: Tensor,
    clock: Clock,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, time, heads, width = key.shape
    size = min(TILE, time)
    short = -time % size
    first = clock.index == 0
    strength, log_keep = accumulator(strength), accumulator(log_keep)
    if clock.padded:  # what is no token stores nothing and forgets nothing
        real = torch.arange(time, device=key.device) < clock.length[:, None]
        first, strength, log_keep = first & real, strength * real[..., None], log_keep * real[..., None]
    query, key, value = (
        pad(accumulator(part).transpose(1, 2), (0, 0, 0, short)).unflatten(2, (-1, size))
        for part in (query, key, value)
    )  # (B, H, N, L, K or M)
    strength, log_keep = (
        pad(part.transpose(1, 2), (0, short)).unflatten(2, (-1, size)) for part in (strength, log_keep)
    )
    document = pad(first, (0, short)).unflatten(1, (-1, size)).long().cumsum(-1)[:, None]  # (B, 1, N, L)
    # As in `ops.segments`, the logarithms are summed for each pair by itself, so that no document changes another.
    together = (document[..., :, None] == document[..., None, :]).tril()
    between = log_keep[..., None].expand(*log_keep.shape, size).tril(-1).cumsum(-2).exp() * together
    since = (log_keep.cumsum(-1).exp() * (document == 0))[..., None]  # of what was there before the tile
    alike = key @ key.mT * between * strength[..., None]
    both = strength[..., None] * torch.cat([value, since * key], -1)
    stored, known = torch.linalg.solve_triangular(alike, both, upper=False, unitriangular=True).split(
        [value.shape[-1], width], -1
    )
    seen = query @ key.mT * between
    asked, kept = since * query, between[..., -1, :, None] * key
    memory = key.new_zeros(batch, heads, width, value.shape[-1]) if state is None else state
    rows = []
    tiles = (part.unbind(2) for part in (stored, known, asked, seen, kept.mT, since[..., -1:, :]))
    for new, old, asking, sees, keeps, left in zip(*tiles, strict=True):
        entries = new - old @ memory
        rows.append(asking @ memory + sees @ entries)
        memory = left * memory + keeps @ entries
    return torch.stack(rows, 2).flatten(2, 3)[:, :, :time].transpose(1, 2), memory


def gated_delta_products(time: int, key_width: int, value_width: int) -> tuple[int, int]:
    """Products of one head over T tokens, without the triangular systems; and how many of the two for each that a
    training step does without, less those that follow a triangular system."""
    size = min(TILE, time)
    count = -(-time // size)
    across, inside = size * key_width * value_width, size * size * (key_width + value_width)
    products = count * (3 * across + inside + size * size * key_width)
    # The memory at first is fixed, and of the last one nothing is learned.
    return products, 4 * across - count * inside
