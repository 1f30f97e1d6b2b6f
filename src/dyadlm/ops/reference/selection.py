"""The selector as slow loops in float64: one token after the other.

Dimension letters: B batch, T time, H heads, K levels.
"""

import math
from itertools import groupby

import torch
from torch import Tensor

from dyadlm.ops.pyramid import Clock


def select(
    scores: Tensor,
    kind: str,
    clock: Clock,
    count: int = 2,
    bias: Tensor | None = None,
    margin: float = 0.0,
    noise: Tensor | None = None,
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights of each level, and what is held after the chunk.

    Args:
        scores: (B, T, H, K).
        kind: dense | topk | entmax | gumbel; the first and the third hold nothing.
        bias: (H, K).
        noise: (B, T, H, K), added to the scores of gumbel.
        held: (B, H, K) bool.

    Returns:
        weights (B, T, H, K) float64, zero at padding, and held (B, H, K) bool.
    """
    batch, _, heads, levels = scores.shape
    weights = torch.zeros(scores.shape, dtype=torch.float64)
    holds = torch.zeros(batch, heads, levels, dtype=torch.bool) if held is None else held.clone()
    for b in range(batch):
        for h in range(heads):
            for t in range(int(clock.length[b])):
                row = [float(score) for score in scores[b, t, h]]
                if kind in ("dense", "entmax"):
                    weights[b, t, h] = torch.tensor(
                        softmax(row) if kind == "dense" else entmax(row), dtype=torch.float64
                    )
                    continue
                evidence = list(row)
                for k in range(levels):
                    evidence[k] += 0.0 if noise is None else float(noise[b, t, h, k])
                    evidence[k] += 0.0 if bias is None else float(bias[h, k])
                    if clock.index[b, t] > 0 and holds[b, h, k]:
                        evidence[k] += margin
                ranked = sorted((-value, k) for k, value in enumerate(evidence))
                chosen = [k for _, k in ranked[: count if kind == "topk" else 1]]
                for k, weight in zip(chosen, softmax([row[k] for k in chosen]), strict=True):
                    weights[b, t, h, k] = weight
                holds[b, h] = torch.tensor([k in chosen for k in range(levels)])
    return weights, holds


def softmax(row: list[float]) -> list[float]:
    """exp(x - max) over its sum."""
    powers = [math.exp(score - max(row)) for score in row]
    return [power / sum(powers) for power in powers]


def entmax(row: list[float]) -> list[float]:
    """max(x / 2 - threshold, 0)^2, the threshold found by bisection: the weights sum to 1."""
    low, high = max(row) / 2 - 1.0, max(row) / 2
    for _ in range(100):
        middle = (low + high) / 2
        if sum(max(score / 2 - middle, 0.0) ** 2 for score in row) > 1.0:
            low = middle
        else:
            high = middle
    return [max(score / 2 - high, 0.0) ** 2 for score in row]


def mean_run_length(weights: Tensor, clock: Clock) -> float:
    """The mean length of the runs of one set of chosen levels in one document: (B, T, H, K) -> tokens."""
    runs = []
    for b in range(weights.shape[0]):
        tokens = range(int(clock.length[b]))
        document = torch.tensor([int(clock.index[b, t]) == 0 for t in tokens]).cumsum(0).tolist()
        for h in range(weights.shape[2]):
            choices = [(document[t], tuple((weights[b, t, h] > 0).tolist())) for t in tokens]
            runs += [len(list(run)) for _, run in groupby(choices)]
    return sum(runs) / len(runs) if runs else 0.0
