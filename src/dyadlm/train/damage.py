"""Checks of what is read from a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from dyadlm.errors import RunFailed, UserError


@contextmanager
def reading(checkpoint: str | Path | None) -> Iterator[None]:
    """Raise a UserError that names the checkpoint for whatever fails inside.

    A manifest that agrees shows that nothing changed since, not that what was written is a checkpoint. A disk that
    fails and memory that is full say nothing against it: nobody is told to remove it for these.
    """
    try:
        yield
    except (UserError, RunFailed, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch, safetensors and json each have their own
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{checkpoint} is damaged ({reason}); remove it to go on from an earlier checkpoint."
        ) from error


def require_sound_state(folder: Path) -> None:
    """Raise ValueError unless trainer_state.json is of the step that its folder is named for."""
    state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    if state.global_step != int(folder.name.rpartition("-")[2]):
        raise ValueError(f"{TRAINER_STATE_NAME} is of step {state.global_step}")
    if not isinstance(state.best_model_checkpoint, str | None):
        raise ValueError(f"best_model_checkpoint in {TRAINER_STATE_NAME} is no path")


def require_fitting_moments(optimizer: torch.optim.Optimizer, checkpoint: str) -> None:
    """Raise UserError or ValueError unless what was loaded into the optimizer is complete and shaped as the weights.

    Compiled code of the optimizer does not look where a tensor ends, nor whether its numbers are all there.
    """
    wrapped = getattr(optimizer, "optimizer", optimizer)  # by accelerate
    needed = {"step", "exp_avg", "exp_avg_sq"} if isinstance(wrapped, torch.optim.Adam) else set()
    if needed and not optimizer.state:
        raise ValueError("it holds no state of the optimizer")
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        state = optimizer.state.get(weight, {})
        if state and not needed <= state.keys():
            raise ValueError(f"the optimizer's {min(needed - state.keys())} is missing")
        for name, value in state.items():
            moment = isinstance(value, torch.Tensor) and value.dim() > 0
            if moment and (value.shape != weight.shape or not value.is_floating_point()):
                raise UserError(
                    f"The optimizer's {name} in {checkpoint} is {tuple(value.shape)} where the weight is "
                    f"{tuple(weight.shape)}; the checkpoint is damaged, remove it to go on from an earlier one."
                )
            if moment and (value.layout != weight.layout or value.stride() != weight.stride()):
                raise ValueError(f"the optimizer's {name} is laid out in another way than the weight")
