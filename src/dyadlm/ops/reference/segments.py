"""Segments that begin anywhere, as a plain loop over the tokens of one row.

Dimension letters: T time, C channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """What each token sees of one segmentation."""

    current: Tensor  # (T, C) the weighted mean of its own segment up to it
    last: Tensor  # (T, C) of the last complete segment of its document; zero if there is none
    earlier: Tensor  # (T, C) of the one before that
    begins: list[bool]  # whether it begins a segment
    length: list[int]  # tokens of its own segment up to it
    complete: list[int]  # segments of its document complete before its own


def segments(
    x: Tensor,
    begins: Sequence[bool],
    starts: Sequence[bool],
    longest: int,
    *,
    weights: Tensor | None = None,
    keep: Tensor | None = None,
) -> Segments:
    """One segmentation over one row of documents, token by token.

    Args:
        x: (T, C).
        begins: whether each token begins a segment; one that starts a document always does.
        starts: whether each token starts a document.
        longest: segments are cut after so many tokens.
        weights: (T,) how much each token counts; None: all alike.
        keep: (T,) what is kept of the weights of a segment's earlier tokens when this one is added; None: all.
    """
    nothing = torch.zeros_like(x[0])
    complete: list[Tensor] = []
    tokens: list[Tensor] = []
    counts: list[Tensor] = []
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    begun, length, number = [], [], []
    for t, token in enumerate(x):
        first = t == 0 or starts[t]
        here = first or begins[t] or len(tokens) == longest
        if first:
            complete = []
        elif here:
            complete.append(_mean(tokens, counts))
        if here:
            tokens, counts = [], []
        if keep is not None:
            counts = [count * keep[t] for count in counts]
        tokens.append(token)
        counts.append(token.new_ones(()) if weights is None else weights[t])
        last, earlier = [nothing, nothing, *complete][:-3:-1]
        rows.append((_mean(tokens, counts), last, earlier))
        begun.append(here)
        length.append(len(tokens))
        number.append(len(complete))
    current, last, earlier = (torch.stack(column) for column in zip(*rows, strict=True))
    return Segments(current, last, earlier, begun, length, number)


def _mean(tokens: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
    total = torch.stack(list(counts))
    return (total[:, None] * torch.stack(list(tokens))).sum(0) / total.sum()
