"""What a run would cost, from a few steps of it."""

import dataclasses
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dyadlm.train.average import averaged_parameters
from dyadlm.train.companions import published_parameters
from dyadlm.train.optimizer import matrix_parameters
from dyadlm.train.options import TrainOptions
from dyadlm.train.prepared_run import PreparedRun, prepare_run
from dyadlm.train.settings import TrainSettings
from dyadlm.train.training_data import TrainingData

# So many steps are timed after a first one, which also warms caches and compilers.
TIMED_STEPS = 3
# Where these steps would take longer than so many seconds on a CPU, steps of fewer windows are timed instead.
PATIENCE_SECONDS = 4.0


def dry_run(
    settings: TrainSettings, data: TrainingData | None = None, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """What a run would cost, from a few timed steps of it on the target device; nothing is left behind.

    Returns parameters (of the model), parameters_in_training_alone (of its companions), static_memory_bytes (weights,
    gradients, moments and average of both), peak_memory_bytes (measured; on a CPU that of the whole process), steps,
    tokens, tokens_per_step, flops (floating-point operations of the matrix products and convolutions of all steps,
    whatever is trained, as counted in the first; None where a compiler hides them), seconds_per_step, seconds (all
    steps, without evaluations and checkpoints), windows_per_step, windows_timed, choices (device and dtype with
    reasons).

    Where windows_timed is less than windows_per_step, steps of so few windows were timed, since whole ones are slow:
    seconds and peak memory are estimated from them, in proportion to the windows; all else is exact.
    progress: called with what is timed, before it is. Raises `UserError` as a training does.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan = prepare_run(settings, data, Path(folder))
        steps = plan.arguments.max_steps
        plan.arguments.save_strategy = plan.arguments.eval_strategy = "no"
        plan.arguments.eval_on_start = False
        options = dataclasses.replace(settings.train, log_spaced_checkpoints=False)
        settings = dataclasses.replace(settings, options=settings.options | {"train": options})
        rows = plan.arguments.per_device_train_batch_size
        whole = rows * plan.arguments.gradient_accumulation_steps
        parameters = published_parameters(plan.model)
        beside = sum(weight.numel() for weight in plan.model.parameters()) - parameters
        per_step = plan.trainer(settings, TrainerCallback()).tokens_per_step()

        # Rows of a step depend on each other in what trains beside a model; a GPU is fast, and its memory is the point.
        # Muon multiplies matrices once a step, however many rows it has.
        together = beside or settings.train.carry_state or settings.train.optimizer == "muon"
        separable = not (together or plan.arguments.torch_compile)
        timed, one = whole, None
        if separable and whole > 2 and plan.arguments.device.type == "cpu":
            # Before the first step there are weights, but neither gradients nor moments.
            resting = _peak_memory(plan.arguments.device) + static_bytes(plan.model, settings.train) - 4 * parameters
            progress("timing one window")
            one = _measure(plan, settings, 1, 2)
            if (1 + TIMED_STEPS) * whole * one.seconds > PATIENCE_SECONDS:
                timed = min(rows, max(1, int(PATIENCE_SECONDS / 2 / one.seconds)))
        if one is None or timed == whole:
            progress(f"timing {1 + TIMED_STEPS} steps of {whole} windows")
            cost = _measure(plan, settings, None, min(steps, 1 + TIMED_STEPS))
        elif timed == 1:
            window = max(0, one.peak_memory - resting)
            cost = _Measured(one.seconds * whole, one.flops * whole, one.peak_memory + window * (rows - 1))
        else:
            progress(f"timing 2 steps of {timed} windows instead of {whole}, which would take longer")
            few = _measure(plan, settings, timed, 2)
            window = (few.peak_memory - one.peak_memory) // (timed - 1)
            peak = few.peak_memory + window * (rows - timed)
            cost = _Measured(few.seconds * whole / timed, one.flops * whole, peak)
        return {
            "parameters": parameters,
            "parameters_in_training_alone": beside,
            "static_memory_bytes": static_bytes(plan.model, settings.train),
            "peak_memory_bytes": cost.peak_memory,
            "steps": steps,
            "tokens_per_step": per_step,
            "tokens": steps * per_step,
            "flops": None if plan.arguments.torch_compile else steps * cost.flops,
            "seconds_per_step": cost.seconds,
            "seconds": steps * cost.seconds,
            "windows_per_step": whole,
            "windows_timed": timed,
            "choices": plan.choices,
        }


class _Measured(NamedTuple):
    """seconds, flops: of a step. peak_memory: bytes, of the whole process on a CPU."""

    seconds: float
    flops: int
    peak_memory: int


def _measure(plan: PreparedRun, settings: TrainSettings, windows: int | None, steps: int) -> _Measured:
    """Train for a few steps of so many windows; None: as many as the run has."""
    arguments = plan.arguments
    arguments.max_steps = steps
    before = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    if windows is not None:
        arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = windows, 1
    clock = _StepClock()
    trainer = plan.trainer(settings, clock)
    if arguments.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with clock.counting:  # which ends at the latest where a first step fails
        trainer.train()
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = before
    seconds = statistics.median(clock.seconds[1:] or clock.seconds)
    return _Measured(seconds, clock.flops, _peak_memory(arguments.device))


def static_bytes(model: nn.Module, options: TrainOptions) -> int:
    """Bytes of weights, gradients, what the optimizer keeps of each, and the average, all in float32."""
    weights = dict(model.named_parameters())
    trained = {name: weight.numel() for name, weight in weights.items() if weight.requires_grad}
    numbers = sum(weight.numel() for weight in weights.values()) + 3 * sum(trained.values())  # two moments of AdamW
    if options.optimizer == "muon":  # which keeps one of a matrix
        numbers -= sum(trained.get(name, 0) for name in matrix_parameters(model))
    if options.ema:
        numbers += sum(weight.numel() for weight in averaged_parameters(model).values())
    return 4 * numbers


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
