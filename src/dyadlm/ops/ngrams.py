"""Hashed n-grams: which row of a table stands for the last tokens, or for the open word, at each token.

The hash of n tokens is the sum of mix(token, place) mod 2^64, the newest token at place 0; that of the open word counts
places from its first token, as `dyadlm.ops.contexts` does. Neither depends on the size of the vocabulary. Two n-grams
may share a row: what is stored under a row is learned, and so is how far to trust it.

Dimension letters: B batch, T time, H tokens before the chunk, N tables.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dyadlm.ops.clock import Clock
from dyadlm.ops.contexts import SEEDS, TokenHistory, mix, shifted


@torch.no_grad()
def ngram_rows(history: TokenHistory, sizes: Sequence[int | str], entries: int, clock: Clock) -> Tensor:
    """The rows of N tables that stand one after another, `entries` rows each: (B, T, N) int64; -1 where the document
    has fewer tokens than the n-gram, and in the padding.

    history: at least as long as the longest n-gram, with the open word where `word` is among the sizes.
    """
    time = clock.index.shape[1]
    before = history.tokens.shape[1] - time
    real = torch.arange(time, device=clock.index.device) < clock.length[:, None]
    total, sums = torch.zeros_like(clock.index), {}
    for place in range(max([0, *(size for size in sizes if isinstance(size, int))])):
        token = history.tokens[:, before - place :][:, :time]
        total = total + mix(((token << 32) + place) ^ SEEDS[0])
        sums[place + 1] = total
    rows = []
    for table, size in enumerate(sizes):
        if isinstance(size, int):
            hashed, known = sums[size], real & (clock.index >= size - 1)
        else:
            assert history.word is not None, "the open word needs to know where words begin"
            hashed, known = history.word[..., 0], real
        rows.append(torch.where(known, shifted(hashed, 1) % entries + table * entries, -1))
    return torch.stack(rows, -1)
