"""What tokens find in sums of outer products, window by window.

Dimension letters: T time, K numbers of a key, M of a value, W windows, S segmentations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dyadlm.ops.reference.dyadic import windows_at


def outer_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    alignments: Sequence[str],
    begins: Sequence[Sequence[bool]],
) -> Tensor:
    """One document: query, key (T, K), value (T, M), weights (T,) → (T, W, M).

    begins: of each of S segmentations, where segments begin (T,); the first token begins one. Windows: the current one
    of each geometric level, then the open and the last complete segment of each segmentation.
    """

    def found(t: int, inside: Sequence[int], size: Tensor | float) -> Tensor:
        total = value.new_zeros(value.shape[1])
        for i in inside:
            total = total + weights[i] * (query[t] @ key[i]) * value[i]
        return total / size**0.5

    rows = []
    for t in range(len(query)):
        row = []
        for level, alignment in enumerate(alignments):
            current, _ = windows_at(t, level, alignment)
            row.append(found(t, [i for i in current if i >= 0], float(2**level)))
        for own in begins:
            first = [i for i in range(t + 1) if own[i]]
            segments = [range(first[-1], t + 1)]
            segments.append(range(first[-2], first[-1]) if len(first) > 1 else range(0))
            row += [
                found(t, inside, weights[inside.start : inside.stop].sum() if inside else 1.0) for inside in segments
            ]
        rows.append(torch.stack(row))
    return torch.stack(rows)
