"""Any causal language model of transformers from a folder: safetensors only, none of the folder's code is run."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import is_offline_mode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from dyadlm.errors import UserError, first_line
from dyadlm.model.adapters import ADAPTER_CONFIG, adapter_folder, base_of_adapter, merge_adapter, require_kinds
from dyadlm.model.configuration import DyadConfig
from dyadlm.shipped import place_of_model
from dyadlm.values import coerce_fields, type_of

# Entries of config.json that describe the file; the weights decide them.
DESCRIPTIVE = {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Fields of ours that change what trained weights mean, though not always how many there are.
TRAINED = {
    "artist_sees",
    "early",
    "level_alignment",
    "level_feature",
    "mixers",
    "ngram_sizes",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "salience",
    "semantic_levels",
    "semantic_memory",
    "slot_contexts",
    "tower",
    "transport_space",
}


def load_weights(
    path_or_name: str | Path,
    dtype: torch.dtype | None = None,
    fields: Mapping[str, Any] | None = None,
    prefix: str = "",
) -> PreTrainedModel:
    """The model of a folder or of a name, on the CPU, in evaluation mode; an adapter with its base.

    path_or_name: a folder, a model that comes with the package (`dyadlm.shipped`), or a Hugging Face name.

    dtype: of the weights; None: the one they were saved in. fields: of its configuration, to override, each coerced to
        the type it has. prefix: of a field's name in messages.
    Raises `UserError` if there is no such model or field, a value is of another type, or some of its weights are
    missing or do not fit.
    """
    path_or_name = place_of_model(path_or_name)
    require_found(path_or_name)
    if (base := base_of_adapter(path_or_name)) is not None:
        return _load_adapted(path_or_name, base, dtype, fields, prefix)
    try:
        with without_bars_of_transformers():
            config = AutoConfig.from_pretrained(path_or_name, trust_remote_code=False)
            fields = _coerce_fields(config, fields or {}, prefix)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path_or_name,
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, in a sentence
                **fields,
            )
        for file in Path(path_or_name).glob("*.safetensors"):
            require_kinds(file, loaded[0].state_dict())
    except UserError:
        raise
    except Exception as error:  # broken files raise errors of many kinds
        raise UserError(
            f"{path_or_name} cannot be loaded as a causal language model ({first_line(error)}); "
            "give a folder that `dyadlm train` wrote, or another model in safetensors."
        ) from error
    model, report = loaded
    for what, names in (
        ("lack", report["missing_keys"]),
        ("have another size of", [name for name, *_ in report["mismatched_keys"]]),
        # Where no field was changed, transformers decides what may be left over.
        ("also hold", report["unexpected_keys"] if fields else ()),
    ):
        if names:
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            cause = f"leave {', '.join(fields)} as it is" if fields else "the folder is damaged or of another config"
            raise UserError(f"The weights in {path_or_name} {what} {min(names)}{others}; {cause}.")
    return cast(PreTrainedModel, model)


def place_of_tokenizer(path_or_name: str | Path) -> str | Path:
    """Where the tokenizer of a model is: with the model, or with the base of an adapter that has none."""
    path_or_name = place_of_model(path_or_name)
    folder = adapter_folder(path_or_name)
    if folder is None or (folder / "tokenizer_config.json").is_file():
        return path_or_name
    return base_of_adapter(path_or_name) or path_or_name


def _load_adapted(
    path_or_name: str | Path,
    base: str,
    dtype: torch.dtype | None,
    fields: Mapping[str, Any] | None,
    prefix: str,
) -> PreTrainedModel:
    """The base of an adapter with the adapter merged into it, in float32, and then in the dtype asked for."""
    config = f"base_model_name_or_path in {Path(path_or_name) / ADAPTER_CONFIG}"
    try:
        require_found(base)
    except UserError as error:
        raise UserError(f"The base model of {path_or_name} is not there: {error} It is {config}.") from error
    if base_of_adapter(base) is not None:
        raise UserError(f"{base} is an adapter itself; merge it first (`dyadlm export`), and name that in {config}.")
    model = load_weights(base, torch.float32, fields, prefix)
    saved_in = AutoConfig.from_pretrained(base, trust_remote_code=False).dtype  # of what could be loaded
    model = merge_adapter(model, path_or_name)
    return cast(PreTrainedModel, model.to(dtype or saved_in or torch.float32))  # type: ignore[arg-type]


def _coerce_fields(config: PreTrainedConfig, given: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """By the annotations of our own configuration; of any other, by the value that each field has now."""
    if isinstance(config, DyadConfig):
        fields = config.coerce_fields(given, prefix)
        for name, value in fields.items():
            if name in TRAINED and value != getattr(config, name):
                raise UserError(
                    f"{prefix}{name} cannot be changed in a trained model: its weights mean something by it."
                )
        return fields
    types_of = {name: type_of(value) for name, value in config.to_dict().items() if name not in DESCRIPTIVE}
    return coerce_fields(given, types_of, f"A {config.model_type} model", prefix)


# Seconds that the hub has to answer in.
HUB_PATIENCE = 5.0


def require_found(path_or_name: str | Path) -> None:
    """Raise `UserError` unless there is a model folder, or a model of that name on the hub or in its cache.

    What looks like a path, or lies in a folder that exists, never goes to the hub; the hub is asked once.
    """
    path_or_name = place_of_model(path_or_name)
    path, name = Path(path_or_name), str(path_or_name)
    if path.exists():
        require_model_folder(path)
        return
    in_folder = len(path.parts) > 1 and path.parent.exists()
    if path.is_absolute() or name.startswith((".", "~")) or in_folder or not _HUB_NAME.fullmatch(name):
        raise UserError(
            f"There is no model {name}; give a folder that `dyadlm train` wrote, tiny-en, or a Hugging Face name."
        )
    if is_offline_mode() or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=HUB_PATIENCE)
    except Exception as error:  # the hub and the network raise errors of many kinds
        raise UserError(
            f"There is no folder {name}, and no such model on the hub can be reached ({first_line(error)})."
        ) from error


def is_model_folder(path: Path) -> bool:
    """Whether a folder looks like a saved model or adapter."""
    return (path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file()


def require_model_folder(path: Path) -> None:
    """Raise `UserError` unless the folder looks like a saved model or adapter."""
    if is_model_folder(path):
        return
    checkpoints = sorted(path.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime) if path.is_dir() else []
    if checkpoints:
        raise UserError(
            f"The run in {path} is not finished; go on with `dyadlm train --output {path} --resume`, "
            f"or use {checkpoints[-1]}."
        )
    raise UserError(f"{path} is no model folder (no config.json in it); give one that `dyadlm train` wrote.")


@contextmanager
def without_bars_of_transformers() -> Iterator[None]:
    """Saving and loading draw bars of their own, which would break ours."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
