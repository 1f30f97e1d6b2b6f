"""How the authors of a family begin, where transformers begins otherwise, and what its models lack to be trained alike.

The functions change a new model in place. Dimension letter: L layers.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

FIRST_STEPS = 0.001, 0.1  # between which a time step begins, alike on the scale of logarithms


@torch.no_grad()
def gated_delta(model: PreTrainedModel) -> None:
    """Time steps of Gated DeltaNet: Yang et al. 2024, arXiv 2412.06464, as Mamba-2 has them. transformers begins with
    steps of 1.3, with which a token leaves nothing of the state before it."""
    for name, bias in model.named_parameters():
        if name.endswith(".dt_bias"):
            low, high = (math.log(step) for step in FIRST_STEPS)
            step = torch.empty_like(bias).uniform_(low, high).exp()
            bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


@torch.no_grad()
def mamba(model: PreTrainedModel) -> None:
    """Mamba and Mamba-2: linear maps into a block as torch begins them, and those out of it divided by √L. Decays of
    the state are trained without weight decay."""
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear | nn.Conv1d) and name.endswith((".in_proj", ".x_proj", ".conv1d")):
            part.reset_parameters()
        elif name.endswith(".out_proj"):  # transformers, asked for it, would divide what it loads, too
            part.weight /= math.sqrt(model.config.num_hidden_layers)
    for name, weight in model.named_parameters():
        if name.endswith(".A_log"):
            weight._no_weight_decay = True  # type: ignore[attr-defined]


@torch.no_grad()
def rwkv(model: PreTrainedModel) -> None:
    """RWKV-4 (Peng et al. 2023, arXiv 2305.13048, appendix): the weight of the token itself, by a zigzag over the
    width, where transformers begins with 1. Vectors that mix two tokens are trained without weight decay."""
    for name, weight in model.named_parameters():
        if name.endswith(".time_first"):
            zigzag = (torch.arange(len(weight), device=weight.device) + 1) % 3 - 1
            weight.copy_(math.log(0.3) + 0.5 * zigzag)
        elif ".time_mix_" in name:
            weight._no_weight_decay = True  # type: ignore[attr-defined]


@torch.no_grad()
def xlstm(model: PreTrainedModel) -> None:
    """xLSTM: the gates of feed-forward parts, which transformers takes for those of the state and sets to zero."""
    for name, part in model.named_modules():
        if name.endswith(".proj_up_gate"):
            nn.init.normal_(part.weight, std=math.sqrt(2 / (5 * part.in_features)))


def experts(model: PreTrainedModel) -> None:
    """Experts, whose matrices stand in stacks: Muon is to train each of them, as it trains those of other families."""
    for name, weight in model.named_parameters():
        if ".experts." in name:
            weight._stacks_matrices = True  # type: ignore[attr-defined]


def dynamic_positions(model: PreTrainedModel) -> None:
    """Dynamic NTK: the base is that of the text that is being read. transformers keeps the base of a longer one that it
    read before, unless the next is shorter than the trained length."""
    for part in model.modules():
        if getattr(part, "rope_type", None) == "dynamic":
            part.register_forward_pre_hook(_as_trained)


def _as_trained(part: Any, inputs: tuple[Any, ...]) -> None:
    part.inv_freq, part.max_seq_len_cached = part.original_inv_freq, part.original_max_seq_len
