"""Loading a model and its tokenizer from a folder or by name, with errors a user can act on."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dyadlm.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path_or_name: str | Path, device: str = "auto", dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer; any Hugging Face model in safetensors.

    device: `auto` takes a GPU if there is one. dtype: `auto` is the one the weights were saved in.
    No code of the model folder is ever run. Raises `UserError` if the folder or name holds no such model.
    """
    path = Path(path_or_name)
    if path.exists():
        require_model_folder(path)
    place = resolve_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"Unknown dtype {dtype!r}; choose auto or one of {', '.join(DTYPES)}.")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path_or_name,
            dtype=DTYPES.get(dtype, "auto"),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(path_or_name, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path_or_name} cannot be loaded as a causal language model with its tokenizer ({reason}); "
            "give a folder that `dyadlm train` wrote, or a Hugging Face model in safetensors."
        ) from error
    if report["missing_keys"]:
        raise UserError(
            f"The weights in {path_or_name} lack {len(report['missing_keys'])} tensors of its config "
            f"(such as {min(report['missing_keys'])}); the folder is damaged or belongs to another config."
        )
    return model.to(place).eval(), tokenizer


def require_model_folder(path: Path) -> None:
    """Raise `UserError` unless the folder looks like a saved model."""
    if (path / "config.json").is_file():
        return
    checkpoints = sorted(path.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime) if path.is_dir() else []
    if checkpoints:
        raise UserError(
            f"The run in {path} is not finished; go on with `dyadlm train --output {path} --resume`, "
            f"or use {checkpoints[-1]}."
        )
    raise UserError(f"{path} is no model folder (no config.json in it); give one that `dyadlm train` wrote.")


def resolve_device(device: str) -> torch.device:
    """The device named, or for `auto` a GPU if there is one. Raises `UserError` if it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        raise UserError(f"There is no device {device!r} here; use --device cpu or auto.") from error
    return place
