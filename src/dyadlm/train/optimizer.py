"""Which parameters decay, which are matrices, and what learning rate each has at a step."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dyadlm.model.extension import COMPANIONS
from dyadlm.train.options import TrainOptions

# How the learning rate of matrices falls with the width: of AdamW as in muP (Yang et al. 2022, arXiv 2203.03466). The
# updates of Muon have a spectral norm of their own, so that less is to be undone.
WIDTH_POWERS = {"adamw": 1.0, "muon": 0.5}


def decayed_parameters(model: nn.Module) -> list[str]:
    """Names of the matrices: what has two dimensions or more and is no embedding (nor tied to one).

    What a model marks with `_no_weight_decay`, as Mamba does with the decays of its state, is left out.
    """
    embeddings = {id(table.weight) for table in model.modules() if isinstance(table, nn.Embedding)}
    return [
        name
        for name, value in model.named_parameters()
        if value.ndim >= 2 and id(value) not in embeddings and not getattr(value, "_no_weight_decay", False)
    ]


def matrix_parameters(model: nn.Module) -> list[str]:
    """Names of the weights of linear maps, but for those to the vocabulary and for embeddings. Stacks of them are among
    them where a model marks them with `_stacks_matrices`: (N, rows, columns)."""
    embeddings = {id(table.weight) for table in model.modules() if isinstance(table, nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    found = [name for name, value in model.named_parameters() if getattr(value, "_stacks_matrices", False)]
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or module.weight.ndim != 2 or id(module.weight) in embeddings:
            continue
        beside = name.startswith(COMPANIONS) and name.endswith(".head")  # of a companion, to the vocabulary
        if module is not head and not beside:
            found.append(f"{name}.weight")
    return found


def matrix_rate(options: TrainOptions, width: int) -> float:
    """By what the learning rate of matrices is multiplied in a model of hidden size `width`."""
    if not options.base_width:
        return 1.0
    return float((options.base_width / width) ** WIDTH_POWERS[options.optimizer])


def scale_rates(optimizer: torch.optim.Optimizer, weights: Collection[Tensor], scale: float) -> None:
    """Multiply the learning rate of some weights, which get groups of their own behind the others of their group."""
    scaled, groups = {id(weight) for weight in weights}, []
    for group in optimizer.param_groups:
        parts: dict[bool, list[Any]] = {False: [], True: []}
        for weight in group["params"]:
            parts[id(weight) in scaled].append(weight)
        for chosen, params in parts.items():
            if params or not (chosen or group["params"]):  # an empty group keeps its place
                groups.append({**group, "params": params, "lr": group["lr"] * (scale if chosen else 1.0)})
    optimizer.param_groups[:] = groups


def learning_rate_factor(step: int, *, warmup_steps: int, max_steps: int, options: TrainOptions) -> float:
    """The fraction of `learning_rate` that optimizer step `step` (from 0) uses: never 0 in the warm-up."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    final = options.final_learning_rate
    if options.schedule == "constant":
        return 1.0
    start = warmup_steps
    if options.schedule == "wsd":
        start = max(warmup_steps, max_steps - math.ceil(options.decay_fraction * max_steps))
    progress = min(max(step - start, 0) / max(max_steps - start, 1), 1.0)
    shape = (1 + math.cos(math.pi * progress)) / 2 if options.schedule == "cosine" else 1 - progress
    return final + (1 - final) * shape
