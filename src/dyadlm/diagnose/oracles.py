"""Models that are made, not trained: what they know is known. The controls of the probes are built from them.

Dimension letters: B texts, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dyadlm.data.streams import TokenStream
from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material

NEVER = -30.0  # the logit of what an oracle holds impossible: finite, so that its surprise is a number


class Oracle(Subject):
    """Logits by a function of the tokens: (B, T) int64 → (B, T, V) float32."""

    def __init__(self, vocabulary: int, function: Callable[[Tensor], Tensor], name: str, context: int | None = None):
        self.vocabulary = vocabulary
        self.name = name
        self.context = context
        self._function = function

    def logits(self, ids: Tensor) -> Tensor:
        return self._function(ids)


def uniform(vocabulary: int) -> Oracle:
    """Holds every token possible alike, always: ln V nats."""
    return Oracle(vocabulary, lambda ids: torch.zeros(*ids.shape, vocabulary), "uniform")


def laplace(vocabulary: int) -> Oracle:
    """Counts the tokens so far, one more of each: the predictor for i.i.d. tokens under a uniform Dirichlet prior."""

    def logits(ids: Tensor) -> Tensor:
        seen = one_hot(ids, vocabulary).cumsum(1).float()
        return torch.log((seen + 1) / (seen.sum(-1, keepdim=True) + vocabulary))

    return Oracle(vocabulary, logits, "laplace")


class Automaton(Oracle):
    """Is sure of one next token: following maps ids (B, T) to the token after each (B, T)."""

    def __init__(self, vocabulary: int, following: Callable[[Tensor], Tensor], name: str):
        super().__init__(vocabulary, lambda ids: (1 - one_hot(following(ids), vocabulary).float()) * NEVER, name)
        self._following = following

    def greedy(self, ids: Tensor, count: int) -> Tensor:
        """As of every subject, without the logits of large vocabularies."""
        written = ids
        for _ in range(count):
            written = torch.cat([written, self._following(written)[:, -1:]], 1)
        return written[:, ids.shape[1] :]


def copier(vocabulary: int, lag: int) -> Oracle:
    """Is sure that the next token is the one `lag` before it, once there is one; before, all alike."""

    def logits(ids: Tensor) -> Tensor:
        known = torch.full((*ids.shape, vocabulary), 0.0)
        if ids.shape[1] >= lag:
            source = ids[:, : ids.shape[1] - lag + 1]
            known[:, lag - 1 :] = (1 - one_hot(source, vocabulary).float()) * NEVER
        return known

    return Oracle(vocabulary, logits, f"copier {lag}")


def material_of(documents: list[np.ndarray], name: str) -> Material:
    """Documents of tokens as what probes read."""
    streams = [TokenStream.from_tokens(document, name=f"{name} {number}") for number, document in enumerate(documents)]
    return Material(streams, None, name)


def independent(vocabulary: int, documents: int, length: int, seed: int = 0) -> Material:
    """Independent tokens, each as likely as any: no model does better than ln V nats."""
    random = np.random.default_rng(seed)
    return material_of(list(random.integers(vocabulary, size=(documents, length))), "independent tokens")


def dirichlet(vocabulary: int, documents: int, length: int, seed: int = 0) -> Material:
    """Documents of independent tokens, each document with frequencies of its own, drawn from Dirichlet(1)."""
    random = np.random.default_rng(seed)
    frequencies = random.dirichlet(np.ones(vocabulary), size=documents)
    drawn = [random.choice(vocabulary, size=length, p=each) for each in frequencies]
    return material_of(drawn, "documents of their own")


def copied(vocabulary: int, lag: int, documents: int, length: int, seed: int = 0) -> Material:
    """Each token is the one `lag` before it; the first `lag` are independent. Never predictable from fewer tokens."""
    random = np.random.default_rng(seed)
    first = random.integers(vocabulary, size=(documents, lag))
    return material_of(list(np.tile(first, math.ceil(length / lag))[:, :length]), f"copies at {lag}")
