"""An exponential average of the weights: what is evaluated and published, beside the weights that are trained.

After step n the average moves by 1 - decay towards the weights, and by more in the first steps: decay is at most
(1 + n) / (10 + n), so that the weights of the beginning do not linger.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dyadlm.errors import UserError
from dyadlm.model.extension import COMPANIONS

# In a checkpoint whose `model.safetensors` holds the average.
RAW_NAME = "raw_weights.safetensors"


def averaged_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights by name that an average follows: those that are trained and published."""
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and not name.startswith(COMPANIONS)
    }


class WeightAverage(TrainerCallback):
    """The average of a model's weights, float32 tensors of their shapes. decay: of the average, 0 < decay < 1."""

    def __init__(self, model: nn.Module, decay: float):
        self._model, self._decay = model, decay
        self._means: dict[str, Tensor] = {}

    @torch.no_grad()
    def begin(self) -> None:
        """Begin with the weights as they are now."""
        self._means = {name: weight.detach().clone() for name, weight in averaged_parameters(self._model).items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._means:
            self.begin()

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        decay = min(self._decay, (1 + state.global_step) / (10 + state.global_step))
        weights = averaged_parameters(self._model)
        torch._foreach_lerp_([self._means[name] for name in weights], list(weights.values()), 1 - decay)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The average in the place of the weights, until the end of the context."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in averaged_parameters(self._model).items() if self._means else ():
            kept = weight.clone()
            weight.copy_(self._means[name])
            self._means[name] = kept


def save_raw(model: nn.Module, folder: Path) -> None:
    """Write the weights that are trained into a checkpoint."""
    weights = averaged_parameters(model)
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, folder / RAW_NAME)


@torch.no_grad()
def load_raw(model: nn.Module, folder: Path) -> None:
    """Read what `save_raw` wrote, if it is there.

    Raises:
        UserError: it is damaged, or of another model.
    """
    if not (folder / RAW_NAME).is_file():
        return
    weights = averaged_parameters(model)
    try:
        saved = load_file(folder / RAW_NAME)
        fits = {name: tensor.shape for name, tensor in saved.items()} == {n: w.shape for n, w in weights.items()}
    except (SafetensorError, OSError, ValueError):
        fits = False
    if not fits:
        raise UserError(
            f"{folder / RAW_NAME} does not hold the weights of this model; remove the checkpoint to go on from an "
            "earlier one."
        )
    for name, weight in weights.items():
        weight.copy_(saved[name])
