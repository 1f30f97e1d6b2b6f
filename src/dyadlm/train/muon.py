"""Muon for the matrices of a model, AdamW for all else, as one optimizer: one schedule, one state to save.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes the update of a matrix orthogonal. Its
updates are scaled to the size that those of AdamW have (Liu et al. 2025, arXiv 2502.16982), so that both use the same
learning rate and weight decay.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from dyadlm.errors import UserError
from dyadlm.train.optimizer import decayed_parameters, matrix_parameters

ADJUSTMENT = "match_rms_adamw"


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` over groups of their own, which stand in one list, with one state.

    matrices: (rows, columns) each, or stacks of them, (N, rows, columns), which are updated one by one. others: groups
    of AdamW, each with its `weight_decay`. adamw: options of AdamW, the learning rate `lr` among them, which both begin
    with.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        others: Sequence[dict[str, Any]],
        *,
        weight_decay: float,
        adamw: Mapping[str, Any],
    ):
        # A matrix of a stack is a parameter of its own here, over the same memory.
        self._stacks = [(stack, [nn.Parameter(one) for one in stack.detach()]) for stack in matrices if stack.ndim > 2]
        single = [matrix for matrix in matrices if matrix.ndim == 2] + [one for _, ones in self._stacks for one in ones]
        muon = torch.optim.Muon(
            [{"params": single}], lr=adamw["lr"], weight_decay=weight_decay, adjust_lr_fn=ADJUSTMENT
        )
        self._parts = (muon, torch.optim.AdamW(list(others), **adamw))
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for stack, ones in self._stacks:
            for number, one in enumerate(ones):
                one.grad = None if stack.grad is None else stack.grad[number]
        for number, part in enumerate(self._parts):
            # Loading and sharding put other groups and another state in the place of those that were there.
            part.param_groups = self.param_groups[:1] if number == 0 else self.param_groups[1:]
            part.state = self.state
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those of stacks, too, which are in no group themselves."""
        super().zero_grad(set_to_none)
        for stack, _ in self._stacks:
            stack.grad = None


def muon_over(model: nn.Module, *, weight_decay: float, adamw: Mapping[str, Any]) -> MuonWithAdamW:
    """The optimizer of the parameters of a model that are trained; its matrices decay, as with AdamW. adamw: options of
    AdamW, `lr` among them."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    matrices = [name for name in matrix_parameters(model) if name in trained]
    decayed, rest = set(decayed_parameters(model)), [name for name in trained if name not in set(matrices)]
    others = [
        {
            "params": [trained[name] for name in rest if (name in decayed) == decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    return MuonWithAdamW([trained[name] for name in matrices], others, weight_decay=weight_decay, adamw=adamw)


def muon_optimizer(model: nn.Module, arguments: TrainingArguments) -> MuonWithAdamW:
    """The optimizer of `train.optimizer=muon`, for the parameters of a model that are trained.

    Raises:
        UserError: this torch has no Muon, or `optim` asks for another optimizer than AdamW.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"torch {torch.__version__} has no Muon; install 2.9 or newer, or leave train.optimizer out.")
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[arg-type]
    if kind is not torch.optim.AdamW:
        asked = OptimizerNames(arguments.optim).value
        raise UserError(
            f"train.optimizer=muon takes AdamW for what is no matrix; leave optim={asked} out, or train.optimizer."
        )
    return muon_over(model, weight_decay=arguments.weight_decay, adamw=options)
