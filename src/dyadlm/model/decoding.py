"""Generation: where single tokens may be read by something faster than the model's forward pass.

Dimension letters: B rows, T time, V vocabulary.
"""

from typing import Any, Protocol, cast

from torch import Tensor
from transformers import GenerationMixin

from dyadlm.model.cache import DyadCache

MOST_ROWS = 64  # that were measured to be faster so


class TokenReader(Protocol):
    """Reads one token a row in place of the model."""

    def step(self, tokens: list[int], cache: DyadCache) -> Tensor:
        """Tokens of B rows; the cache moves on. Returns logits (B, 1, V) float32."""
        ...


def continues_rows(ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: DyadCache) -> bool:
    """Whether a chunk is one real token for each of some rows that goes on with the row's document."""
    if ids.shape[1] != 1 or ids.shape[0] > MOST_ROWS or cache.is_empty or cache.batch_size != ids.shape[0]:
        return False
    if attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):
        return False
    return position_ids is None or not bool((position_ids[..., -1] == 0).any())


class DyadGenerationMixin(GenerationMixin):
    """`generate` as in transformers, with the same tokens; where the engine is faster, it decodes them."""

    _is_stateful = True
    _fast_decoder: TokenReader | None = None  # set by `dyadlm.engine.bridge.fast_decoding`

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state is our own and is made in `forward`

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`."""
        from dyadlm.engine.bridge import fast_decoding  # the engine is above the model

        # Beams are reordered after each token, which would move the state back and forth.
        config = kwargs.get("generation_config") or cast(Any, self).generation_config
        beams = kwargs.get("num_beams", getattr(config, "num_beams", None)) or 1
        if beams > 1:
            return cast(Any, super()).generate(*args, **kwargs)
        with fast_decoding(self):
            return cast(Any, super()).generate(*args, **kwargs)

    def decoded(
        self,
        ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: DyadCache | None,
    ) -> Tensor | None:
        """Logits (B, 1, V) by the fast decoder, if there is one and the chunk is a token of each row; else None."""
        if self._fast_decoder is None or ids is None or cache is None:
            return None
        if not continues_rows(ids, attention_mask, position_ids, cache):
            return None
        return self._fast_decoder.step(ids[:, 0].tolist(), cache)

    def _reorder_cache(self, past_key_values: DyadCache, beam_idx: Tensor) -> DyadCache:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values
