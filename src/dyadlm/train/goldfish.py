"""The goldfish loss (Hans et al. 2024, arXiv 2406.10209): of every passage the same targets are never learned.

Dimension letters: T tokens of a window.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dyadlm.data.batches import IGNORED_LABEL, ChangedWindows

CONTEXT = 13
"""Whether a target counts is decided by a hash of so many tokens before it (h in the paper, which found 13 best: with
fewer, common phrases always lose the same word; with more, a passage must be repeated at greater length to lose the
same targets)."""

# The multiplier of the 64-bit linear congruential generator of Knuth's MMIX.
MULTIPLIER = 6364136223846793005
WORD = 2**64


def context_hashes(tokens: np.ndarray) -> np.ndarray:
    """tokens (T,), not negative → uint64 (T,): at t the hash of tokens t - 13 … t - 1, or of those that there are.

    Σ_j (x_{t-j} + 1) · MULTIPLIER^j modulo 2^64, whose bits are then mixed as in SplitMix64 (Steele et al. 2014).
    """
    numbers = np.asarray(tokens).astype(np.uint64) + np.uint64(1)
    mixed = np.zeros(len(numbers), dtype=np.uint64)
    for distance in range(1, CONTEXT + 1):
        mixed[distance:] += numbers[:-distance] * np.uint64(pow(MULTIPLIER, distance, WORD))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class GoldfishWindows(ChangedWindows):
    """The windows of `base`, in which one label in k becomes -100: that of each token before which `context_hashes`
    gives a multiple of k.

    So a passage loses the same labels wherever it stands, from its 14th token on: what the first ones lose depends on
    what stands before it, or if a window begins there, on its beginning.
    """

    def __init__(self, base: Dataset[dict[str, Tensor]], k: int):
        super().__init__(base)
        self.k = k

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        item = self.base[number]
        dropped = torch.from_numpy(context_hashes(item["input_ids"].numpy()) % np.uint64(self.k) == 0)
        return item | {"labels": item["labels"].masked_fill(dropped, IGNORED_LABEL)}
