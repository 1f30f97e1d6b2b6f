"""The n-gram embeddings of `dyadlm.model.ngrams` for any other causal language model of transformers, so that models
are compared with equal tables.

`add_ngrams(model, sizes)` puts `model.ngrams` beside the input embedding. What the tables say is added to it in every
forward pass. The last tokens and the open word are kept with the state of the model (`past_key_values` and the like),
so that a text may be read in pieces; beams, which reorder that state, are not followed. Tables are saved with the
model's weights; to load them, call `add_ngrams` on the loaded model, and then `model.ngrams.load_state_dict`.

Dimension letters: B texts, T tokens of a pass.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dyadlm.causal_lm import STATE_NAMES, vocabulary_size
from dyadlm.errors import UserError
from dyadlm.model import DyadForCausalLM
from dyadlm.model.boundaries import Boundaries
from dyadlm.model.configuration import BYTE_VOCABULARY
from dyadlm.model.ngrams import NgramIdentity
from dyadlm.ops.clock import make_clock, next_position
from dyadlm.ops.contexts import ContextState, token_history
from dyadlm.ops.ngrams import ngram_rows

STATE = "_dyadlm_ngrams"  # under this name a state of another model has ours


class Reading(NamedTuple):
    """What has been read of some texts."""

    position: Tensor  # (B,) int64
    marks: tuple[Tensor, ...]  # of the rule of words
    history: ContextState


class PeerNgrams(NgramIdentity):
    """Tables and projection of n-grams, with what finds their rows in the tokens of a model."""

    def __init__(self, sizes: Sequence[int | str], entries: int, width: int, vocabulary: int, hidden: int):
        super().__init__(len(sizes), entries, width, hidden)
        self.sizes, self.entries = list(sizes), entries
        is_bytes = vocabulary == BYTE_VOCABULARY
        self.boundaries = Boundaries(["word"], vocabulary, is_bytes) if "word" in sizes else None
        self._before: Reading | None = None
        self._after: Reading | None = None

    def begin(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before a pass: take up what the state of the model has.

        Raises:
            UserError: padding before or between tokens, or several documents in a row.
        """
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        if mask is not None and mask.dim() == 2 and bool((mask.diff(dim=1) > 0).any()):
            raise UserError("N-grams beside another model know no padding on the left; pad on the right.")
        if positions is not None and bool((positions[..., 1:] == 0).any()):
            raise UserError("N-grams beside another model know one document a row; give each a row of its own.")
        states = [named[name] for name in STATE_NAMES if named.get(name) is not None]
        self._before = next((getattr(state, STATE) for state in states if hasattr(state, STATE)), None)

    def add(self, embedding: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        """The embedding of tokens (B, T), with what the tables say of them: (B, T, D)."""
        ids, before = inputs[0].long(), self._before
        clock = make_clock(*ids.shape, position=None if before is None else before.position, device=ids.device)
        begins, marks = None, ()
        if self.boundaries is not None:
            found, marks = self.boundaries(ids, clock, () if before is None else before.marks)
            begins = found[..., 0]
        state = None if before is None else before.history
        history, state = token_history(ids, self.sizes, clock, word_begins=begins, state=state)
        self._after = Reading(next_position(clock), marks, state)
        said: Tensor = self(ngram_rows(history, self.sizes, self.entries, clock))
        return embedded + said.to(embedded.dtype)

    def end(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """After a pass: leave what was read with the state that the model returns."""
        for state in (getattr(output, name, None) for name in STATE_NAMES):
            if state is not None and hasattr(state, "__dict__"):
                setattr(state, STATE, self._after)
        self._before = self._after = None


def add_ngrams(
    model: PreTrainedModel,
    sizes: Sequence[int | str],
    *,
    entries: int = 16_384,
    width: int = 24,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PeerNgrams:
    """Give a model n-gram embeddings, which add nothing before they are trained.

    sizes: numbers of tokens, "word". entries, width: of each table. tokenizer: for "word" with tokens other than bytes.

    Raises:
        UserError: a dyadlm model, which has `ngram_sizes`; or "word" without a tokenizer.
    """
    if isinstance(model, DyadForCausalLM):
        raise UserError("A dyadlm model has n-grams of its own; set model.ngram_sizes.")
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    vocabulary, hidden = vocabulary_size(model), embedding.embedding_dim
    ngrams = PeerNgrams(sizes, entries, width, vocabulary, hidden).to(embedding.weight.device)
    if ngrams.boundaries is not None and vocabulary != BYTE_VOCABULARY:
        if tokenizer is None:
            raise UserError("The open word needs the text of each token; give the tokenizer.")
        ngrams.boundaries.read(tokenizer)
    with torch.no_grad():
        ngrams.tables.weight.normal_(std=getattr(model.config, "initializer_range", 0.02))
        ngrams.project.weight.zero_()
    cast(Any, model).ngrams = ngrams
    model.register_forward_pre_hook(ngrams.begin, with_kwargs=True)
    embedding.register_forward_hook(ngrams.add)
    model.register_forward_hook(ngrams.end, with_kwargs=True)
    return ngrams
