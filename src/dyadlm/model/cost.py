"""What a part of a model costs: each part says it in its method `cost`, and `dyadlm.accounting` adds them up.

Dimension letters: T time.
"""

from typing import NamedTuple

from dyadlm.ops.segments import TILE


class Cost(NamedTuple):
    """Matrix products over a sequence from a fresh start, and the streaming state of one row."""

    products: int = 0  # multiplications with an addition, forward
    fixed: int = 0  # products that a training step does without, of the two that follow each forward product
    numbers: int = 0  # of the state, floating point
    halves: int = 0  # of the state, floating point of 16 bits
    integers: int = 0  # of the state, 64 bits each
    flags: int = 0  # of the state, a byte each

    def plus(self, *others: "Cost") -> "Cost":
        """The sum of several costs."""
        return Cost(*(sum(parts) for parts in zip(self, *others, strict=True)))


def tile_products(time: int) -> int:
    """Products, for one channel, of sums over segments: a triangular matrix for each tile, then for tiles of tiles."""
    products = 0
    while time > 1:
        size = min(TILE, time)
        time = -(-time // size)
        products += time * size * size
    return products
