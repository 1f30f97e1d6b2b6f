"""Greedy text two tokens at a time, where a model that plans has foreseen the second.

The model proposes the token after next before the next is read. Both are then read at once: if the first really leads
to the second, one pass has made two tokens; if not, the state before them is taken up again, and the next pass reads
what came instead. The text is what the model would write greedily, and there are never more passes than tokens.

Dimension letters: V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dyadlm.errors import UserError
from dyadlm.generate.sampling import Sampling
from dyadlm.model import DyadCache, DyadForCausalLM


@dataclass
class Drafts:
    """How well tokens were foreseen."""

    made: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """The share of accepted drafts; 0 if none was made."""
        return self.accepted / max(self.made, 1)


class Speculation:
    """A greedy continuation: ask for `next`, then `take` it or stop; `settle` ends it in any case.

    state, logits (V,): after the last token that was read.
    """

    def __init__(self, model: DyadForCausalLM, state: DyadCache, logits: Tensor, drafts: Drafts):
        self._model, self._drafts = model, drafts
        self.state, self.logits = state, logits
        self._draft: int | None = None  # what is proposed for the token after next; unknown before the first pass
        self._taken: list[int] = []  # tokens decided on that `state` has not read
        self._ahead: tuple[DyadCache, Tensor, int] | None = None  # state, logits and draft with the token on offer
        self._offered = int(logits.argmax())

    def next(self) -> int:
        """The token that comes next."""
        return self._offered

    def take(self) -> None:
        """Go on after the token on offer."""
        self._taken.append(self._offered)
        if self._ahead is not None:  # it was foreseen, and has been read
            self.state, self.logits, self._draft = self._ahead
            self._ahead, self._taken = None, []
        elif len(self._taken) == 1 and self._draft is not None:
            self._try(self._draft)
            return
        else:
            self.settle()
        self._offered = int(self.logits.argmax())

    def settle(self) -> None:
        """Read what was taken; the state then stands after it."""
        if self._taken:
            self.logits, self._draft = self._read(self.state, self._taken)[-1]
            self._taken = []
        self._ahead = None

    def _try(self, draft: int) -> None:
        """Read the token taken and the draft after it, on a copy of the state."""
        state = self.state.copy()
        (logits, _), after = self._read(state, [*self._taken, draft])
        self._offered = int(logits.argmax())
        self._drafts.made += 1
        if self._offered == draft:
            self._drafts.accepted += 1
            self._ahead = (state, *after)

    def _read(self, state: DyadCache, tokens: list[int]) -> list[tuple[Tensor, int]]:
        """Logits (V,) and draft after each of some tokens; the state goes on."""
        ids = torch.tensor([tokens], device=self._model.device)
        return read_ahead(self._model, ids, state)


@torch.inference_mode()
def read_ahead(model: DyadForCausalLM, ids: Tensor, state: DyadCache) -> list[tuple[Tensor, int]]:
    """Logits (V,) and the proposed token after next at each of ids (1, T); the state goes on."""
    output = model(input_ids=ids, past_key_values=state, use_cache=True, output_plan=True)
    return list(zip(output.logits[0].float(), output.plan.proposal[0].argmax(-1).tolist(), strict=True))


def require_proposals(model: PreTrainedModel, sampling: Sampling) -> DyadForCausalLM:
    """The model, if it can speculate; raises `UserError` if it proposes nothing, or tokens are to be drawn."""
    if not isinstance(model, DyadForCausalLM) or model.planner is None:
        raise UserError("Speculation needs proposals of the token after next, which a model with a planner makes.")
    if sampling.temperature:
        raise UserError(
            f"Speculation takes the likeliest tokens; set the temperature to 0, not {sampling.temperature:g}."
        )
    return model
