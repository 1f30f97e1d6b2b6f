"""The keys of settings: which are taken, what is meant by others, and which values of `TrainingArguments` fit."""

import difflib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from dyadlm.errors import UserError
from dyadlm.model import DyadConfig
from dyadlm.train.options import NAMESPACES, require
from dyadlm.values import coerce, nearest

# Keys of TrainingArguments that would break what a run promises, or that another option decides.
DECIDED_ELSEWHERE = {
    "output_dir": "use --output",
    "resume_from_checkpoint": "use --resume",
    "use_cpu": "use --device cpu",
    "fp16": "use --dtype bfloat16",
    "fp16_full_eval": "use --dtype bfloat16",
    "bf16_full_eval": "use --dtype bfloat16",
    "do_train": "`dyadlm train` trains",
    "do_eval": "set eval_steps",
    "do_predict": "use `dyadlm evaluate`",
    "save_strategy": "set save_steps",
    "eval_strategy": "set eval_steps (0 turns evaluation off)",
    "logging_strategy": "set logging_steps",
    "data_seed": "the order of the text follows from seed",
    "save_only_model": "checkpoints are always complete for resuming",
    "load_best_model_at_end": "every RUN/checkpoint-N can be loaded or exported by itself",
    "lr_scheduler_type": "set train.schedule",
    "lr_scheduler_kwargs": "set train.final_learning_rate and train.decay_fraction",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "push_to_hub": "use `dyadlm export` and upload the folder",
    "auto_find_batch_size": "set per_device_train_batch_size, so that the run can be repeated",
    "ignore_data_skip": "a resumed run always goes on with the text that follows",
    "train_sampling_strategy": "the order of the text follows from seed",
    "remove_unused_columns": "windows hold only what the model takes",
    "label_names": "the labels of a language model are `labels`",
    "enable_jit_checkpoint": "a signal already saves a checkpoint",
    "deepspeed": "set fsdp and fsdp_config",
    "report_to": "metrics go to metrics.jsonl and TensorBoard",
    "disable_tqdm": "progress is shown by dyadlm",
    "local_rank": "start with torchrun",
}

# What other programs call some keys.
ALIASES = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "bs": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "iters": "max_steps",
    "warmup": "warmup_steps",
    "wd": "weight_decay",
    "block_size": "data.sequence_length",
    "seq_len": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "context_length": "data.sequence_length",
    "n_layer": "model.num_hidden_layers",
    "n_embd": "model.hidden_size",
    "d_model": "model.hidden_size",
}


def nearest_key(key: str, known: Iterable[str]) -> str:
    """The end of a sentence that refuses a key: what was meant, in any namespace, or where all keys are listed."""
    ours = [f"{space}.{entry.name}" for space, kind in NAMESPACES.items() for entry in fields(kind)]
    everywhere = [*known, *ours, *(f"model.{name}" for name in DyadConfig.field_types())]
    space, _, own = key.rpartition(".")
    meant = ALIASES.get(own.lower())
    same = [name for name in everywhere if name.rpartition(".")[2] == own]
    if meant is None and same:
        meant = max(same, key=lambda name: difflib.SequenceMatcher(None, space, name.rpartition(".")[0]).ratio())
    if meant is not None:
        return f"; the nearest is {meant}"
    return nearest(key, everywhere) or "; docs/settings.md lists all keys"


def argument_of(key: str, value: Any) -> Any:
    """The value of a field of `TrainingArguments`. Raises `UserError` for a key or a value that is not taken."""
    # FSDP is switched on with true, although its annotation still says text.
    hints = typing.get_type_hints(TrainingArguments) | {"fsdp": bool | str | None}
    known = [entry.name for entry in fields(TrainingArguments) if entry.init]
    if key in DECIDED_ELSEWHERE or key.startswith(("hub_", "trackio_")):
        reason = DECIDED_ELSEWHERE.get(key, "nothing is uploaded")
        raise UserError(f"The key {key} is not for --set: {reason}.")
    if key not in known:
        raise UserError(f"There is no key {key}{nearest_key(key, known)}.")
    return coerce(value, hints[key], key)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise `UserError` for a value, by key of `TrainingArguments`, with which no run can be."""
    counts = ("max_steps", "per_device_train_batch_size", "per_device_eval_batch_size")
    for key in (*counts, "gradient_accumulation_steps", "save_steps"):
        require(arguments.get(key, 1) >= 1, f"{key} must be at least 1")
    for key in ("learning_rate", "logging_steps", "num_train_epochs"):
        require(arguments.get(key, 1) > 0, f"{key} must be above 0")
    for key in ("adam_epsilon", "dataloader_num_workers", "max_grad_norm", "warmup_steps", "weight_decay"):
        require(arguments.get(key, 0) >= 0, f"{key} must be 0 or more")
    for key in ("adam_beta1", "adam_beta2"):
        require(0 <= arguments.get(key, 0) < 1, f"{key} must be at least 0 and below 1")
    every = arguments["eval_steps"]
    require(
        every is not None and every >= 0 and (every < 1 or every == int(every)),
        "eval_steps must be a whole number, a fraction of all steps below 1, or 0 (never)",
    )
    require(0 <= arguments["seed"] < 2**32, f"seed must be at least 0 and below {2**32}")
    limit = arguments.get("save_total_limit")
    require(limit is None or limit >= 1, "save_total_limit must be at least 1")
