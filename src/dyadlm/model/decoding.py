"""Generation: where single tokens may be read by something faster than the model's forward pass.

Dimension letters: B rows, T time, V vocabulary.
"""

from contextvars import ContextVar
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, MaxLengthCriteria

from dyadlm.model.cache import DyadCache

MOST_ROWS = 64  # that were measured to be faster so


class TokenReader(Protocol):
    """Reads one token a row in place of the model."""

    def step(self, tokens: list[int], cache: DyadCache) -> Tensor:
        """Tokens of B rows; the cache moves on. Returns logits (B, 1, V) float32."""
        ...


# The model for which single tokens are read faster in this thread or task, and what reads them
# (`dyadlm.engine.bridge.fast_decoding` sets it).
FAST_DECODER: ContextVar[tuple[Any, TokenReader | None]] = ContextVar("fast_decoder", default=(None, None))


def continues_rows(ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: DyadCache) -> bool:
    """Whether a chunk is one real token for each of some rows that goes on with the row's document."""
    if (
        ids.dim() != 2
        or ids.shape[1] != 1
        or ids.shape[0] > MOST_ROWS
        or cache.is_empty
        or cache.batch_size != ids.shape[0]
    ):
        return False
    if attention_mask is not None and (
        attention_mask.dim() != 2 or len(attention_mask) != len(ids) or bool((attention_mask[:, -1] == 0).any())
    ):
        return False
    return position_ids is None or not bool((position_ids[..., -1] == 0).any())


class DyadGenerationMixin(GenerationMixin):
    """`generate` as in transformers, with the same tokens; where the engine is faster, it decodes them."""

    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state is our own and is made in `forward`

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`."""
        from dyadlm.engine.bridge import fast_decoding  # the engine is above the model

        # Beams are reordered after each token, which would move the state back and forth.
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        config = given or cast(Any, self).generation_config
        beams = kwargs.get("num_beams", getattr(config, "num_beams", None)) or 1
        if beams > 1:
            return cast(Any, super()).generate(*args, **kwargs)
        with fast_decoding(self):
            return cast(Any, super()).generate(*args, **kwargs)

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, without its warning of lengths past `max_position_embeddings`: there is no limit."""
        criteria = cast(Any, super())._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
        return criteria

    def decoded(
        self,
        ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: DyadCache | None,
    ) -> Tensor | None:
        """Logits (B, 1, V) by the fast decoder, if there is one and the chunk is a token of each row; else None."""
        model, decoder = FAST_DECODER.get()
        if model is not self or decoder is None or ids is None or torch.is_grad_enabled():
            return None
        if not isinstance(cache, DyadCache):
            return None
        if not continues_rows(ids, attention_mask, position_ids, cache):
            return None
        return decoder.step(ids[:, 0].tolist(), cache)

    def _reorder_cache(self, past_key_values: DyadCache, beam_idx: Tensor) -> DyadCache:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values
