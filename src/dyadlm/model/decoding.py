"""Where single tokens may be read by something faster than the model's forward pass.

Dimension letters: B rows, T time, V vocabulary.
"""

from typing import Protocol

from torch import Tensor

from dyadlm.model.cache import DyadCache

MOST_ROWS = 64  # that were measured to be faster so


def continues_rows(ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: DyadCache) -> bool:
    """Whether a chunk is one real token for each of a few rows that goes on with the row's document."""
    if ids.shape[1] != 1 or ids.shape[0] > MOST_ROWS or cache.is_empty or cache.batch_size != ids.shape[0]:
        return False
    if attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):
        return False
    return position_ids is None or not bool((position_ids[..., -1] == 0).any())


class TokenReader(Protocol):
    """Reads one token a row in place of the model."""

    def step(self, tokens: list[int], cache: DyadCache) -> Tensor:
        """Tokens of B rows; the cache moves on. Returns logits (B, 1, V) float32."""
        ...
