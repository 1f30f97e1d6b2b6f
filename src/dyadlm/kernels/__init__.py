"""Operators as single kernels of a GPU, written in Triton; each has a form in `dyadlm.ops` as reference and fallback.

Nothing here is imported on a CPU: a caller asks `usable`, and imports the kernel it wants where the answer is yes.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

INSTALLED = find_spec("triton") is not None
WIDEST_LEVEL = 5  # sliding levels above have windows that are too wide to be summed directly
WIDEST_RANK = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def usable(x: Tensor) -> bool:
    """Whether kernels compute what is made of x: it lies on a CUDA device, is not wider than float32, and Triton is
    installed, as it is beside torch for CUDA."""
    return x.is_cuda and INSTALLED and x.dtype in DTYPES
