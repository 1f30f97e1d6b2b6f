"""What a probe may ask of a model: the adapter contract. Only `logits` is required; what a model cannot answer is None.

Dimension letters: B texts, T tokens, V vocabulary, D width, L layers, H heads, K levels.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dyadlm.data.encoding import tokenizer_identity


class NotApplicable(Exception):
    """The question makes no sense for this model; says why."""


def require_numbers(output: Tensor, name: str, vocabulary: int | None = None) -> Tensor:
    """The output (..., V) of a model of that name. Raises `NotApplicable` if any of it is not a number, or nothing of
    a row's first `vocabulary` is finite: no figure follows from them."""
    if output.isnan().any() or not output[..., :vocabulary].float().isfinite().any(-1).all():
        raise NotApplicable(f"{name} returns values that are not numbers")
    return output


class Subject(ABC):
    """A causal language model under examination; subclass it to adapt an exotic one (docs/diagnose.md).

    All methods take tokens (B, T) int64, from a fresh start, and must not change the model.

    Attributes:
        name: what reports call it.
        vocabulary: V.
        context: the most tokens it can read; None: any number.
        tokenizer: None if its tokens are no text; probes on text are then not applicable.
    """

    name: str = "model"
    vocabulary: int
    context: int | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    @abstractmethod
    def logits(self, ids: Tensor) -> Tensor:
        """(B, T) → (B, T, V) float32 on the CPU: of the token after each."""

    def hidden(self, ids: Tensor) -> list[Tensor] | None:
        """L + 1 tensors (B, T, D) float32: the embedding, then each layer's output."""
        return None

    def attention(self, ids: Tensor) -> list[Tensor] | None:
        """L tensors (B, H, T, T) float32, each row a distribution over the tokens at and before it."""
        return None

    def routes(self, ids: Tensor) -> list[Tensor] | None:
        """L tensors (B, T, H, K) float32: how much each level (or expert) weighs."""
        return None

    def bounds(self, ids: Tensor) -> dict[str, Tensor] | None:
        """By name of the partition, (B, T) bool: where its segments begin."""
        return None

    def fingerprinted(self, ids: Tensor, index: Tensor) -> Tensor | None:
        """Logits (B, T, V) with the fingerprints of the indices (B, T) int64 shown."""
        return None

    def forecasts(self, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of a model that foresees what its levels will be, two tensors (B, T, K) float32: at each token by how much
        the forecast of what came then was wrong, squared, and by how much it would have been to foresee no change;
        0 where nothing was judged."""
        return None

    def untrained(self) -> "Subject | None":
        """The same model with new random weights."""
        return None

    def without_level(self, level: int) -> "Subject | None":
        """The same model with one of its levels silenced; None if it has no such level."""
        return None

    def lens(self, hidden: Tensor) -> Tensor | None:
        """What the head would say of a layer's output, were it the last: (B, T, D) of any but the last layer of
        `hidden` → logits (B, T, V)."""
        return None

    def blend(self, ids: Tensor, other: Tensor, share: Tensor) -> Tensor | None:
        """Logits (B, V) after texts whose embeddings lie between those of two: `share` (B,) float32 of the way from
        ids (B, T) to other (B, T). What reads the tokens themselves reads ids."""
        return None

    @property
    def levels(self) -> Sequence[str]:
        """What its levels are called, in the order of `routes` and `without_level`; none if it has no levels."""
        return ()

    @property
    def module(self) -> nn.Module | None:
        """The module behind it, for probes that need gradients or a few steps of training: on a copy of it."""
        return None

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a stored result must agree with to be taken for this model's."""
        known: dict[str, Any] = {"name": self.name, "vocabulary": self.vocabulary, "context": self.context}
        if self.tokenizer is not None:
            known["tokenizer"] = tokenizer_identity(self.tokenizer)[:12]
        return known

    def greedy(self, ids: Tensor, count: int) -> Tensor:
        """(B, T) → (B, count) int64: the most probable continuation. Slow and general; override it where there is a
        faster way to the same tokens."""
        written = ids
        for _ in range(count):
            read = written if self.context is None else written[:, -self.context :]
            logits = require_numbers(self.logits(read)[:, -1:], self.name)
            written = torch.cat([written, logits.argmax(-1)], 1)
        return written[:, ids.shape[1] :]

    def nats(self, ids: Tensor) -> Tensor:
        """(B, T) → (B, T - 1) float32: the surprise at each token but the first."""
        logits = require_numbers(self.logits(ids[:, :-1]), self.name)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return losses.float()
