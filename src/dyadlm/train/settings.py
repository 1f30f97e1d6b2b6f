"""The settings of a training run: one flat list of keys, from the command line, a file or an earlier run.

Keys are the names of `transformers.TrainingArguments` (`max_steps`, `learning_rate`, …), `model.FIELD` for
the configuration of the model, and one namespace for each part of ours (`data.FIELD`, `train.FIELD`, see
`NAMESPACES`).
"""

import difflib
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from transformers import TrainingArguments

from dyadlm.errors import UserError
from dyadlm.model import DyadConfig
from dyadlm.values import coerce, nearest, parse_assignment

RECORD_NAME = "dyadlm.json"


@dataclass(frozen=True)
class DataOptions:
    """Keys `data.FIELD`.

    sequence_length: tokens of a training window.
    document_reset: send `position_ids` that restart at 0 with every document: nothing crosses its edge.
    tokenizer: for a new model: "byte", a Hugging Face name or a folder; none takes what the data says.
    canaries: random strings planted for each number of repetitions (`dyadlm.data.canaries`); 0 is none.
    validation_tokens: tokens of the validation split scored during training, spread evenly over it.
    text_field: the field with the text in JSON and Parquet.
    most_decompressed: how many bytes of text one byte of a compressed file may stand for.
    stream: read the sources while training, in their own order, without preparing them (`dyadlm.data.streaming`).
        Weights are shares of passages (documents, or a megabyte of longer ones). The beginning of each source, of
        validation_tokens in all, is held out for validation.
    """

    sequence_length: int = 256
    document_reset: bool = False
    tokenizer: str | None = None
    canaries: int = 0
    validation_tokens: int = 65_536
    text_field: str = "text"
    most_decompressed: float = 250.0
    stream: bool = False

    def __post_init__(self) -> None:
        _require(self.sequence_length >= 2, "data.sequence_length must be at least 2")
        _require(self.canaries >= 0, "data.canaries must be 0 or more")
        _require(self.validation_tokens >= 1, "data.validation_tokens must be at least 1")
        _require(self.most_decompressed > 0, "data.most_decompressed must be above 0")


@dataclass(frozen=True)
class TrainOptions:
    """Keys `train.FIELD`.

    optimizer: adamw, or muon for matrices and AdamW for all else (`dyadlm.train.muon`), with the same learning_rate and
        weight_decay.
    base_width: the `hidden_size` of the narrower model that learning_rate was found with. The rate of the linear
        maps inside the model then falls with the width: as base_width / hidden_size with AdamW (as in muP, Yang et al.
        2022, arXiv 2203.03466), as the square root of this ratio with Muon. 0: one rate for all weights.
    ema: decay of an exponential average of the weights, which is evaluated and published in their place; 0: none.
    schedule: the learning rate after its linear warm-up; wsd is stable and then decays linearly.
    final_learning_rate: the fraction of `learning_rate` at which the schedule ends, one step after the last.
    decay_fraction: the fraction of all steps that the decay of wsd takes.
    log_spaced_checkpoints: also save at steps 1, 2, 4 … 512; `save_total_limit` does not touch these.
    divergence_rise: nats by which the mean loss between two logs may exceed the lowest one; 0: no check.
    carry_state: rows of a batch are lanes through the text: each window goes on where its row stood in the step before,
        with the state the model had there, through which no gradient flows. For dyadlm models alone.
    history_weight: p: a token after h tokens that the model has seen (of its document or lane, carried ones included)
        counts (h / data.sequence_length)^p, at most 1, in the loss that is minimised, over the mean of these weights;
        0: all count alike. The `loss` that is logged stays the mean over all tokens alike.
    goldfish: k: one target in k counts for nothing, by a hash of the tokens before it, so that the same text always
        loses the same ones (Hans et al. 2024, arXiv 2406.10209); 0: all count.
    compile: compile the model with torch.compile, which takes a minute at first and needs a C++ compiler on a CPU.
    windows_per_step: of all processes together. per_device_train_batch_size follows from it and the number of
        processes, so that a run goes on with another number of them; 0: the batches of all processes.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    base_width: int = 0
    ema: float = 0.0
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    final_learning_rate: float = 0.1
    decay_fraction: float = 0.2
    log_spaced_checkpoints: bool = False
    divergence_rise: float = 2.0
    carry_state: bool = False
    history_weight: float = 0.0
    goldfish: int = 0
    compile: bool = False
    windows_per_step: int = 0

    def __post_init__(self) -> None:
        _require(self.windows_per_step >= 0, "train.windows_per_step must be 0 or more")
        _require(self.base_width >= 0, "train.base_width must be 0 or more")
        _require(0 <= self.ema < 1, "train.ema must be 0 or more and below 1")
        _require(0 <= self.final_learning_rate <= 1, "train.final_learning_rate must lie between 0 and 1")
        _require(0 < self.decay_fraction <= 1, "train.decay_fraction must lie above 0 and at most at 1")
        _require(self.divergence_rise >= 0, "train.divergence_rise must be 0 or more")
        _require(self.history_weight >= 0, "train.history_weight must be 0 or more")
        _require(self.goldfish == 0 or self.goldfish >= 2, "train.goldfish must be 0 or at least 2")


@dataclass(frozen=True)
class TwinOptions:
    """Keys `twin.FIELD`: a stack on the reversed text that shares the bottlenecks, in training alone.

    conditioning: what shapes the bottlenecks. joint: both losses; reverse: the twin's alone; detached: the twin's
        alone, and no credit of the model's loss flows through the tower to what it reads; off: there is no twin.
    weight: of the twin's loss beside the model's.
    """

    conditioning: Literal["off", "joint", "reverse", "detached"] = "off"
    weight: float = 1.0

    def __post_init__(self) -> None:
        _require(self.weight > 0, "twin.weight must be above 0; twin.conditioning=off leaves the twin out")


@dataclass(frozen=True)
class FingerprintOptions:
    """Keys `fingerprint.FIELD`: where each token stands in the corpus, shown in training at times and never after.

    shown: whether there are fingerprints at all.
    dropout: the chance that a sequence goes without. token_dropout: that a token of the others does.
    tags: whether document, section and kind are shown beside the index.
    cooldown: the last part of training, without any.
    """

    shown: bool = False
    dropout: float = 0.75
    token_dropout: float = 0.1
    tags: bool = True
    cooldown: float = 0.1

    def __post_init__(self) -> None:
        for name in ("dropout", "token_dropout", "cooldown"):
            _require(0 <= getattr(self, name) < 1, f"fingerprint.{name} must be 0 or more and below 1")


@dataclass(frozen=True)
class PlannerOptions:
    """Keys `planner.FIELD`: how a model that plans (`model.planner`) is taught to.

    forecast, proposal, artist, teacher: weights of the losses of its parts beside the engineer's.
    teacher_until: the part of training after which the teacher is done; until then it shows the true future of fewer
        and fewer windows, of all at first.
    """

    forecast: float = 0.1
    proposal: float = 0.2
    artist: float = 0.2
    teacher: float = 0.0
    teacher_until: float = 0.5

    def __post_init__(self) -> None:
        for name in ("forecast", "proposal", "artist", "teacher"):
            _require(getattr(self, name) >= 0, f"planner.{name} must be 0 or more")
        _require(0 < self.teacher_until <= 1, "planner.teacher_until must lie above 0 and at most at 1")
        idle = self.teacher == 0 and self.teacher_until != PlannerOptions.teacher_until
        _require(
            not idle,
            "planner.teacher_until does nothing without planner.teacher; set planner.teacher too, or leave it out",
        )


@dataclass(frozen=True)
class LoraOptions:
    """Keys `lora.FIELD`: train a small adapter beside the frozen weights of `--model`, and save that alone.

    rank: of the two matrices beside each adapted map; 0: there is no adapter, all weights are trained.
    alpha: their product is scaled by alpha / rank; 0: by 2.
    dropout: the chance that an input of the adapter is left out in training.
    """

    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require(self.rank >= 0, "lora.rank must be 0 or more")
        _require(self.alpha >= 0, "lora.alpha must be 0 or more")
        _require(0 <= self.dropout < 1, "lora.dropout must be 0 or more and below 1")
        idle = self.rank == 0 and (self.alpha, self.dropout) != (0.0, 0.0)
        _require(not idle, "lora.alpha and lora.dropout do nothing without lora.rank; set it too, or leave them out")


NAMESPACES: dict[str, type] = {
    "data": DataOptions,
    "train": TrainOptions,
    "twin": TwinOptions,
    "fingerprint": FingerprintOptions,
    "planner": PlannerOptions,
    "lora": LoraOptions,
}
"""The records of settings by the name before the dot. A mechanism with settings of its own adds its record here."""

# Every value that differs from the defaults of TrainingArguments and of the records above.
COMMON_DEFAULTS: dict[str, Any] = {
    "adam_beta2": 0.99,
    "eval_steps": 250,
    "logging_steps": 10,
    "max_grad_norm": 1.0,
    "save_steps": 250,
    "save_total_limit": 2,
    "seed": 42,
    "warmup_steps": 0.05,
    "weight_decay": 0.1,
}
PRESET_DEFAULTS: dict[str | None, dict[str, Any]] = {
    "tiny": {"max_steps": 1500, "learning_rate": 2e-3, "per_device_train_batch_size": 4},
    # With what the paper's system has in training alone.
    "paper": {
        "max_steps": 1500,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 4,
        "twin.conditioning": "reverse",
        "fingerprint.shown": True,
        "planner.teacher": 0.2,
    },
    "small": {
        "max_steps": 10_000,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 16,
        "data.sequence_length": 1024,
    },
    "base": {
        "max_steps": 50_000,
        "learning_rate": 6e-4,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 8,
        "data.sequence_length": 2048,
    },
    # Rates of the transformers of these sizes in GPT-3 (arXiv 2005.14165, table 2.1); not measured for ours.
    "large": {
        "max_steps": 100_000,
        "learning_rate": 3e-4,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 16,
        "data.sequence_length": 2048,
    },
    "xl": {
        "max_steps": 200_000,
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 64,
        "data.sequence_length": 2048,
    },
    # Continuing from the weights of a folder.
    None: {"max_steps": 1000, "learning_rate": 3e-4, "per_device_train_batch_size": 8},
}

# An adapter bears ten times the rate of all weights (measured: docs/experiments.md).
LORA_DEFAULTS = {"learning_rate": 3e-3}

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
_TOP = ("preset", "model", "data", "device", "dtype")


@dataclass(frozen=True)
class TrainSettings:
    """All settings of a run. `to_dict` is written to RUN/dyadlm.json and reads back as a configuration.

    output: the folder RUN. resume: go on with what RUN holds, or begin if it holds nothing.
    preset, model: the name of a preset, or the folder of a model to continue from; exactly one of them.
    sources: what `--data` names, each optionally with `:weight`.
    device: auto, cpu, cuda or mps. dtype: auto, float32 or bfloat16 (autocast; weights stay float32).
    arguments: by name of `TrainingArguments`. model_fields: by field of the model's configuration.
    options: by namespace, a record of `NAMESPACES`.
    """

    output: Path
    sources: tuple[str, ...]
    preset: str | None = None
    model: str | None = None
    resume: bool = False
    device: str = "auto"
    dtype: str = "auto"
    arguments: dict[str, Any] = field(default_factory=dict)
    model_fields: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=lambda: {name: kind() for name, kind in NAMESPACES.items()})

    @property
    def data(self) -> DataOptions:
        return cast(DataOptions, self.options["data"])

    @property
    def train(self) -> TrainOptions:
        return cast(TrainOptions, self.options["train"])

    @property
    def twin(self) -> TwinOptions:
        return cast(TwinOptions, self.options["twin"])

    @property
    def fingerprint(self) -> FingerprintOptions:
        return cast(FingerprintOptions, self.options["fingerprint"])

    @property
    def planner(self) -> PlannerOptions:
        return cast(PlannerOptions, self.options["planner"])

    @property
    def lora(self) -> LoraOptions:
        return cast(LoraOptions, self.options["lora"])

    @classmethod
    def create(
        cls,
        output: str | Path,
        *,
        preset: str | None = None,
        model: str | Path | None = None,
        data: Iterable[str] = (),
        resume: bool = False,
        config: str | Path | None = None,
        assignments: Iterable[str] = (),
        device: str | None = None,
        dtype: str | None = None,
        lora: int | None = None,
    ) -> "TrainSettings":
        """Put together defaults, the run to resume, a YAML (JSON) file and `key=value` texts; the last wins.

        Raises `UserError` for an unknown key or value, naming the nearest one.
        """
        output = Path(output)
        given: dict[str, Any] = {}
        if resume and (output / RECORD_NAME).is_file():
            given |= read_record(output)["settings"]
        started = {name: given.get(name) for name in ("preset", "model")}
        if config is not None:
            given |= _flatten(_read_config(Path(config)))
        given |= dict(parse_assignment(text) for text in assignments)
        flags = {"preset": preset, "model": model and str(model), "device": device, "dtype": dtype, "lora.rank": lora}
        given |= {name: value for name, value in flags.items() if value is not None}
        sources = tuple(data) or given.get("data", ())
        given["data"] = (sources,) if isinstance(sources, str) else tuple(sources)
        for name, value in started.items():
            # The base of an adapter may have moved: its weights are known by their identity.
            moved = name == "model" and given.get("lora.rank")
            if value is not None and given.get(name) != value and not moved:
                raise UserError(f"{output} was started with {name} {value}; choose another --output.")
        return cls.from_dict(given, output=output, resume=resume)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], *, output: str | Path, resume: bool = False) -> "TrainSettings":
        """Build from flat keys (what `to_dict` returns), checking every key and value."""
        preset, model = given.get("preset"), given.get("model")
        if (preset is None) == (model is None):
            raise UserError("Choose either --preset NAME (a new model) or --model DIR (continue from weights).")
        if not given.get("data"):
            raise UserError("There is nothing to train on; name a corpus, a file or a folder with --data.")
        if preset is not None and (not isinstance(preset, str) or preset not in PRESET_DEFAULTS):
            known = [name for name in PRESET_DEFAULTS if name]
            raise UserError(f"There is no preset {preset!r}{nearest(preset, known)}.")
        values = COMMON_DEFAULTS | PRESET_DEFAULTS[preset]
        values |= (LORA_DEFAULTS if given.get("lora.rank") not in (None, 0, "0") else {}) | dict(given)
        if "num_train_epochs" in given and "max_steps" not in given:
            del values["max_steps"]
        arguments, model_fields = {}, {}
        options: dict[str, dict[str, Any]] = {name: {} for name in NAMESPACES}
        for key, value in values.items():
            namespace, _, name = key.partition(".")
            if key in _TOP:
                continue
            if not name:
                arguments[key] = _argument(key, value)
            elif namespace == "model":
                model_fields[name] = value
            elif namespace in NAMESPACES:
                hints = typing.get_type_hints(NAMESPACES[namespace])
                known = [f"{namespace}.{entry.name}" for entry in fields(NAMESPACES[namespace])]
                if key not in known:
                    raise UserError(f"There is no key {key}{nearest_key(key, known)}.")
                options[namespace][name] = coerce(value, hints[name], key)
            else:
                raise UserError(f"There is no key {key}{nearest_key(key, ())}.")
        if model is None:  # the fields of a folder's model are known when it is loaded
            model_fields = DyadConfig.coerce_fields(model_fields, prefix="model.")
        _check_arguments(arguments)
        return cls(
            output=Path(output),
            sources=tuple(given["data"]),
            preset=preset,
            model=None if model is None else str(model),
            resume=resume,
            device=coerce(given.get("device", "auto"), Literal["auto", "cpu", "cuda", "mps"], "--device"),
            dtype=coerce(given.get("dtype", "auto"), Literal["auto", "float32", "bfloat16"], "--dtype"),
            arguments=arguments,
            model_fields=model_fields,
            options={name: kind(**options[name]) for name, kind in NAMESPACES.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """The flat keys, ready for JSON or YAML; `output` and `resume` belong to a call, not in it."""
        start = {"preset": self.preset} if self.model is None else {"model": self.model}
        top = start | {"data": list(self.sources), "device": self.device, "dtype": self.dtype}
        ours = {
            f"{namespace}.{entry.name}": getattr(record, entry.name)
            for namespace, record in self.options.items()
            for entry in fields(record)
        }
        model = {f"model.{name}": value for name, value in self.model_fields.items()}
        return top | self.arguments | model | ours


def read_record(run: Path) -> dict[str, Any]:
    """RUN/dyadlm.json. Raises `UserError` if it cannot be read."""
    try:
        record = json.loads((run / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run / RECORD_NAME} cannot be read ({error}); is {run} a run of dyadlm?") from error
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise UserError(f"{run / RECORD_NAME} is not the record of a run.")
    for name in ("order_of_text", "training_arguments", "model", "result"):
        if not isinstance(record.get(name, {}), dict):
            raise UserError(
                f"{run / RECORD_NAME} is damaged ({name} is {record[name]!r}); take it from a copy of the run."
            )
    return record


def reading_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How the files of a run are read, of its flat keys (`TrainSettings.to_dict`), as `resolve_data` takes it."""
    names = ("text_field", "most_decompressed")
    return {name: settings[f"data.{name}"] for name in names if f"data.{name}" in settings}


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


def _argument(key: str, value: Any) -> Any:
    # FSDP is switched on with true, although its annotation still says text.
    hints = typing.get_type_hints(TrainingArguments) | {"fsdp": bool | str | None}
    known = [entry.name for entry in fields(TrainingArguments) if entry.init]
    if key in DECIDED_ELSEWHERE or key.startswith(("hub_", "trackio_")):
        reason = DECIDED_ELSEWHERE.get(key, "nothing is uploaded")
        raise UserError(f"The key {key} is not for --set: {reason}.")
    if key not in known:
        raise UserError(f"There is no key {key}{nearest_key(key, known)}.")
    return coerce(value, hints[key], key)


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    counts = ("max_steps", "per_device_train_batch_size", "per_device_eval_batch_size")
    for key in (*counts, "gradient_accumulation_steps", "save_steps"):
        _require(arguments.get(key, 1) >= 1, f"{key} must be at least 1")
    for key in ("learning_rate", "logging_steps", "num_train_epochs"):
        _require(arguments.get(key, 1) > 0, f"{key} must be above 0")
    for key in ("adam_epsilon", "dataloader_num_workers", "max_grad_norm", "warmup_steps", "weight_decay"):
        _require(arguments.get(key, 0) >= 0, f"{key} must be 0 or more")
    for key in ("adam_beta1", "adam_beta2"):
        _require(0 <= arguments.get(key, 0) < 1, f"{key} must be at least 0 and below 1")
    every = arguments["eval_steps"]
    _require(
        every is not None and every >= 0 and (every < 1 or every == int(every)),
        "eval_steps must be a whole number, a fraction of all steps below 1, or 0 (never)",
    )
    _require(0 <= arguments["seed"] < 2**32, f"seed must be at least 0 and below {2**32}")
    limit = arguments.get("save_total_limit")
    _require(limit is None or limit >= 1, "save_total_limit must be at least 1")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise UserError(f"{what}.")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"The configuration {path} cannot be read as YAML or JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"The configuration {path} must be a mapping of keys to values.")
    settings: dict[str, Any] = content.get("settings", content)
    return settings


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """`data: {canaries: 1}` means `data.canaries: 1`; `data: [shakespeare]` are sources."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key in ("model", *NAMESPACES):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[str(key)] = value
    return flat
