"""What a forward pass returns.

Dimension letters: B batch, T time, V vocabulary, D width, L layers, K levels, S semantic levels, H heads.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput

from dyadlm.model.cache import DyadCache


@dataclass
class DyadOutput(ModelOutput):
    """What a forward pass returns; absent parts are None.

    Args:
        loss: scalar, mean cross-entropy in nats over the labels that are not -100.
        logits: (B, T or logits_to_keep, V).
        past_key_values: the state after the last token.
        hidden_states: L + 1 tensors (B, T, D): the embedding, then each block's output, the last one normalised.
        routes: L × (B, T, H, K), weights of the levels, geometric then semantic, from models that select.
        boundaries: (B, T, S) bool, where segments begin: the levels that follow rules in their order, then the learned
            level as each block sees it.
        metrics: of the mechanisms that are on, by name: scalars, or fractions as (numerator, denominator); in training
            the scalar `cost` is part of the loss.
        plan: what a model that plans foresees, proposes and prefers (`dyadlm.model.extras.planner.Plan`).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: DyadCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    routes: tuple[Tensor, ...] | None = None
    boundaries: Tensor | None = None
    metrics: dict[str, Tensor] | None = None
    plan: Any = None


@dataclass
class DyadModelOutput(ModelOutput):
    """What the model without a head returns: as `DyadOutput`, with the last hidden state (B, T, D) for logits."""

    last_hidden_state: Tensor | None = None
    past_key_values: DyadCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    routes: tuple[Tensor, ...] | None = None
    boundaries: Tensor | None = None
    metrics: dict[str, Tensor] | None = None
    outlook: Any = None


def as_asked(output: ModelOutput, return_dict: bool | None) -> Any:
    """The output itself, or its present parts as a tuple."""
    return output.to_tuple() if return_dict is False else output
