"""What trains beside a model (`dyadlm.model.extension`): made by settings, kept in checkpoints, never exported."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from dyadlm.errors import UserError
from dyadlm.model import DyadForCausalLM
from dyadlm.model.extension import COMPANIONS, AuxiliaryModule
from dyadlm.train.fingerprint import Fingerprint
from dyadlm.train.options import NAMESPACES
from dyadlm.train.planner import PlannerLessons
from dyadlm.train.settings import TrainSettings
from dyadlm.train.twin import Twin

COMPANIONS_NAME = "companions.safetensors"
# What a namespace of settings does nothing without.
SWITCHES = {"twin": "twin.conditioning", "fingerprint": "fingerprint.shown", "planner": "model.planner"}
# Why FSDP cannot shard each, and what to leave out instead of it.
UNSHARDABLE = {
    "twin": ("hears through weights inside the model's blocks", "set twin.conditioning=off"),
    "fingerprint": ("has a file of its own, not gathered from shards", "set fingerprint.shown=false"),
    "planner": ("reads the last block's weights outside that block", "train a new model with model.planner=none"),
}


def add_companions(model: PreTrainedModel, settings: TrainSettings, arguments: TrainingArguments) -> None:
    """Give a model the companions that the settings ask for.

    Raises `UserError` where they cannot train: beside a model of another kind, and in shards; and where something is
    given to a companion that is off.
    """
    companions: dict[str, Callable[[DyadForCausalLM], AuxiliaryModule]] = {}
    if settings.twin.conditioning != "off":
        companions["twin"] = lambda model: Twin(model, settings.twin)
    if settings.fingerprint.shown:
        companions["fingerprint"] = lambda model: Fingerprint(model.config, settings.fingerprint.tags)
    if isinstance(model, DyadForCausalLM) and model.planner is not None:
        companions["planner"] = lambda model: PlannerLessons(model, settings.planner)
    for name, switch in SWITCHES.items():
        if name not in companions and settings.options[name] != NAMESPACES[name]():
            raise UserError(f"{name}.* does nothing without {switch}; set {switch} too, or leave it out.")
    if not companions:
        return
    names = " and ".join(f"{name}.*" for name in companions)
    if not isinstance(model, DyadForCausalLM):
        raise UserError(f"{names} is for dyadlm models alone, not for {type(model).__name__}; leave it out.")
    if arguments.fsdp:
        reasons = " and ".join(f"{name}.* ({UNSHARDABLE[name][0]})" for name in companions)
        remedies = " and ".join(UNSHARDABLE[name][1] for name in companions)
        raise UserError(f"FSDP cannot shard {reasons}; leave fsdp out, or {remedies}.")
    for name, make in companions.items():
        model.accompany(name, make(model))


def set_of_companions(model: DyadForCausalLM, settings: TrainSettings) -> list[str] | None:
    """What checkpoints call the companions of a model: those that have other weights have another name.

    None for none, as in checkpoints from before there were any.
    """
    others = {} if settings.fingerprint.tags else {"fingerprint": "fingerprint without tags"}
    return [others.get(name, name) for name in sorted(model.companions)] or None


def save_companions(model: nn.Module, folder: Path) -> None:
    """Write the weights of a model's companions, if it has any."""
    weights = _weights(model)
    if weights:
        copies = {name: weight.detach().cpu().contiguous().clone() for name, weight in weights.items()}
        save_file(copies, folder / COMPANIONS_NAME)


def load_companions(model: nn.Module, folder: Path) -> None:
    """Read what `save_companions` wrote into the companions of the same kinds."""
    weights = _weights(model)
    if weights:
        saved = load_file(folder / COMPANIONS_NAME)
        cast(DyadForCausalLM, model).companions.load_state_dict(saved)


def published_parameters(model: nn.Module) -> int:
    """How many parameters a model has without its companions."""
    return sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith(COMPANIONS))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return model.companions.state_dict() if isinstance(model, DyadForCausalLM) else {}
