"""The interface of optional parts that train beside a model: not exported, and not called in evaluation.

Dimension letters: B batch, T time, D width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dyadlm.errors import UserError

COMPANIONS = "companions."  # how the names of their parameters begin in a model


class TrainingPass(NamedTuple):
    """One training pass, as the model was given it."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, not shifted; -100 counts for nothing
    attention_mask: Tensor | None  # (B, T), 0 for padding, anywhere in the row
    position_ids: Tensor | None  # (B or 1, T), 0 where a document starts
    hidden: Tensor  # (B, T, D), the model's last hidden state
    extra: dict[str, Tensor]  # what else the collator sent, by name
    plan: Any = None  # `extras.planner.Plan`: what the model planned, if a module reads that


class AuxiliaryModule(nn.Module):
    """A part that trains beside a model (`DyadForCausalLM.accompany`). Both methods run inside the model's forward, so
    that every way of training in parallel sees its parameters. Its parameters are initialised when it is made."""

    reads_plan = False  # whether `TrainingPass.plan` is wanted

    def embed(self, extra: dict[str, Tensor]) -> Tensor | None:
        """What is added to the embedding of the tokens, (B, T, D); None: nothing. `extra` as in `TrainingPass`."""
        return None

    def losses(self, lesson: TrainingPass) -> dict[str, Tensor]:
        """Metrics for the log, by names that no other companion has: scalars, of which the mean over passes is logged,
        or fractions (2,), numerator and denominator, which are summed over passes before they are divided. What is to
        be minimised besides the model's own loss is the scalar `cost`, if there is one."""
        return {}


class CompanionsMixin:
    """A model beside which auxiliary modules train."""

    companions: nn.ModuleDict

    def accompany(self, name: str, companion: AuxiliaryModule) -> None:
        """Train an auxiliary module beside the model, on its device and in its dtype. `save_pretrained` leaves it out;
        evaluation mode never calls it. Raises `UserError` for a name that there is already."""
        if name in self.companions:
            raise UserError(f"There is a companion {name!r} already; remove it from model.companions first.")
        model: Any = self
        self.companions[name] = companion.to(device=model.device, dtype=model.dtype)
        model._keys_to_ignore_on_save = {key for key in model.state_dict() if key.startswith(COMPANIONS)}

    def set_progress(self, fraction: float) -> None:
        """Set how far training is, from 0 to 1, for parts that follow it. The trainer of dyadlm calls this.

        Raises `UserError` for another number.
        """
        if not 0.0 <= fraction <= 1.0:
            raise UserError(f"The progress of training lies between 0 and 1, not at {fraction}.")
        model: Any = self
        model.model.progress.fill_(fraction)


def add_up(metrics: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All named metrics; the costs become one. Raises ValueError if another name than `cost` comes twice."""
    names = [name for part in metrics for name in part if name != "cost"]
    if len(set(names)) < len(names):
        twice = sorted(name for name in set(names) if names.count(name) > 1)
        raise ValueError(f"Two parts report the same metrics: {', '.join(twice)}.")
    named = {name: value for part in metrics for name, value in part.items()}
    if costs := [part["cost"] for part in metrics if "cost" in part]:
        named["cost"] = torch.stack(costs).sum()
    return named
