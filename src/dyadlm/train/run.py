"""A training run from its settings to the finished model folder."""

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from safetensors import SafetensorError
from transformers import TrainerCallback

from dyadlm.console import standard_error
from dyadlm.data.canaries import CANARIES_NAME
from dyadlm.data.progress import preparation_progress
from dyadlm.data.resolve import parse_weight
from dyadlm.errors import RunFailed, UserError, memory_missing
from dyadlm.files import locked, printable, require_writable, write_atomically
from dyadlm.model.adapters import adapter_parameters
from dyadlm.model.loading import is_model_folder
from dyadlm.train.checkpoint import checkpoint_path, last_complete, remove_leftovers
from dyadlm.train.companions import published_parameters
from dyadlm.train.compiler import compiling
from dyadlm.train.export import model_card
from dyadlm.train.interrupt import InterruptHandler, RunInterrupted
from dyadlm.train.prepared_run import PreparedRun, prepare_run
from dyadlm.train.progress import METRICS_NAME, MetricsWriter, ProgressDisplay, losses_of_sources, read_metrics
from dyadlm.train.resuming import (
    annealed_anew,
    checkpoint_to_resume,
    damaged_after,
    evaluation_missed,
    found_by_first,
    read_step,
    require_own_output,
    require_seen,
)
from dyadlm.train.settings import RECORD_NAME, TrainSettings, read_record
from dyadlm.train.trainer import LanguageModelTrainer
from dyadlm.train.training_data import TrainingData
from dyadlm.version import __version__


@dataclass(frozen=True)
class TrainResult:
    """A finished run. Losses in nats per token, None where not measured.

    output: the model folder RUN. tokens: seen in all. seconds: spent training in this call.
    checkpoint: the last one. metrics: RUN/metrics.jsonl, one entry a log.
    """

    output: Path
    steps: int
    tokens: int
    seconds: float
    loss: float | None
    bits_per_byte: float | None
    validation_loss: float | None
    validation_bits_per_byte: float | None
    checkpoint: Path | None
    metrics: list[dict[str, Any]]


def train(
    settings: TrainSettings,
    data: TrainingData | None = None,
    console: Console | None = None,
    callbacks: Sequence[Callable[[LanguageModelTrainer], TrainerCallback]] = (),
) -> TrainResult:
    """Train, or go on training, and leave the finished model in `settings.output`.

    data: instead of resolving `settings.sources`. console: where progress is shown (standard error). callbacks: what
    makes more callbacks of the trainer, once the folder of the run is there.

    Raises:
        UserError: wrong settings or data, an output that already holds a run, a checkpoint of another one.
        RunFailed: the loss is not finite or rose far, or the disk is full; names the last good checkpoint.
        RunInterrupted: SIGTERM or Ctrl-C, after saving; carries the exit code.
    """
    output, first = settings.output, is_first_process()
    console = console or standard_error()
    console.quiet = console.quiet or not first
    if first:
        require_own_output(settings)
        require_writable(output / RECORD_NAME, "the run")
    if (finished := _finished(settings)) is not None:
        console.print(f"{printable(str(output))} is already finished.")
        return finished
    with preparation_progress(console) as progress:
        plan = prepare_run(settings, data, output, progress=progress)

    with contextlib.ExitStack() as closing:
        if first:
            closing.enter_context(locked(output))
            require_own_output(settings)  # once more: another run may have begun since
        resumed = found_by_first(lambda: checkpoint_to_resume(settings, plan), plan.arguments)
        require_seen(output if resumed is None else output / resumed.name, plan.arguments)
        step = read_step(resumed)
        plan.choices.extend(annealed_anew(settings, plan, step))
        for choice in plan.choices:
            console.print(choice)
        missed = found_by_first(lambda: evaluation_missed(output, step, plan.arguments), plan.arguments)
        plan.arguments.eval_on_start = plan.arguments.eval_on_start or missed
        handler = InterruptHandler()
        trainer = plan.trainer(settings, handler)
        closing.enter_context(_errors_of_the_machine(output))
        if first:
            remove_leftovers(output)
            _write_record(settings, plan, step)
            if plan.canaries is not None:
                content = json.dumps(plan.canaries.to_dict(), indent=2)
                write_atomically(output / CANARIES_NAME, content + "\n")
            for callback in (
                MetricsWriter(output, step),
                ProgressDisplay(console, plan.arguments.max_steps),
            ):
                closing.callback(callback.close)
                trainer.add_callback(callback)
        for make in callbacks:
            trainer.add_callback(make(trainer))
        for damaged in damaged_after(settings, resumed):
            console.print(f"{printable(str(damaged))} is damaged and left out; `dyadlm verify` says how.")
        if resumed is not None:
            console.print(f"Going on from {printable(str(resumed))}.")
        begin = time.perf_counter()
        context = compiling() if plan.arguments.torch_compile else contextlib.nullcontext()
        with handler, context:
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        seconds = time.perf_counter() - begin
        if handler.received and trainer.state.global_step < plan.arguments.max_steps:
            launched = ", started by torchrun or accelerate as before," if plan.arguments.world_size > 1 else ""
            raise RunInterrupted(
                f"Stopped at step {trainer.state.global_step} of {plan.arguments.max_steps} and saved; go on{launched} "
                f"with: dyadlm train --output {output} --resume (or use it as it is: "
                f"{checkpoint_path(output, trainer.state.global_step)} is a model)",
                handler.received,
            )
        return _finish(settings, plan, trainer, seconds)


def is_first_process() -> bool:
    """Of those that torchrun started; so is one that nobody started with others, whatever RANK it finds.

    Raises `UserError` where RANK and WORLD_SIZE are not those of a process among others.
    """
    rank, processes = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    if not (rank.isdecimal() and processes.isdecimal() and (processes == "1" or int(rank) < int(processes))):
        raise UserError(
            f"The environment has RANK={rank} and WORLD_SIZE={processes}, which is no process among others; start them "
            "with torchrun, or unset both."
        )
    return processes == "1" or rank == "0"


def _finished(settings: TrainSettings) -> TrainResult | None:
    """The result of a run that is already finished with these settings."""
    output = settings.output
    if not settings.resume or not (output / RECORD_NAME).is_file():
        return None
    record = read_record(output)
    if "result" not in record or record["settings"] != settings.to_dict() or not is_model_folder(output):
        return None
    return TrainResult(
        **record["result"],
        output=output,
        checkpoint=last_complete(output),
        metrics=read_metrics(output / METRICS_NAME),
    )


# ---- What a run leaves ----


def _write_record(
    settings: TrainSettings, plan: PreparedRun, step: int, result: Mapping[str, Any] | None = None
) -> None:
    """RUN/dyadlm.json: the settings, everything that followed from them, and at the end the result."""
    record = {
        "dyadlm": __version__,
        "settings": settings.to_dict(),
        "earlier": _earlier_settings(settings, step),
        "model": plan.identity["model"],
        "data": plan.identity["data"],
        "order_of_text": plan.identity["order of text"],
        "choices": plan.choices,
        "processes": plan.arguments.world_size,
        "training_arguments": plan.arguments.to_dict(),  # type: ignore[no-untyped-call]
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if result is not None:
        record["result"] = result
    write_atomically(settings.output / RECORD_NAME, json.dumps(record, indent=2, default=str) + "\n")


def _earlier_settings(settings: TrainSettings, step: int) -> list[dict[str, Any]]:
    """Which other settings the steps up to `step` were done with: {"until_step": …, "settings": …} each."""
    if not (settings.output / RECORD_NAME).is_file():
        return []
    record = read_record(settings.output)
    earlier = [entry for entry in record.get("earlier", []) if entry["until_step"] <= step]
    counted = earlier[-1]["until_step"] if earlier else 0
    if record["settings"] != settings.to_dict() and step > counted:
        earlier.append({"until_step": step, "settings": record["settings"]})
    return earlier


def _finish(settings: TrainSettings, plan: PreparedRun, trainer: LanguageModelTrainer, seconds: float) -> TrainResult:
    """Put the final model, its card and the result into RUN; that the run is finished is written last."""
    # Not the Trainer's own history: after a resume it lacks the evaluation that followed the checkpoint.
    trainer.accelerator.wait_for_everyone()
    metrics = read_metrics(settings.output / METRICS_NAME)

    def latest(name: str) -> float | None:
        return next((entry[name] for entry in reversed(metrics) if name in entry), None)

    steps = trainer.state.global_step
    result = {
        "steps": steps,
        "tokens": steps * trainer.tokens_per_step(),
        "seconds": seconds,
        "loss": latest("loss"),
        "bits_per_byte": latest("bits_per_byte"),
        "validation_loss": latest("eval_loss"),
        "validation_bits_per_byte": latest("eval_bits_per_byte"),
    }
    evaluated: dict[str, Any] = next((entry for entry in reversed(metrics) if "eval_loss" in entry), {})
    trainer.publish(_card(settings, plan, result | {"validation_of": losses_of_sources(evaluated)}))
    if trainer.is_world_process_zero():
        _write_record(settings, plan, steps, result)
    trainer.accelerator.wait_for_everyone()
    output = settings.output
    return TrainResult(
        **result,  # type: ignore[arg-type]
        output=output,
        checkpoint=found_by_first(lambda: last_complete(output), plan.arguments),
        metrics=metrics,
    )


def _title(settings: TrainSettings) -> str:
    """What the model is, in words: folders are called `run`."""
    kind = settings.preset or Path(settings.model or "").name
    sources = [Path(parse_weight(source)[0]).name for source in settings.sources]
    return f"{kind}, trained on {', '.join(sources[:3])}{' and more' if len(sources) > 3 else ''}"


def _card(settings: TrainSettings, plan: PreparedRun, result: Mapping[str, Any]) -> str:
    return model_card(
        dict(result)
        | {
            "name": _title(settings),
            "prompt": plan.prompt,
            "model_type": plan.model.config.model_type,
            "parameters": published_parameters(plan.model) - adapter_parameters(plan.model),
            "sources": settings.sources,
            "licences": plan.licences,
            "tokenizer": f"{len(plan.tokenizer):,} tokens",
            "sequence_length": settings.data.sequence_length,
            "consensus": getattr(plan.model.config, "consensus", 0),
            "adapter": settings.lora.rank,
            "base": settings.model,
            "chat": bool(plan.tokenizer.chat_template),
        }
    )


@contextlib.contextmanager
def _errors_of_the_machine(output: Path) -> Iterator[None]:
    """A full or failing disk is a failed run, whatever was being written; so is memory that is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        last = last_complete(output)
        raise RunFailed(
            f"A file could not be read or written ({error}); the last good checkpoint is {last or 'none'}. "
            "Remove the cause and go on with --resume."
        ) from error
    except (MemoryError, RuntimeError) as error:
        if (missing := memory_missing(error)) is None:
            raise
        raise RunFailed(
            f"{missing}; the last good checkpoint is {last_complete(output) or 'none'}. Go on with --resume, a smaller "
            "per_device_train_batch_size and more gradient_accumulation_steps; their product has to stay."
        ) from error
