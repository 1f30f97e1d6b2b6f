"""What the mechanisms of a dyadlm model ask of training: to know its progress, an even load, and their cost paid once.

Dimension letters: L layers with a selector, H heads, K levels.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dyadlm.model import DyadForCausalLM
from dyadlm.model.extras.selector import Selector


class Mechanisms(TrainerCallback):
    """Tells a model how far training is, and corrects the bias of its selectors once a step.

    By itself a selector corrects its bias between two passes, by the load of the first. Here the loads of all passes
    of a step, in all processes, make one correction before the step ends: several processes and accumulated gradients
    give what one batch gives, and a checkpoint lacks nothing.

    Progress matters to passes in training alone: in evaluation topk has its count, gumbel has no noise, and only
    gradients depend on its temperature. It is not saved, and 1 again where training ends.
    """

    def __init__(self, model: DyadForCausalLM):
        self._model = model
        self._selectors = [module for module in model.modules() if isinstance(module, Selector) and module.chooses]
        self._loads: list[Tensor] = []  # (L, H, K) of each pass of the step so far

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._model.set_progress(state.global_step / max(state.max_steps, 1))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._collect()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._selectors:
            return
        self._collect()
        load = torch.stack(self._loads).mean(0)
        self._loads = []
        if args.world_size > 1:
            torch.distributed.all_reduce(load)
            load /= args.world_size
        for selector, own in zip(self._selectors, load, strict=True):
            selector.load.copy_(own)
            selector.balance()
            selector.load.zero_()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._model.set_progress(1.0)

    def _collect(self) -> None:
        """Take the loads of the pass that has just ended, so that the next one corrects nothing by them."""
        if self._selectors:
            self._loads.append(torch.stack([selector.load for selector in self._selectors]))
            for selector in self._selectors:
                selector.load.zero_()


class MeanMetrics:
    """The means, since they were last taken, of the named metrics that a model returns beside its loss.

    A metric is a scalar, whose mean over passes is meant, or a fraction (2,), numerator and denominator, which are
    summed each before they are divided.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (2,) each

    def add(self, metrics: dict[str, Tensor]) -> None:
        """The metrics of one pass; always the same names."""
        for name, value in metrics.items():
            value = value.detach().float()
            fraction = value if value.dim() else torch.stack([value, torch.ones_like(value)])
            self._sums[name] = self._sums.get(name, 0.0) + fraction

    def take(self, processes: int) -> dict[str, float]:
        """The means over all passes of all processes, which take them together; none of what was added nowhere, nor of
        fractions whose denominator is 0."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values()))
        if processes > 1:
            torch.distributed.all_reduce(sums)
        named = {name: above / below for name, (above, below) in zip(self._sums, sums.tolist(), strict=True) if below}
        self._sums = {}
        return named
