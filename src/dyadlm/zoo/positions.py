"""Texts longer than those a model was trained on: ways to stretch rotary positions, and what a longer past does to the
loss.

Dimension letters: T tokens, L the trained length.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from dyadlm.causal_lm import Continuation
from dyadlm.errors import UserError
from dyadlm.values import nearest

MULTIPLES = (1, 2, 4, 8)
SCALINGS = {"interpolated": "linear", "ntk": "dynamic", "yarn": "yarn"}
"""Types of rope scaling in transformers by the names of their families: positions divided (Chen et al. 2023, arXiv
2306.15595), the base raised as the text grows (bloc97 2023), slow rotations divided (Peng et al. 2023, arXiv
2309.00071)."""


def stretch(model: PreTrainedModel, scaling: str, length: int, factor: float) -> PreTrainedModel:
    """A model with the same weights, whose rotary positions are stretched from `length` tokens to `factor` times that.

    Raises:
        UserError: no such scaling, or no rotary positions to stretch.
    """
    if scaling not in SCALINGS:
        raise UserError(f"There is no scaling {scaling!r}{nearest(scaling, SCALINGS)}.")
    config = copy.deepcopy(model.config)
    usual: Any = getattr(config, "rope_parameters", None)
    if not isinstance(usual, dict) or "rope_theta" not in usual:
        raise UserError(f"A {config.model_type} model has no rotary positions to stretch; leave the scaling out.")
    config.rope_parameters = {
        "rope_type": SCALINGS[scaling],
        "rope_theta": usual["rope_theta"],
        "factor": float(factor),
        **({"original_max_position_embeddings": length} if scaling == "yarn" else {}),
    }
    # The base of `dynamic` is raised for texts longer than this field.
    config.max_position_embeddings = length if scaling == "ntk" else int(length * factor)
    with torch.random.fork_rng(devices=[]):
        stretched: Any = type(model)(config)
    stretched.load_state_dict(model.state_dict())
    return stretched.to(model.device, model.dtype).train(model.training)


@dataclass(frozen=True)
class LengthLoss:
    """multiple: of the trained length. loss: nats per token; None where the model cannot read as many tokens."""

    multiple: int
    loss: float | None


@torch.no_grad()
def length_losses(
    model: PreTrainedModel,
    tokens: Tensor,
    length: int,
    scaling: str | None = None,
    multiples: Sequence[int] = MULTIPLES,
    windows: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LengthLoss]:
    """The loss of the same tokens with a past of 1, 2, 4 and 8 trained lengths.

    Scored is the last half of a trained length of each window, so that the multiples differ in the past alone: a loss
    that falls says that a longer past helps, one that rises that it does harm.

    tokens: (T,) int64. length: L. scaling: of `SCALINGS`, by each multiple; None: positions are as they were trained.
    windows: ends of windows, spread over the text.

    Raises:
        UserError: a text of fewer than max(multiples) * L tokens, or as `stretch` does.
    """
    longest = max(multiples) * length
    if len(tokens) < longest:
        raise UserError(f"The text has {len(tokens)} tokens, but {longest} are needed; give a longer one.")
    ends = torch.linspace(longest, len(tokens), min(windows, len(tokens) // longest)).long().tolist()
    scored = max(1, length // 2)
    found = []
    for number, multiple in enumerate(multiples):
        reader = model if scaling is None else stretch(model, scaling, length, multiple)
        was_training = reader.training
        reader.train(False)
        losses: list[float] = []
        for end in ends:
            window = tokens[end - multiple * length : end][None]
            try:
                logits = Continuation(reader).read_all(window)[0, -scored - 1 : -1]
            except UserError:  # it has no positions for so many
                break
            losses.append(float(cross_entropy(logits.float(), window[0, -scored:].to(logits.device))))
        reader.train(was_training)
        found.append(LengthLoss(multiple, sum(losses) / len(ends) if len(losses) == len(ends) else None))
        progress(number + 1, len(multiples))
    return found
