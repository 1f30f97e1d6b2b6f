"""Operators as kernels of a GPU, written in Triton; each has a form in `dyadlm.ops` as reference and fallback.

Nothing here is imported on a CPU: a caller asks `usable`, and imports the kernel it wants where the answer is yes.
"""

from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor


def _installed() -> bool:
    """Whether there is a Triton whose compiler takes the kernels: from 3.3 on."""
    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (3, 3)


INSTALLED = _installed()
WIDEST_LEVEL = 5  # sliding levels above have windows that are too wide to be summed directly
WIDEST_RANK = 128  # of a level: a program holds all channels of a token
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)


def usable(x: Tensor) -> bool:
    """Whether kernels compute what is made of x: float32, a half or int64 on a CUDA device, and there is a Triton."""
    return x.is_cuda and INSTALLED and x.dtype in DTYPES
