"""Models that are made, not trained: what they know is known. The controls of the probes are built from them.

Dimension letters: B texts, T tokens, V vocabulary, D width.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dyadlm.data.encoding import NUM_BYTES
from dyadlm.data.streams import TokenStream
from dyadlm.data.tokenizer import byte_tokenizer
from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material

BYTES = NUM_BYTES + 3  # tokens of the byte tokenizer
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


class Shown(Oracle):
    """An oracle that shows more than logits: what it is given functions for, named as the methods of a subject.

    head: (D, V), by which logits are made of the last of the hidden states; without it, all tokens are alike.
    silenced: by name of a level, the model without it.
    """

    def __init__(
        self,
        vocabulary: int,
        name: str,
        *,
        logits: Callable[[Tensor], Tensor] | None = None,
        hidden: Callable[[Tensor], list[Tensor]] | None = None,
        head: Tensor | None = None,
        attention: Callable[[Tensor], list[Tensor]] | None = None,
        routes: Callable[[Tensor], list[Tensor]] | None = None,
        bounds: Callable[[Tensor], dict[str, Tensor]] | None = None,
        fingerprinted: Callable[[Tensor, Tensor], Tensor] | None = None,
        blend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        silenced: Mapping[str, Subject] | None = None,
        forecasts: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        untrained: Subject | None = None,
        context: int | None = None,
    ):
        super().__init__(vocabulary, logits or self._from_hidden, name, context)
        self._hidden, self._head, self._attention, self._routes = hidden, head, attention, routes
        self._bounds, self._fingerprinted, self._blend = bounds, fingerprinted, blend
        self._silenced, self._forecasts, self._untrained = silenced or {}, forecasts, untrained

    def _from_hidden(self, ids: Tensor) -> Tensor:
        if self._hidden is None or self._head is None:
            return torch.zeros(*ids.shape, self.vocabulary)
        return self._hidden(ids)[-1] @ self._head

    def hidden(self, ids: Tensor) -> list[Tensor] | None:
        return None if self._hidden is None else self._hidden(ids)

    def lens(self, hidden: Tensor) -> Tensor | None:
        return None if self._head is None else hidden @ self._head

    def attention(self, ids: Tensor) -> list[Tensor] | None:
        return None if self._attention is None else self._attention(ids)

    def routes(self, ids: Tensor) -> list[Tensor] | None:
        return None if self._routes is None else self._routes(ids)

    def bounds(self, ids: Tensor) -> dict[str, Tensor] | None:
        return None if self._bounds is None else self._bounds(ids)

    def fingerprinted(self, ids: Tensor, index: Tensor) -> Tensor | None:
        return None if self._fingerprinted is None else self._fingerprinted(ids, index)

    def blend(self, ids: Tensor, other: Tensor, share: Tensor) -> Tensor | None:
        return None if self._blend is None else self._blend(ids, other, share)

    def forecasts(self, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        return None if self._forecasts is None else self._forecasts(ids)

    def untrained(self) -> Subject | None:
        return self._untrained

    def without_level(self, level: int) -> Subject | None:
        models = list(self._silenced.values())
        return models[level] if level < len(models) else None

    @property
    def levels(self) -> Sequence[str]:
        return list(self._silenced)


def spelled(logits: Callable[[Tensor], Tensor], name: str) -> Oracle:
    """An oracle whose tokens are those of the byte tokenizer."""
    oracle = Oracle(BYTES, logits, name)
    oracle.tokenizer = byte_tokenizer()
    return oracle


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
