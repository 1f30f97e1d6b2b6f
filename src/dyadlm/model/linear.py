"""The weights of linear maps, for the few places that compute with a weight instead of calling its module."""

from typing import cast

import torch
from torch import Tensor, nn


def effective_weight(linear: nn.Module) -> Tensor:
    """The matrix (out, in) that a linear map without bias applies, with gradients.

    Adapters (LoRA) and quantised layers stand in place of an `nn.Linear`; the matrix is what they make of unit vectors.
    """
    if type(linear) is nn.Linear:
        return linear.weight
    weight = cast(Tensor, linear.weight)
    unit = torch.eye(cast(int, linear.in_features), device=weight.device, dtype=torch.get_default_dtype())
    unit = unit.to(weight.dtype) if weight.is_floating_point() else unit
    return cast(Tensor, linear(unit)).T
