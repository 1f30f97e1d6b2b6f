"""The settings of a training run: one flat list of keys, from the command line, a file or an earlier run.

Keys are the names of `transformers.TrainingArguments` (`max_steps`, `learning_rate`, …), `model.FIELD` for
the configuration of the model, and one namespace for each part of ours (`data.FIELD`, `train.FIELD`, see
`NAMESPACES`).
"""

import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from dyadlm.errors import UserError
from dyadlm.model import DyadConfig
from dyadlm.train.defaults import COMMON_DEFAULTS, LORA_DEFAULTS, PRESET_DEFAULTS
from dyadlm.train.keys import argument_of, check_arguments, nearest_key
from dyadlm.train.options import (
    NAMESPACES,
    DataOptions,
    FingerprintOptions,
    LoraOptions,
    PlannerOptions,
    TrainOptions,
    TwinOptions,
)
from dyadlm.values import coerce, nearest, parse_assignment

__all__ = [
    "NAMESPACES",
    "PRESET_DEFAULTS",
    "RECORD_NAME",
    "DataOptions",
    "FingerprintOptions",
    "LoraOptions",
    "PlannerOptions",
    "TrainOptions",
    "TrainSettings",
    "TwinOptions",
    "read_record",
    "reading_options",
]

RECORD_NAME = "dyadlm.json"
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
        if resume and preset is None and model is None:
            raise UserError(f"{output} holds no run to go on with; begin one with --preset or --model, and --data.")
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
                arguments[key] = argument_of(key, value)
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
        check_arguments(arguments)
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
