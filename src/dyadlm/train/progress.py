"""What a run shows while it works, and what it leaves in RUN/metrics.jsonl and RUN/tensorboard."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dyadlm.files import write_atomically

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"


class MetricsWriter(TrainerCallback):
    """Appends every log as a line {"step": …, name: number …} to RUN/metrics.jsonl and to TensorBoard."""

    def __init__(self, run: Path, from_step: int):
        """from_step: what was logged after it belongs to steps that will be done again, and is dropped."""
        path = run / METRICS_NAME
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= from_step]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(run / TENSORBOARD_NAME), purge_step=from_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        self._file.write(json.dumps({"step": state.global_step, **numbers}) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            self._tensorboard.add_scalar(name, value, state.global_step)
        self._tensorboard.flush()

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, up to the first that is none: a crash may cut the last one short."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines


# Columns of a terminal that the bar takes with all figures.
ROOM_FOR_FIGURES = 110
# A run prints at most so many lines of each kind where there is no terminal; the metrics file has them all.
LOSS_LINES, VALIDATION_LINES = 16, 10


class ProgressDisplay(TrainerCallback):
    """Loss, bits per byte, tokens/s and time left: a bar on a terminal, else a few lines, evenly spaced.

    A validation loss has a line of its own, in the step in which it was measured.
    """

    def __init__(self, console: Console, total: int):
        self._console = console
        self._latest: dict[str, float] = {}
        self._total = total
        self._due = {"loss": 0.0, "eval_loss": 0.0}  # the step from which the next line may come
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("train", total=total, figures="")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._latest |= {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        step = state.global_step
        if "eval_loss" in (logs or {}) and self._is_due("eval_loss", step, VALIDATION_LINES):
            self._print(step, _loss(self._latest, "eval_loss", "validation") + _of_sources(logs or {}))
        if "loss" not in (logs or {}):
            return
        text = "  ".join(filter(None, [_loss(self._latest, "loss", "loss"), _speed(self._latest)]))
        if self._bar is not None:
            short = f"loss {self._latest['loss']:.4f}"  # so that the step and the time left have room
            self._bar.update(self._task, figures=text if self._console.width >= ROOM_FOR_FIGURES else short)
        elif self._is_due("loss", step, LOSS_LINES):
            rate = self._latest.get("steps_per_second", 0.0)
            left = f"  {_duration((self._total - step) / rate)} left" if rate else ""
            self._print(step, text + left)

    def _is_due(self, kind: str, step: int, lines: int) -> bool:
        """Whether a line may be printed now. The first and the last step have one."""
        if step < self._due[kind] and step < self._total:
            return False
        self._due[kind] = step + self._total / (lines - 1)
        return True

    def _print(self, step: int, text: str) -> None:
        self._console.print(f"step {step}/{self._total}  {text}", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _loss(logs: Mapping[str, float], name: str, title: str) -> str:
    bits = logs.get(name.replace("loss", "bits_per_byte"))
    return f"{title} {logs[name]:.4f}" + (f" ({bits:.4f} bits/byte)" if bits is not None else "")


def losses_of_sources(logs: Mapping[str, Any]) -> dict[str, float]:
    """The validation loss of each source by its name, of a run with several (`eval_NAME_loss`)."""
    names = {name: name.removeprefix("eval_").removesuffix("_loss") for name in logs if name.startswith("eval_")}
    return {own: logs[name] for name, own in names.items() if name == f"eval_{own}_loss"}


def _of_sources(logs: Mapping[str, Any]) -> str:
    return "".join(f"; {name} {loss:.4f}" for name, loss in losses_of_sources(logs).items())


def _speed(logs: Mapping[str, float]) -> str:
    return f"{logs['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in logs else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
