"""What a run would cost, from a few steps of it."""

import dataclasses
import resource
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dyadlm.train.companions import published_parameters
from dyadlm.train.prepared_run import TrainingData, prepare_run
from dyadlm.train.settings import TrainSettings

# Weights, gradients and the two moments of AdamW, float32.
STATIC_BYTES_PER_PARAMETER = 16
# So many steps are timed after a first one, which also warms caches and compilers.
TIMED_STEPS = 3


def dry_run(settings: TrainSettings, data: TrainingData | None = None) -> dict[str, Any]:
    """What a run would cost, from a few timed steps of it on the target device; nothing is left behind.

    Returns parameters (of the model), parameters_in_training_alone (of its companions), static_memory_bytes (weights,
    gradients, moments of both), peak_memory_bytes (measured; on a CPU that of the whole process), steps, tokens,
    tokens_per_step, flops (floating-point operations of the matrix products and convolutions of all steps, whatever is
    trained, as counted in the first; None where a compiler hides them), seconds_per_step, seconds (all steps, without
    evaluations and checkpoints), choices (device and dtype with reasons).
    """
    with tempfile.TemporaryDirectory() as folder:
        plan = prepare_run(settings, data, Path(folder))
        steps = plan.arguments.max_steps
        plan.arguments.max_steps = min(steps, 1 + TIMED_STEPS)
        plan.arguments.save_strategy = plan.arguments.eval_strategy = "no"
        plan.arguments.eval_on_start = False
        options = dataclasses.replace(settings.train, log_spaced_checkpoints=False)
        settings = dataclasses.replace(settings, options=settings.options | {"train": options})
        clock = _StepClock()
        trainer = plan.trainer(settings, clock)
        if plan.arguments.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with clock.counting:  # which ends at the latest where a first step fails
            trainer.train()
        per_step = trainer.tokens_per_step()
        parameters = published_parameters(plan.model)
        beside = sum(weight.numel() for weight in plan.model.parameters()) - parameters
        seconds = statistics.median(clock.seconds[1:] or clock.seconds)
        return {
            "parameters": parameters,
            "parameters_in_training_alone": beside,
            "static_memory_bytes": STATIC_BYTES_PER_PARAMETER * (parameters + beside),
            "peak_memory_bytes": _peak_memory(plan.arguments.device),
            "steps": steps,
            "tokens_per_step": per_step,
            "tokens": steps * per_step,
            "flops": None if plan.arguments.torch_compile else steps * clock.flops,
            "seconds_per_step": seconds,
            "seconds": steps * seconds,
            "choices": plan.choices,
        }


class _StepClock(TrainerCallback):
    """Seconds from the end of each step to the end of the next, and the floating-point operations of the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._counter = FlopCounterMode(display=False)
        self.counting = ExitStack()

    @property
    def flops(self) -> int:
        return self._counter.get_total_flops()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.seconds and not args.torch_compile:
            self.counting.enter_context(self._counter)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.counting.close()
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
