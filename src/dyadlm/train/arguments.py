"""The arguments of Hugging Face's Trainer, and the choice of device and dtype, with the reasons."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from dyadlm.errors import UserError
from dyadlm.model.adapters import is_adapted
from dyadlm.train.compiler import require_compiler
from dyadlm.train.muon import muon_optimizer
from dyadlm.train.options import TrainOptions
from dyadlm.train.settings import RECORD_NAME, TrainSettings, read_record
from dyadlm.train.shards import require_shards


def training_arguments(settings: TrainSettings, output: Path) -> tuple[TrainingArguments, list[str]]:
    """The arguments for Hugging Face, and why device and dtype were chosen. Raises `UserError`."""
    device, why_device = choose_device(settings.device)
    values = dict(settings.arguments)
    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    for former in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        # Newer transformers take the former name too, but warn.
        name = former.replace("gradient", "activation")
        if former in values and name in known:
            values[name] = values.pop(former)
    compiles = settings.train.compile or bool(values.pop("torch_compile", False))
    if compiles and device == "cpu":
        require_compiler()
    before = None
    if settings.resume and (output / RECORD_NAME).is_file():
        before = bool(read_record(output).get("training_arguments", {}).get("bf16"))
    dtype, why_dtype = choose_dtype(settings.dtype, values.pop("bf16", None), device, before)
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
            # Other processes say no more than the first: what they have to warn of is the same.
            **{"max_steps": 1, "ddp_find_unused_parameters": False, "log_level_replica": "passive", **values},
            torch_compile=compiles,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"These settings do not fit together: {error}") from error
    # Else the environment decides where there is no bf16: `accelerate launch --mixed_precision`.
    arguments.mixed_precision = "bf16" if arguments.bf16 else "no"
    if arguments.n_gpu > 1:
        # One process uses one GPU; several are for torchrun, not for DataParallel.
        arguments._n_gpu = 1
    if total := settings.train.windows_per_step:
        batches = arguments.gradient_accumulation_steps * arguments.world_size
        if total % batches:
            raise UserError(
                f"train.windows_per_step={total} cannot be shared out evenly among {batches} batches (processes × "
                "gradient_accumulation_steps); choose a multiple of them."
            )
        arguments.per_device_train_batch_size = total // batches
    choices = [f"device {device}: {why_device}", f"dtype {dtype}: {why_dtype}"]
    if (processes := arguments.world_size) > 1:
        share = arguments.train_batch_size * arguments.gradient_accumulation_steps
        choices.append(f"processes {processes}: each takes {share} of the {processes * share} windows of a step")
    return arguments, choices


def choose_device(asked: str) -> tuple[str, str]:
    """The device and why. Raises `UserError` if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        chosen = next(name for name, there in available.items() if there)
        return chosen, "no GPU was found" if chosen == "cpu" else "a GPU was found"
    if not available[asked]:
        raise UserError(f"There is no {asked} device here; use --device cpu or --device auto.")
    if asked == "mps" and available["cuda"]:
        raise UserError("Both cuda and mps are here; use --device cuda.")
    return asked, "as asked"


def choose_dtype(asked: str, bf16: bool | None, device: str, before: bool | None = None) -> tuple[str, str]:
    """What the model computes in (weights stay float32) and why.

    bf16: the key of that name, None if not given. before: whether the run that is resumed computed in bfloat16; None
        for a new one.
    """
    if asked == "auto" and bf16 is None:
        if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the GPU computes in it; weights and optimizer stay float32"
        if device == "cpu" and before is not None:
            return "bfloat16" if before else "float32", "as the run began"
        if device == "cpu" and has_bfloat16():
            return (
                "bfloat16",
                "weights and optimizer stay float32; --dtype float32 turns it off",
            )
        return "float32", f"the most exact; here bfloat16 is not faster on {device}"
    wanted = asked if asked != "auto" else "bfloat16" if bf16 else "float32"
    if bf16 is not None and (wanted == "bfloat16") != bf16:
        raise UserError(f"--dtype {asked} and bf16={str(bf16).lower()} contradict each other; give one of them.")
    return wanted, "as asked"


def has_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16; without them it is slower than float32."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def require_optimizer(arguments: TrainingArguments, model: PreTrainedModel, options: TrainOptions) -> None:
    """Raise `UserError` before anything is written, where Trainer would fail on its way into the first step."""
    if arguments.fsdp:
        require_shards()
    if options.ema and arguments.fsdp:
        raise UserError("train.ema averages whole weights, which FSDP shards; leave fsdp or train.ema out.")
    if options.base_width:
        require_width(options.base_width, model)
    sharding = arguments.fsdp_config if isinstance(arguments.fsdp_config, dict) else {}
    if arguments.fsdp and int(sharding.get("version", 2)) < 2 and (options.optimizer == "muon" or options.base_width):
        asked = "Muon" if options.optimizer == "muon" else "train.base_width"
        raise UserError(f"FSDP 1 flattens matrices, which {asked} needs whole; leave fsdp_config.version out.")
    if options.optimizer == "muon":
        muon_optimizer(model, arguments)
        return
    try:
        kind, values = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        if kind.__module__.startswith("torch."):  # others may want parameters in forms of their own
            kind(model.parameters(), **values)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"There can be no such optimizer: {error}") from error
    if options.base_width and kind is not torch.optim.AdamW:
        asked = OptimizerNames(arguments.optim).value
        raise UserError(f"train.base_width is for AdamW and Muon; leave it out, or optim={asked}.")


def require_width(base: int, model: PreTrainedModel) -> None:
    """Raise `UserError` for a train.base_width that cannot be of this model."""
    width = getattr(model.config, "hidden_size", None)
    if is_adapted(model):
        raise UserError("train.base_width is for whole matrices, not for adapters; leave it out, or lora.rank.")
    if width is None:
        raise UserError("train.base_width needs a model whose config has a hidden_size; leave it out.")
    if base > width:
        raise UserError(
            f"train.base_width={base} is the width of a narrower model, and this one has {width}; leave it out."
        )
