"""A training run from its settings to the finished model folder."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from rich.console import Console
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from dyadlm.data import TokenStream, TrainingWindows, resolve_data
from dyadlm.errors import RunFailed, UserError
from dyadlm.evaluate.evaluation import prefix_token, require_vocabulary
from dyadlm.files import STAGING_PREFIX, require_new, write_atomically
from dyadlm.model import DyadConfig, DyadForCausalLM
from dyadlm.train.canaries import CanaryPlan, PlantedWindows, plan_canaries
from dyadlm.train.checkpoint import last_complete, read_manifest, remove_leftovers, require_same
from dyadlm.train.export import CANARIES_NAME, model_card
from dyadlm.train.interrupt import InterruptHandler, RunInterrupted
from dyadlm.train.progress import (
    METRICS_NAME,
    MetricsWriter,
    ProgressDisplay,
    read_metrics,
    without_bars_of_transformers,
)
from dyadlm.train.settings import RECORD_NAME, TrainSettings, read_record
from dyadlm.train.trainer import LanguageModelTrainer
from dyadlm.train.validation import ValidationSample
from dyadlm.version import __version__

# Weights, gradients and the two moments of AdamW, float32.
STATIC_BYTES_PER_PARAMETER = 16
# A dry run times this many steps after a first one, which also warms caches and compilers.
TIMED_STEPS = 3
# Bytes per token is taken from the beginning of each stream.
SAMPLED_TOKENS = 2**20
# Fields of a configuration that say nothing of what is computed.
INCIDENTAL_FIELDS = ("transformers_version", "_name_or_path", "architectures", "dtype", "use_cache")


@dataclass(frozen=True)
class TrainingData:
    """What a run reads. id: changes when the text or its tokens do.

    train: streams with their weights in the mixture. licences: of the texts, for the model card.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Sequence[tuple[TokenStream, float]]
    validation: Sequence[TokenStream]
    id: str
    licences: Sequence[str] = ()


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


@dataclass(frozen=True)
class _Plan:
    """All that a run consists of, before anything is written."""

    arguments: TrainingArguments
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    windows: Dataset[dict[str, torch.Tensor]]
    validation: ValidationSample | None
    bytes_per_token: float
    canaries: CanaryPlan | None
    licences: Sequence[str]
    identity: dict[str, Any]
    choices: list[str]


def train(settings: TrainSettings, data: TrainingData | None = None, console: Console | None = None) -> TrainResult:
    """Train, or go on training, and leave the finished model in `settings.output`.

    data: instead of resolving `settings.sources`. console: where progress is shown (standard error).

    Raises:
        UserError: wrong settings or data, an output that already holds a run, a checkpoint of another one.
        RunFailed: the loss is not finite or rose far, or the disk is full; names the last good checkpoint.
        RunInterrupted: SIGTERM or Ctrl-C, after saving; carries the exit code.
    """
    output, first = settings.output, _rank() == 0
    console = console or Console(stderr=True)
    console.quiet = console.quiet or not first
    if first:
        _require_own_output(settings)
    if (finished := _finished(settings)) is not None:
        console.print(f"{output} is already finished.")
        return finished
    plan = _plan(settings, data, output)
    for choice in plan.choices:
        console.print(choice, highlight=False)

    resumed = _checkpoint_to_resume(settings, plan.identity)
    step = read_step(resumed)
    missed = _evaluation_missed(output, step, plan.arguments)
    plan.arguments.eval_on_start = plan.arguments.eval_on_start or missed
    handler = InterruptHandler()
    trainer = _trainer(settings, plan, handler)
    with contextlib.ExitStack() as closing, _disk_errors(output):
        if first:
            remove_leftovers(output)
            _write_record(settings, plan)
            if plan.canaries is not None:
                content = json.dumps(plan.canaries.to_dict(), indent=2)
                write_atomically(output / CANARIES_NAME, content + "\n")
            for callback in (
                MetricsWriter(output, step),
                ProgressDisplay(console, plan.arguments.max_steps),
            ):
                closing.callback(callback.close)
                trainer.add_callback(callback)
        if resumed is not None:
            console.print(f"Going on from {resumed}.", highlight=False)
        begin = time.perf_counter()
        with handler:
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        seconds = time.perf_counter() - begin
        if trainer.state.global_step < plan.arguments.max_steps:
            raise RunInterrupted(
                f"Stopped at step {trainer.state.global_step} of {plan.arguments.max_steps} and saved; "
                f"go on with: dyadlm train --output {output} --resume",
                handler.received,
            )
        return _finish(settings, plan, trainer, seconds)


def dry_run(settings: TrainSettings, data: TrainingData | None = None) -> dict[str, Any]:
    """What a run would cost, from a few timed steps of it on the target device; nothing is left behind.

    Returns parameters, static_memory_bytes (weights, gradients, moments), peak_memory_bytes (measured; on a
    CPU that of the whole process), steps, tokens, tokens_per_step, seconds_per_step, seconds (all steps,
    without evaluations and checkpoints), choices (device and dtype with reasons).
    """
    with tempfile.TemporaryDirectory() as folder:
        plan = _plan(settings, data, Path(folder))
        steps = plan.arguments.max_steps
        plan.arguments.max_steps = min(steps, 1 + TIMED_STEPS)
        plan.arguments.save_strategy = plan.arguments.eval_strategy = "no"
        clock = _StepClock()
        trainer = _trainer(settings, plan, clock)
        if plan.arguments.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        per_step = trainer.tokens_per_step()
        parameters = sum(weight.numel() for weight in plan.model.parameters())
        seconds = statistics.median(clock.seconds[1:] or clock.seconds)
        return {
            "parameters": parameters,
            "static_memory_bytes": STATIC_BYTES_PER_PARAMETER * parameters,
            "peak_memory_bytes": _peak_memory(plan.arguments.device),
            "steps": steps,
            "tokens_per_step": per_step,
            "tokens": steps * per_step,
            "seconds_per_step": seconds,
            "seconds": steps * seconds,
            "choices": plan.choices,
        }


class _StepClock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
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


# ---- Before anything is written ----


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
    if "result" not in record or record["settings"] != settings.to_dict():
        return None
    return TrainResult(
        **record["result"],
        output=output,
        checkpoint=last_complete(output),
        metrics=read_metrics(output / METRICS_NAME),
    )


def _plan(settings: TrainSettings, data: TrainingData | None, output: Path) -> _Plan:
    arguments, choices = _training_arguments(settings, output)
    with arguments.main_process_first(local=False, desc="preparing the data"):
        data = data or _resolve(settings)
    options = settings.data
    batch = max(1, arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size)
    if "max_steps" not in settings.arguments:
        tokens = sum(len(stream) for stream, _ in data.train) * arguments.num_train_epochs
        arguments.max_steps = max(1, math.ceil(tokens / (batch * options.sequence_length)))

    set_seed(arguments.seed)
    model = _model(settings, data.tokenizer)
    windows: Dataset[dict[str, torch.Tensor]] = TrainingWindows(
        data.train,
        options.sequence_length,
        length=arguments.max_steps * batch,
        seed=arguments.seed,
        document_reset=options.document_reset,
    )
    canaries = None
    if options.canaries:
        canaries = plan_canaries(
            options.canaries,
            arguments.seed,
            data.tokenizer,
            arguments.max_steps * batch,
            options.sequence_length,
        )
        windows = PlantedWindows(windows, canaries)
    validation = None
    if streams := [stream for stream in data.validation if len(stream)]:
        validation = ValidationSample.draw(
            streams, options.sequence_length, options.validation_tokens, prefix_token(data.tokenizer)
        )
    evaluated = validation is not None and arguments.eval_steps
    arguments.eval_strategy = transformers.IntervalStrategy("steps" if evaluated else "no")
    order = {
        "seed": arguments.seed,
        "sequence_length": options.sequence_length,
        "windows_per_step": batch,
        "document_reset": options.document_reset,
        "canaries": options.canaries and [options.canaries, arguments.max_steps],
    }
    identity = {"order of text": order, "data": data.id, "model": _configuration(model)}
    return _Plan(
        arguments=arguments,
        model=model,
        tokenizer=data.tokenizer,
        windows=windows,
        validation=validation,
        bytes_per_token=_bytes_per_token(data.train),
        canaries=canaries,
        licences=data.licences,
        identity=json.loads(json.dumps(identity)),
        choices=choices,
    )


def _resolve(settings: TrainSettings) -> TrainingData:
    """The sources under the model's own tokenizer, or for a new model under the one asked for."""
    tokenizer = settings.data.tokenizer
    if settings.model is not None:
        if tokenizer is not None:
            raise UserError("A model to continue from has its own tokenizer; leave data.tokenizer out.")
        tokenizer = settings.model
    resolved = resolve_data(settings.sources, tokenizer)
    datasets = [dataset.manifest for dataset in resolved.datasets]
    weights = [weight for _, weight in resolved.train]
    mixture = [[data.dataset_id, weight] for data, weight in zip(datasets, weights, strict=True)]
    return TrainingData(
        tokenizer=resolved.tokenizer,
        train=resolved.train,
        validation=resolved.validation,
        id=hashlib.sha256(json.dumps(mixture).encode()).hexdigest(),
        licences=sorted({source["licence"] for data in datasets for source in data.sources}),
    )


def _training_arguments(settings: TrainSettings, output: Path) -> tuple[TrainingArguments, list[str]]:
    """The arguments for Hugging Face, and why device and dtype were chosen."""
    device, why_device = _choose_device(settings.device)
    values = dict(settings.arguments)
    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    for former in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        # Newer transformers take the former name too, but warn.
        name = former.replace("gradient", "activation")
        if former in values and name in known:
            values[name] = values.pop(former)
    dtype, why_dtype = _choose_dtype(settings.dtype, values.pop("bf16", None), device)
    try:
        arguments = TrainingArguments(
            output_dir=str(output),
            use_cpu=device == "cpu",
            bf16=dtype == "bfloat16",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            # A loss that is not finite ends the run instead of vanishing from the average.
            logging_nan_inf_filter=False,
            **{"max_steps": 1, "ddp_find_unused_parameters": False, **values},
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"These settings do not fit together: {error}") from error
    if arguments.n_gpu > 1:
        # One process uses one GPU; several are for torchrun, not for DataParallel.
        arguments._n_gpu = 1
    return arguments, [f"device {device}: {why_device}", f"dtype {dtype}: {why_dtype}"]


def _choose_device(asked: str) -> tuple[str, str]:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        chosen = next(name for name, there in available.items() if there)
        return chosen, "no GPU was found" if chosen == "cpu" else "a GPU was found"
    if not available[asked]:
        raise UserError(f"There is no {asked} device here; use --device cpu or --device auto.")
    if asked == "mps" and available["cuda"]:
        raise UserError("Both cuda and mps are here; use --device cuda.")
    return asked, "as asked"


def _choose_dtype(asked: str, bf16: bool | None, device: str) -> tuple[str, str]:
    if asked == "auto" and bf16 is None:
        if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the GPU computes in it; weights and optimizer stay float32"
        return "float32", f"the most exact; on {device} bfloat16 is rarely faster"
    wanted = asked if asked != "auto" else "bfloat16" if bf16 else "float32"
    if bf16 is not None and (wanted == "bfloat16") != bf16:
        raise UserError(f"--dtype {asked} and bf16={str(bf16).lower()} contradict each other; give one of them.")
    return wanted, "as asked"


def _model(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A new model of the preset, or the weights of a folder, in float32."""
    if settings.preset is not None:
        fields: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": settings.data.sequence_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        model: PreTrainedModel = DyadForCausalLM(
            DyadConfig.from_preset(settings.preset, **(fields | settings.model_fields))
        )
    else:
        model = load_model(Path(settings.model or ""), **settings.model_fields)
    require_vocabulary(model, tokenizer)
    return model


def load_model(folder: Path, **fields: Any) -> PreTrainedModel:
    """Any causal LM of transformers from a local folder, float32, safetensors only, no code from the folder.

    fields: of its configuration, to override. Raises `UserError` if the folder holds no such model.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model folder: it holds no config.json.")
    try:
        with without_bars_of_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **fields,
            )
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise UserError(f"The model in {folder} cannot be loaded: {error}") from error
    model, report = loaded
    if report["missing_keys"]:
        raise UserError(f"The weights in {folder} lack {min(report['missing_keys'])}; the folder is damaged.")
    return cast(PreTrainedModel, model)


def _configuration(model: PreTrainedModel) -> dict[str, Any]:
    return {name: value for name, value in model.config.to_dict().items() if name not in INCIDENTAL_FIELDS}


def _bytes_per_token(streams: Sequence[tuple[TokenStream, float]]) -> float:
    """Of the mixture, from the beginning of each stream."""
    total = sum(weight for _, weight in streams)
    sizes = [min(len(stream), SAMPLED_TOKENS) for stream, _ in streams]
    return sum(
        weight / total * stream.bytes_of(0, size) / size for (stream, weight), size in zip(streams, sizes, strict=True)
    )


def _checkpoint_to_resume(settings: TrainSettings, identity: Mapping[str, Any]) -> Path | None:
    """The newest complete checkpoint; None: begin at step 0. Raises `UserError` if it is of another run."""
    if not settings.resume:
        return None
    path = last_complete(settings.output)
    if path is not None and (manifest := read_manifest(path)) is not None:
        require_same(manifest["identity"], identity, path)
    return path


def read_step(checkpoint: Path | None) -> int:
    """The step a checkpoint was made at; 0 for none."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def _evaluation_missed(output: Path, step: int, arguments: TrainingArguments) -> bool:
    """Whether the run was cut off between saving at `step` and the evaluation that was to follow."""
    every = arguments.eval_steps or 0
    every = every if every >= 1 else math.ceil(every * arguments.max_steps)
    due = step == arguments.max_steps or (every and step % every == 0)
    if not step or not due or arguments.eval_strategy == "no":
        return False
    path = output / METRICS_NAME
    lines = read_metrics(path) if path.exists() else []
    return not any(line["step"] == step and "eval_loss" in line for line in lines)


# ---- The run ----


def _trainer(settings: TrainSettings, plan: _Plan, callback: TrainerCallback) -> LanguageModelTrainer:
    try:
        return LanguageModelTrainer(
            plan.model,
            plan.arguments,
            settings.train,
            plan.windows,
            plan.tokenizer,
            validation=plan.validation,
            bytes_per_token=plan.bytes_per_token,
            identity=plan.identity,
            callbacks=[callback],
        )
    except ValueError as error:
        raise UserError(f"These settings do not fit together: {error}") from error


def _write_record(settings: TrainSettings, plan: _Plan, result: Mapping[str, Any] | None = None) -> None:
    """RUN/dyadlm.json: the settings, everything that followed from them, and at the end the result."""
    record = {
        "dyadlm": __version__,
        "settings": settings.to_dict(),
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


def _finish(settings: TrainSettings, plan: _Plan, trainer: LanguageModelTrainer, seconds: float) -> TrainResult:
    """Put the final model, its card and the result into RUN; that the run is finished is written last."""
    history = trainer.state.log_history

    def latest(name: str) -> float | None:
        return next((entry[name] for entry in reversed(history) if name in entry), None)

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
    trainer.publish(_card(settings, plan, result))
    if trainer.is_world_process_zero():
        _write_record(settings, plan, result)
    trainer.accelerator.wait_for_everyone()
    output = settings.output
    return TrainResult(
        **result,  # type: ignore[arg-type]
        output=output,
        checkpoint=last_complete(output),
        metrics=read_metrics(output / METRICS_NAME),
    )


def _card(settings: TrainSettings, plan: _Plan, result: Mapping[str, Any]) -> str:
    return model_card(
        dict(result)
        | {
            "name": settings.output.resolve().name,
            "model_type": plan.model.config.model_type,
            "parameters": sum(weight.numel() for weight in plan.model.parameters()),
            "sources": settings.sources,
            "licences": plan.licences,
            "tokenizer": f"{len(plan.tokenizer):,} tokens",
            "sequence_length": settings.data.sequence_length,
        }
    )


@contextlib.contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """A full or failing disk is a failed run, whatever was being written."""
    try:
        yield
    except OSError as error:
        last = last_complete(output)
        raise RunFailed(
            f"A file could not be read or written ({error}); the last good checkpoint is {last or 'none'}. "
            "Remove the cause and go on with --resume."
        ) from error
