"""Weights and optimizer of a sharded run on disk, in a form that any number of processes reads back.

Each process writes the part that it holds, as safetensors, and reads the parts that it needs, through
torch.distributed.checkpoint; nothing is gathered and nothing is pickled. Runs that are not sharded read the same files.
"""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dyadlm.errors import UserError

WEIGHTS_FOLDER, OPTIMIZER_FOLDER = "sharded_weights", "sharded_optimizer"


def require_shards() -> None:
    """Raise `UserError` if this torch writes no shards as safetensors."""
    try:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"torch {torch.__version__} cannot keep shards as safetensors; install 2.9 or newer, or leave fsdp out."
        ) from error


def holds_shards(folder: Path) -> bool:
    """Whether a checkpoint was written by `save_shards`."""
    return (folder / OPTIMIZER_FOLDER).is_dir()


def save_shards(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, tied: Collection[str]) -> None:
    """Write what this process holds. All processes call it together. tied: second names of weights, left out."""
    _write(_weights(model, tied), folder / WEIGHTS_FOLDER)
    _write(_moments(get_optimizer_state_dict(model, optimizer)), folder / OPTIMIZER_FOLDER)


def load_sharded_weights(model: nn.Module, folder: Path, tied: Collection[str]) -> None:
    """Read the weights into a model, sharded or not, that has the same ones. All processes call it together."""
    weights = _weights(model, tied)
    _read(weights, folder / WEIGHTS_FOLDER)
    set_model_state_dict(model, weights, options=StateDictOptions(strict=False))


def load_sharded_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read the moments and the number of steps in place; rates and other settings stay what they are."""
    state = get_optimizer_state_dict(model, optimizer)
    _read(_moments(state), folder / OPTIMIZER_FOLDER)
    set_optimizer_state_dict(model, optimizer, state)


def load_whole_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Give each process its part of weights that are whole."""
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))


def load_whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give each process its part of the `state_dict` of an optimizer of the same weights that were whole."""
    names = {weight: name for name, weight in model.named_parameters()}
    ordered = [names[weight] for group in optimizer.param_groups for weight in group["params"]]
    groups = [group | {"params": [ordered[number] for number in group["params"]]} for group in state["param_groups"]]
    named = {ordered[number]: values for number, values in state["state"].items()}
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, {"state": named, "param_groups": groups}, options=options)


def _weights(model: nn.Module, tied: Collection[str]) -> dict[str, Any]:
    return {name: weight for name, weight in get_model_state_dict(model).items() if name not in tied}


def _moments(state: Any) -> dict[str, Any]:
    """By name of the weight and of the moment."""
    values = {f"{name}.{key}": value for name, part in state["state"].items() for key, value in part.items()}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _write(tensors: dict[str, Any], folder: Path) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # newer than the oldest torch

    with _errors():
        save(tensors, storage_writer=HuggingFaceStorageWriter(path=str(folder), save_distributed=True))


def _read(tensors: dict[str, Any], folder: Path) -> None:
    """Into the tensors as they are."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    with warnings.catch_warnings(), _errors():
        warnings.filterwarnings("ignore", ".*intent is to load in a single process")
        load(tensors, storage_reader=HuggingFaceStorageReader(path=str(folder)), planner=_WholeTensors())


class _WholeTensors(DefaultLoadPlanner):
    """Refuses tensors that are not all there, or of another type: torch would leave what is missing as it was, and
    convert the rest."""

    def create_local_plan(self) -> LoadPlan:
        stored = {} if self.metadata is None else self.metadata.state_dict_metadata
        for name, tensor in self.state_dict.items():
            found = stored.get(name)
            if not isinstance(found, TensorStorageMetadata):
                continue  # which torch itself refuses
            parts = {tuple(chunk.offsets): chunk.sizes.numel() for chunk in found.chunks}
            if sum(parts.values()) != found.size.numel():
                raise ValueError(f"a part of {name} is missing")
            if found.properties.dtype != tensor.dtype:
                raise ValueError(f"{name} is {found.properties.dtype}, not {tensor.dtype}")
        return super().create_local_plan()


@contextmanager
def _errors() -> Iterator[None]:
    """What failed in any process is an error like others; torch raises what is no `Exception`.

    A disk that fails and memory that is full stay errors of these kinds: they say nothing against a checkpoint.
    """
    try:
        yield
    except CheckpointException as error:
        process, (reason, _) = next(iter(error.failures.items()))
        if isinstance(reason, OSError | MemoryError | torch.OutOfMemoryError):
            raise reason from error
        raise RuntimeError(f"in process {process}: {reason}") from error
