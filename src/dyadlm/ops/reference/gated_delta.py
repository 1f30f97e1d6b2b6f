"""The gated delta rule, token by token.

Dimension letters: T time, K numbers of a key, M of a value.
"""

import torch
from torch import Tensor


def gated_delta(query: Tensor, key: Tensor, value: Tensor, strength: Tensor, log_keep: Tensor) -> tuple[Tensor, Tensor]:
    """One head over one document: query, key (T, K), value (T, M), strength, log_keep (T,) → what each token recalls
    (T, M), and the memory after it (K, M)."""
    memory = key.new_zeros(key.shape[1], value.shape[1])
    rows = []
    for t in range(len(key)):
        memory = log_keep[t].exp() * memory
        unknown = value[t] - key[t] @ memory
        memory = memory + strength[t] * torch.outer(key[t], unknown)
        rows.append(query[t] @ memory)
    return torch.stack(rows), memory
