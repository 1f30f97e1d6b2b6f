"""What a model reads off the tokens themselves, once for all blocks: segment boundaries, slot addresses, n-grams.

Dimension letters: B batch, T time, N tables of n-grams.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from dyadlm.errors import UserError
from dyadlm.model.boundaries import TextState
from dyadlm.ops.clock import Clock
from dyadlm.ops.contexts import Contexts, ContextState, history_tags, token_history
from dyadlm.ops.ngrams import ngram_rows
from dyadlm.ops.segments import SegmentCount, SegmentPlan, segment_plan

if TYPE_CHECKING:
    from dyadlm.model.modeling import DyadModel


def read_text(
    model: "DyadModel", ids: Tensor | None, order: Tensor | None, clock: Clock, text: TextState
) -> tuple[SegmentPlan | None, Contexts | None, Tensor | None, TextState]:
    """Where segments begin, what slots are addressed by, and the rows of n-grams (B, T, N), as `ngram_rows` returns
    them, from the tokens (B, T) alone; and the state after them.

    order: as `left_packing` returns it.

    Raises:
        UserError: there are no tokens, only embeddings.
    """
    config = model.config
    if model.boundaries is None and not config.text_contexts:
        return None, None, None, text
    if ids is None:
        raise UserError(
            "Semantic levels, slots and n-grams read the tokens themselves; give input_ids, not inputs_embeds."
        )
    if order is not None:
        ids = ids.gather(1, order)
    segments = contexts = ngrams = word_begins = None
    if model.boundaries is not None:
        begins, marks = model.boundaries(ids, clock, text.marks)
        text = text._replace(marks=marks)
        named = model.boundaries.rules
        if "word" in named:
            word_begins = begins[..., named.index("word")]
        levels = len(named) - config.word_apart
        if levels:
            count = SegmentCount(*text.counts) if text.counts else None
            segments, count = segment_plan(begins[..., :levels], clock, config.longest_segment, count)
            text = text._replace(counts=tuple(count))
    if config.text_contexts:
        before = ContextState(*text.contexts) if text.contexts else None
        history, after = token_history(ids, config.text_contexts, clock, word_begins=word_begins, state=before)
        text = text._replace(contexts=tuple(after))
        if config.read_contexts:
            contexts = history_tags(history, config.read_contexts, config.vocab_size, clock)
        if config.ngram_sizes:
            ngrams = ngram_rows(history, config.ngram_sizes, config.ngram_entries, clock)
    return segments, contexts, ngrams, text
