"""Stopping in good order: SIGTERM, SIGHUP and Ctrl-C finish the step, save a checkpoint and end the run."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dyadlm.errors import RunFailed

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class RunInterrupted(RunFailed):
    """The run was stopped by a signal and has saved. exit_code: 130 (Ctrl-C), 143 (SIGTERM) or 129 (SIGHUP)."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number


class InterruptHandler(TrainerCallback):
    """Remembers the first signal and asks for a checkpoint at the end of the step; a second one ends at once.

    Used as a context. Outside the main thread, where Python takes no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "InterruptHandler":
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # not under nohup
            self._previous = {number: signal.signal(number, self._remember) for number in heeded}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:
            # A signal may reach the processes in different steps; all must save the same one.
            flag = torch.tensor(self.received, device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.received = int(flag)
        if self.received:
            control.should_save = True
            control.should_training_stop = True
