"""What a model reads off the tokens themselves, once for all blocks: segment boundaries and slot addresses.

Dimension letters: B batch, T time.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from dyadlm.errors import UserError
from dyadlm.model.boundaries import TextState
from dyadlm.ops.clock import Clock
from dyadlm.ops.contexts import Contexts, ContextState, context_tags
from dyadlm.ops.segments import SegmentCount, SegmentPlan, segment_plan

if TYPE_CHECKING:
    from dyadlm.model.modeling import DyadModel


def read_text(
    model: "DyadModel", ids: Tensor | None, order: Tensor | None, clock: Clock, text: TextState
) -> tuple[SegmentPlan | None, Contexts | None, TextState]:
    """Where segments begin and what slots are addressed by, from the tokens (B, T) alone; and the state after them.

    order: as `left_packing` returns it.

    Raises:
        UserError: there are no tokens, only embeddings.
    """
    if model.boundaries is None and not model.config.read_contexts:
        return None, None, text
    if ids is None:
        raise UserError("Semantic levels and slots read the tokens themselves; give input_ids, not inputs_embeds.")
    if order is not None:
        ids = ids.gather(1, order)
    segments = contexts = word_begins = None
    if model.boundaries is not None:
        begins, marks = model.boundaries(ids, clock, text.marks)
        text = text._replace(marks=marks)
        named = model.boundaries.rules
        if "word" in named:
            word_begins = begins[..., named.index("word")]
        levels = len(named) - model.config.word_for_slots_alone
        if levels:
            count = SegmentCount(*text.counts) if text.counts else None
            segments, count = segment_plan(begins[..., :levels], clock, model.config.longest_segment, count)
            text = text._replace(counts=tuple(count))
    if model.config.read_contexts:
        before = ContextState(*text.contexts) if text.contexts else None
        contexts, after = context_tags(
            ids, model.config.read_contexts, model.config.vocab_size, clock, word_begins=word_begins, state=before
        )
        text = text._replace(contexts=tuple(after))
    return segments, contexts, text
