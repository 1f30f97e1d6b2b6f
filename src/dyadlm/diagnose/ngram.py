"""An interpolated n-gram model: what counts of the last few tokens say, and no more. A baseline and a reference row.

Dimension letters: B texts, T tokens, N examples, P questions, O outcomes, C contexts, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dyadlm.data.streams import TokenStream
from dyadlm.diagnose.contract import Subject

ORDER = 3
MOST_TOKENS = 2**20


class Counts:
    """Probabilities of outcomes after the last tokens, of the longest context to none, each mixed with the shorter.

    Witten and Bell 1991: of a context seen n times with d different outcomes, p = (counts + d p_shorter) / (n + d);
    below the shortest, all outcomes are alike. Contexts have numbers of their own, by pairs.
    """

    def __init__(self, ids: np.ndarray, outcomes: np.ndarray, count: int, order: int):
        """ids, outcomes: (B, T) int64; an outcome follows the tokens up to its column in its row. Negative ones count
        for nothing. count: O. order: tokens of the longest context."""
        self.count, self.order = count, order
        self._steps: list[tuple[np.ndarray, int]] = []  # by length of the context, the pairs (shorter, token) known
        self._tables: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        context = np.zeros(ids.shape, dtype=np.int64)
        for length in range(order + 1):
            if length:
                context = self._longer(context, ids, length, learn=True)
            here = (outcomes >= 0) & (context >= 0)
            pairs, times = np.unique(context[here] * count + outcomes[here], return_counts=True)
            contexts = int(context.max(initial=0)) + 1
            edges = np.searchsorted(pairs, np.arange(contexts + 1) * count)
            self._tables.append((edges, pairs % count, times.astype(np.float64)))

    def _longer(self, context: np.ndarray, ids: np.ndarray, length: int, learn: bool = False) -> np.ndarray:
        """Numbers of contexts of `length` tokens, by those of one less: the token before them joins; −1 if unknown."""
        earlier = np.full_like(ids, -1)
        earlier[:, length - 1 :] = ids[:, : ids.shape[1] - length + 1]
        base = int(ids.max(initial=0)) + 1 if learn else self._steps[length - 1][1]
        pair = np.where((context < 0) | (earlier < 0) | (earlier >= base), -1, context * base + earlier)
        if learn:
            self._steps.append((np.unique(pair[pair >= 0]), base))
        known = self._steps[length - 1][0]
        if not len(known):
            return np.full_like(ids, -1)
        place = np.searchsorted(known, pair).clip(max=len(known) - 1)
        found: np.ndarray = np.where((pair >= 0) & (known[place] == pair), place, -1)
        return found

    def chances(self, ids: np.ndarray, order: int | None = None) -> np.ndarray:
        """(B, T) int64 → (B, T, O) float64: of the outcome after each token, by at most `order` of the last ones."""
        shape = (*ids.shape, self.count)
        found = np.full((ids.size, self.count), 1 / self.count)
        context = np.zeros(ids.shape, dtype=np.int64)
        for length in range((self.order if order is None else order) + 1):
            if length:
                context = self._longer(context, ids, length)
            edges, outcomes, times = self._tables[length]
            at = np.flatnonzero(context.ravel() >= 0)
            number = context.ravel()[at]
            sizes = edges[number + 1] - edges[number]  # d
            at, number, sizes = at[sizes > 0], number[sizes > 0], sizes[sizes > 0]
            if not len(at):
                continue
            rows = np.repeat(np.arange(len(at)), sizes)
            entry = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + edges[number][rows]
            total = np.bincount(rows, weights=times[entry], minlength=len(at)) + sizes
            found[at] *= (sizes / total)[:, None]
            found[at[rows], outcomes[entry]] += times[entry] / total[rows]
        return found.reshape(shape)


class NGram(Subject):
    """What counts of up to `ORDER` tokens before say, of the first `MOST_TOKENS` of a text."""

    def __init__(
        self,
        text: Sequence[TokenStream],
        vocabulary: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        order: int = ORDER,
    ):
        self.name = f"{order + 1}-gram"
        self.vocabulary, self.tokenizer = vocabulary, tokenizer
        share = MOST_TOKENS // max(1, len(text))
        parts = [stream.tokens(0, min(len(stream), share)).astype(np.int64) for stream in text]
        longest = max(map(len, parts))
        rows = np.stack([np.pad(part, (0, longest - len(part)), constant_values=-1) for part in parts])
        self._tokens = sum(map(len, parts))
        self._counts = Counts(rows[:, :-1], rows[:, 1:], vocabulary, order)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**super().identity, "tokens": self._tokens}

    def logits(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(np.log(self._counts.chances(ids.numpy()))).float()
