"""A training run from its settings to the finished model folder."""

import contextlib
import json
import math
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
from transformers import TrainerCallback, TrainingArguments

from dyadlm.console import standard_error
from dyadlm.data.canaries import CANARIES_NAME
from dyadlm.data.progress import preparation_progress
from dyadlm.data.resolve import parse_weight
from dyadlm.errors import RunFailed, UserError
from dyadlm.files import STAGING_PREFIX, locked, printable, require_new, require_writable, write_atomically
from dyadlm.model.adapters import adapter_parameters
from dyadlm.model.configuration import CHOOSING, DyadConfig
from dyadlm.model.loading import is_model_folder
from dyadlm.train.checkpoint import (
    checkpoint_path,
    checkpoints,
    last_complete,
    read_manifest,
    remove_leftovers,
    require_same,
)
from dyadlm.train.companions import published_parameters
from dyadlm.train.compiler import compiling
from dyadlm.train.export import model_card
from dyadlm.train.interrupt import InterruptHandler, RunInterrupted
from dyadlm.train.prepared_run import PreparedRun, prepare_run
from dyadlm.train.progress import METRICS_NAME, MetricsWriter, ProgressDisplay, losses_of_sources, read_metrics
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
    output, first = settings.output, _rank() == 0
    console = console or standard_error()
    console.quiet = console.quiet or not first
    if first:
        _require_own_output(settings)
        require_writable(output / RECORD_NAME, "the run")
    if (finished := _finished(settings)) is not None:
        console.print(f"{printable(str(output))} is already finished.")
        return finished
    with preparation_progress(console) as progress:
        plan = prepare_run(settings, data, output, progress=progress)

    with contextlib.ExitStack() as closing:
        if first:
            closing.enter_context(locked(output))
            _require_own_output(settings)  # once more: another run may have begun since
        resumed = _checkpoint_to_resume(settings, plan)
        step = read_step(resumed)
        plan.choices.extend(_annealed_anew(settings, plan, step))
        for choice in plan.choices:
            console.print(choice)
        missed = _evaluation_missed(output, step, plan.arguments)
        plan.arguments.eval_on_start = plan.arguments.eval_on_start or missed
        handler = InterruptHandler()
        trainer = plan.trainer(settings, handler)
        closing.enter_context(_disk_errors(output))
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
        for damaged in _damaged_after(settings, resumed):
            console.print(f"{printable(str(damaged))} is damaged and left out; `dyadlm verify` says how.")
        if resumed is not None:
            console.print(f"Going on from {printable(str(resumed))}.")
        begin = time.perf_counter()
        context = compiling() if plan.arguments.torch_compile else contextlib.nullcontext()
        with handler, context:
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        seconds = time.perf_counter() - begin
        if trainer.state.global_step < plan.arguments.max_steps:
            raise RunInterrupted(
                f"Stopped at step {trainer.state.global_step} of {plan.arguments.max_steps} and saved; go on with: "
                f"dyadlm train --output {output} --resume (or use it as it is: "
                f"{checkpoint_path(output, trainer.state.global_step)} is a model)",
                handler.received,
            )
        return _finish(settings, plan, trainer, seconds)


# ---- What is there already ----


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _require_own_output(settings: TrainSettings) -> None:
    """Refuse an output that holds something else than a run to resume; a cut-off beginning counts as empty."""
    output = settings.output
    if (output / RECORD_NAME).is_file():
        if not settings.resume:
            raise UserError(f"{output} already holds a run; add --resume to go on, or choose another --output.")
    elif not output.is_dir() or not all(path.name.startswith(STAGING_PREFIX) for path in output.iterdir()):
        require_new(output, "the run")


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


def _checkpoint_to_resume(settings: TrainSettings, plan: PreparedRun) -> Path | None:
    """The newest complete checkpoint; None: begin at step 0. Raises `UserError` if it is of another run."""
    if not settings.resume:
        return None
    path, identity = last_complete(settings.output), plan.identity
    if path is not None and (manifest := read_manifest(path)) is not None:
        found = manifest["identity"]
        if identity["model"].get("model_type") == DyadConfig.model_type:
            # Fields that a checkpoint does not name are younger than it.
            defaults = DyadConfig().to_dict()
            younger = {name: defaults[name] for name in identity["model"] if name in defaults}
            found = found | {"model": younger | found["model"]}
        if isinstance(found["order of text"].get("rows_carried"), dict):
            # Earlier versions did not write which rows a process had; it goes on with those of its own number.
            rows = {"processes": plan.arguments.world_size, "rows": plan.arguments.train_batch_size}
            identity = identity | {"order of text": identity["order of text"] | {"rows_carried": rows}}
        require_same(found, identity, path)
    return path


def _damaged_after(settings: TrainSettings, resumed: Path | None) -> list[Path]:
    """Newer checkpoints than the one to resume from, which were passed over."""
    step = read_step(resumed)
    return [path for number, path in checkpoints(settings.output).items() if number > step] if settings.resume else []


def read_step(checkpoint: Path | None) -> int:
    """The step a checkpoint was made at; 0 for none."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def _annealed_anew(settings: TrainSettings, plan: PreparedRun, step: int) -> list[str]:
    """What goes by the part of all steps that are done, if it goes on over another number of them than it began with.

    Where a run is made longer, fingerprints and a teacher that had left come back.
    """
    if not step or not (settings.output / RECORD_NAME).is_file():
        return []
    steps = plan.arguments.max_steps
    before = read_record(settings.output).get("training_arguments", {}).get("max_steps", steps)
    if before == steps:
        return []
    annealed = []
    if (kind := plan.identity["model"].get("selector")) in CHOOSING:
        annealed.append((f"selector {kind}: annealed", ""))
    if settings.fingerprint.shown and settings.fingerprint.cooldown:
        annealed.append(("fingerprints: shown", f"the first {1 - settings.fingerprint.cooldown:.0%} of "))
    if settings.planner.teacher:
        annealed.append(("teacher: sees the true future", f"the first {settings.planner.teacher_until:.0%} of "))
    return [
        f"{what} over {part}{before} steps until step {step}, over {part}{steps} from there on"
        for what, part in annealed
    ]


def _evaluation_missed(output: Path, step: int, arguments: TrainingArguments) -> bool:
    """Whether the run was cut off between saving at `step` and the evaluation that was to follow."""
    every = arguments.eval_steps or 0
    every = every if every >= 1 else math.ceil(every * arguments.max_steps)
    due = step == arguments.max_steps or (every and step % every == 0)
    if not step or not due or arguments.eval_strategy == "no" or step < arguments.eval_delay:
        return False
    path = output / METRICS_NAME
    lines = read_metrics(path) if path.exists() else []
    return not any(line["step"] == step and "eval_loss" in line for line in lines)


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
        checkpoint=last_complete(output),
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
def _disk_errors(output: Path) -> Iterator[None]:
    """A full or failing disk is a failed run, whatever was being written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        last = last_complete(output)
        raise RunFailed(
            f"A file could not be read or written ({error}); the last good checkpoint is {last or 'none'}. "
            "Remove the cause and go on with --resume."
        ) from error
