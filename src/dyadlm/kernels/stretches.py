"""What the kernels of semantic levels share: a stretch, the block of tokens that one program computes.

A segment may begin before its stretch, or end after it. The program then sums the part outside again, so that no
program waits for another. A kernel of its own has summed the stretches that lie inside of one segment; so the program
reads one sum for each of these, and tokens at the edges of the segment alone.

Dimension letters: T time, R rank.
"""

import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024  # of a tile: rows times rank
OF_A_WARP = 256
STRETCH = 128  # tokens of a program


@triton.jit
def row_of(values, chosen):
    """The one chosen row of (rows, padded)."""
    return tl.sum(tl.where(chosen[:, None], values, 0.0), 0)


@triton.jit
def so_far(last, token, step, there):
    """How many tokens of its segment there are up to a token, 1 where it is not there; from `SegmentPlan.last`."""
    return tl.where(there, token + 3 - tl.load(last + token * step, mask=there, other=0).to(tl.int32), 1)


@triton.jit
def covered(last, first, step, time, stretch):
    """Whether one segment covers the stretch of that many tokens from `first` on."""
    final = first + stretch - 1
    return so_far(last, final, step, final < time) >= stretch


@triton.jit
def whole(first, end, stretch):
    """From where to before where there are whole stretches among the tokens from `first` to before `end`."""
    begin = tl.minimum((first + stretch - 1) // stretch * stretch, end)
    return begin, tl.maximum(end // stretch * stretch, begin)


def tile_of(rank: int) -> dict[str, int]:
    """How many tokens a tile has, the tiles of a stretch, the channels of a tile, and the warps that share it."""
    padded = max(16, triton.next_power_of_2(rank))
    rows = min(64, max(16, ELEMENTS // padded))
    warps = max(4, rows * padded // OF_A_WARP)
    # Two stages of loads: three take more shared memory than small GPUs have.
    return {"rows": rows, "tiles": STRETCH // rows, "padded": padded, "num_warps": warps, "num_stages": 2}


def lying_alike(*plan: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
    """(B, T) tensors with their common strides: copies, where a compiler has laid them out in different ways."""
    parts = list(plan) if len({part.stride() for part in plan}) == 1 else [part.contiguous() for part in plan]
    return parts, parts[0].stride()
