"""Which parameters decay, and how the learning rate moves."""

import math

from torch import nn

from dyadlm.train.settings import TrainOptions


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
