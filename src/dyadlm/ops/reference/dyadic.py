"""Phase transport and the dyadic pyramid as slow loops in float64.

Dimension letters: B batch, T time, D width, K levels. Level k has windows of w = 2^k tokens.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dyadlm.ops.transport import GUARD


def phase_transport(current: Tensor, previous: Tensor, eps: float = GUARD) -> Tensor:
    """R (q - p) with the minimal rotation R as a matrix: I + G + G^2 / (1 + cos), G the turn of their plane.

    Args:
        current, previous: (N, D) float64.

    Returns:
        (N, D) float64, differentiable. At the antipode, where the matrix is singular, the limit (|q| + |p|) p/|p|.
    """
    rows = []
    for q, p in zip(current.double(), previous.double(), strict=True):
        plain = q - p
        shorter, longer = sorted((q.norm(), p.norm()), key=lambda norm: norm.item())
        if shorter.item() <= eps * longer.item():
            rows.append(plain)
            continue
        blend = (shorter / longer / eps - 1.0).clamp(0.0, 1.0)
        weight = blend * blend * (3.0 - 2.0 * blend)
        q_hat, p_hat = q / q.norm(), p / p.norm()
        cosine = q_hat @ p_hat
        if 1.0 + cosine.item() < 1e-13:
            carried = (q.norm() + p.norm()) * p_hat
        else:
            plane = torch.outer(p_hat, q_hat) - torch.outer(q_hat, p_hat)
            rotation = torch.eye(len(q), dtype=torch.float64) + plane + plane @ plane / (1.0 + cosine)
            carried = rotation @ plain
        rows.append(plain + weight * (carried - plain))
    return torch.stack(rows)


def windows_at(index: int, level: int, alignment: str) -> tuple[range, range]:
    """The token indices, within a document, of the current and the previous window of a level at token `index`.

    Windows can reach before the document (negative indices): those tokens do not exist. An empty range is a window
    that no completed block fills yet.
    """
    width = 2**level
    seen = index + 1
    if alignment == "sliding":
        return range(seen - width, seen), range(seen - 2 * width, seen - width)
    if alignment == "dual":
        end = seen - seen % (width // 2)
    elif alignment == "block":
        end = seen - seen % width
    else:  # prefix: the running part of the current block against the last complete block
        start = index - index % width
        return range(start, seen), range(start - width, start)
    return range(end - width, end), range(end - 2 * width, end - width)


def centroid(document: Tensor, window: range, width: int, early: str, running: bool) -> tuple[Tensor, bool]:
    """The mean over a window of one document (T, D), by the rule `early` for what lies before the document.

    Returns the mean (D,) and whether the window is complete. `running` marks the growing window of `prefix`, which is
    always the mean of what it holds.
    """
    inside = [document[i] for i in window if i >= 0]
    complete = len(inside) == width or (running and bool(inside))
    total = torch.stack(inside).sum(0) if inside else torch.zeros_like(document[0])
    if running or early == "partial":
        return total / max(len(inside), 1), complete
    if early == "mask" and not complete:
        return torch.zeros_like(total), False
    return total / width, complete


def pyramid(x: Tensor, alignments: Sequence[str], early: str = "zero") -> tuple[Tensor, Tensor, Tensor]:
    """Current and previous centroid of every level at every token of one document, straight from the definition.

    Args:
        x: (T, D) float64, one document from its first token.
        alignments: one of sliding | block | dual | prefix per level.

    Returns:
        current (T, K, D), previous (T, K, D), and paired (T, K): True where both windows are complete.
    """
    currents, previouses, paireds = [], [], []
    for index in range(x.shape[0]):
        for level, alignment in enumerate(alignments):
            width = 2**level
            current_window, previous_window = windows_at(index, level, alignment)
            current, current_complete = centroid(x, current_window, width, early, running=alignment == "prefix")
            previous, previous_complete = centroid(x, previous_window, width, early, running=False)
            currents.append(current)
            previouses.append(previous)
            paireds.append(current_complete and previous_complete)
    shape = (x.shape[0], len(alignments))
    return (
        torch.stack(currents).unflatten(0, shape),
        torch.stack(previouses).unflatten(0, shape),
        torch.tensor(paireds).view(shape),
    )


def stream(signal: Iterator[float], alignments: Sequence[str]) -> Iterator[list[tuple[float, float]]]:
    """The same centroids (early = zero) of a scalar signal, one token at a time, in O(1) amortised work per level.

    Sliding windows are exact sums over a queue (`math.fsum`), so nothing drifts; blocks are summed pairwise.
    """
    depth = len(alignments)
    widest = max([k for k, alignment in enumerate(alignments) if alignment == "sliding"], default=0)
    recent: deque[float] = deque([0.0] * 2 ** (widest + 1))
    blocks = [deque([0.0] * 4, maxlen=4) for _ in range(depth)]  # the last four complete blocks of 2^j tokens
    running = [0.0] * depth  # the sum of the current block; it starts anew with every block
    for index, value in enumerate(signal):
        recent.append(value)
        recent.popleft()
        blocks[0].append(value)
        for j in range(1, depth):
            if (index + 1) % 2**j:
                break
            blocks[j].append(blocks[j - 1][-2] + blocks[j - 1][-1])
        row = []
        tokens = list(recent)
        for level, alignment in enumerate(alignments):
            width = 2**level
            running[level] = value + (running[level] if index % width else 0.0)
            if alignment == "sliding":
                current, previous = math.fsum(tokens[-width:]), math.fsum(tokens[-2 * width : -width])
            elif alignment == "dual":
                half = blocks[level - 1]
                current, previous = half[3] + half[2], half[1] + half[0]
            elif alignment == "block":
                current, previous = blocks[level][3], blocks[level][2]
            else:
                before = blocks[level][2 if (index + 1) % width == 0 else 3]
                current, previous = running[level] * width / (index % width + 1), before
            row.append((current / width, previous / width))
        yield row
