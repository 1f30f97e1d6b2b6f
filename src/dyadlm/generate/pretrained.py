"""A model ready to read and write, with its tokenizer, on the device and in the dtype that were asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dyadlm.errors import UserError, first_line
from dyadlm.model.loading import load_weights, place_of_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path_or_name: str | Path, device: str = "auto", dtype: str = "auto", fields: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer; any Hugging Face model in safetensors.

    device: `auto` takes a GPU if there is one. dtype: `auto` is the one the weights were saved in.
    fields: of its configuration, to change; those that its weights do not depend on.
    No code of the model folder is ever run. Raises `UserError` if the folder or name holds no such model.
    """
    place = resolve_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"Unknown dtype {dtype!r}; choose auto or one of {', '.join(DTYPES)}.")
    model = load_weights(path_or_name, DTYPES.get(dtype), fields)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place_of_tokenizer(path_or_name), trust_remote_code=False)
    except Exception as error:  # broken files raise errors of many kinds
        raise UserError(
            f"The tokenizer of {path_or_name} cannot be loaded ({first_line(error)}); "
            "save the model's tokenizer beside it."
        ) from error
    return model.to(place).eval(), tokenizer  # type: ignore[arg-type]


def resolve_device(device: str) -> torch.device:
    """The device named, or for `auto` a GPU if there is one. Raises `UserError` if it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(1, device=place).tolist()
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        raise UserError(f"There is no device {device!r} here; use --device cpu or auto.") from error
    return place
