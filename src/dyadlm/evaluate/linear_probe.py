"""What a linear map reads off states: ridge regression in closed form, for numbers and for classes.

A class is read by regression on one-hot labels (Alain and Bengio 2016, arXiv 1610.01644): no optimiser, no seed.

Dimension letters: N examples, M asked for, F numbers of a feature, O numbers of a target, C classes, B windows.
"""

import numpy as np
import torch
from torch import Tensor

PENALTY = 0.01  # of the ridge, for each example, with features of unit variance


def ridge(features: Tensor, targets: Tensor, asked: Tensor, penalty: float = PENALTY) -> Tensor:
    """What an affine map fitted to examples (N, F) with targets (N, O) says of those asked for, (M, F) → (M, O).

    In float64. Features are standardised by the examples; one that does not vary says nothing. The smaller of the two
    systems is solved, of F or of N unknowns: both have the same solution.
    """
    features, targets, asked = features.double(), targets.double(), asked.double()
    mean, spread = features.mean(0), features.std(0, correction=0)
    scale = torch.where(spread > 1e-6, 1 / spread.clamp(min=1e-6), 0.0)
    x, middle = (features - mean) * scale, targets.mean(0)
    count, width = x.shape
    load = penalty * count
    if width <= count:
        gram = x.T @ x + load * torch.eye(width, dtype=x.dtype)
        weights = torch.linalg.solve(gram, x.T @ (targets - middle))
    else:
        gram = x @ x.T + load * torch.eye(count, dtype=x.dtype)
        weights = x.T @ torch.linalg.solve(gram, targets - middle)
    said: Tensor = (asked - mean) * scale @ weights + middle
    return said


def ridge_classes(features: Tensor, labels: Tensor, asked: Tensor, classes: int) -> Tensor:
    """The classes (M,) int64 that ridge regression on examples (N, F) with labels (N,) int64 gives those asked for,
    (M, F)."""
    return ridge(features, torch.nn.functional.one_hot(labels, classes), asked).argmax(1)


def fitted_on(documents: np.ndarray) -> Tensor:
    """Which windows probes are fitted on, (B,) bool, of windows of documents (B,) int64: those of the first three
    quarters of the documents; of fewer than four documents, the first three quarters of the windows."""
    named = np.unique(documents)
    if len(named) < 4:
        return torch.arange(len(documents)) < 3 * len(documents) // 4
    return torch.from_numpy(documents < named[3 * len(named) // 4])
