"""Any causal language model of transformers as the reader of a session.

Dimension letters: T tokens, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from dyadlm.causal_lm import Continuation
from dyadlm.engine.bridge import Decoder, decoder_of
from dyadlm.errors import UserError
from dyadlm.generate.reader import before_each
from dyadlm.generate.sampling import Sampling
from dyadlm.generate.speculation import Drafts, Speculation, require_proposals
from dyadlm.generate.states import require_lasting_slots, require_learnable, require_saveable_state
from dyadlm.model import DyadCache, DyadForCausalLM
from dyadlm.model.empty_state import identity_of

# Tokens read in one forward pass; longer texts go through in pieces, at constant memory.
CHUNK = 2048


class TorchReader:
    """A model and its state. See `dyadlm.generate.reader.Reader`.

    state: the `past_key_values` of our models. Others have a state of their own, which grows.
    """

    def __init__(self, model: PreTrainedModel, state: Any = None, logits: np.ndarray | None = None):
        self.model, self.state, self.logits = model, state, logits
        self.hidden: np.ndarray | None = None  # float32 (D,), from which logits come, after `read_inside`
        self._other = None if isinstance(model, DyadForCausalLM) else Continuation(model)
        self._ids: list[np.ndarray] = []  # all that another model has read
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.end_tokens = frozenset(() if ends is None else (ends,) if isinstance(ends, int) else ends)
        self._decoder: Decoder | None = None

    @property
    def room(self) -> int | None:
        """How many more tokens can be read; None where there is no limit."""
        return None if self._other is None else self._other.room

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Read ids int64 (T,); returns nats float32 (T,). Raises `UserError` for more tokens than there is room."""
        if self._other is not None:
            self._other.require_room(len(ids))
        parts = [self._read(ids[at : at + CHUNK]) for at in range(0, len(ids), CHUNK)]
        return np.concatenate(parts or [np.empty(0, np.float32)])

    def read_next(self, token: int, first: bool) -> None:
        """Read one token of a continuation, by the engine where it serves the model as it is at the first token."""
        if first:
            self._decoder = decoder_of(self.model) if isinstance(self.model, DyadForCausalLM) else None
        if self._decoder is None:
            self._read(np.array([token]))
        else:
            self.logits = self._decoder.step([token], self.state)[0, -1].numpy()

    def speculation(self, sampling: Sampling, drafts: Drafts) -> Speculation:
        """A continuation that reads ahead; `settle` it, then hand it to `take_over`."""
        model = require_proposals(self.model, sampling)
        return Speculation(model, self.state, torch.from_numpy(self.logits), drafts)

    def take_over(self, speculation: Speculation) -> None:
        """Stand where a settled speculation stands."""
        self.state, self.logits = speculation.state, speculation.logits.cpu().numpy()

    def read_inside(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read ids int64 (T,), T > 0; what the model had before each: logits float32 (T, V), and the hidden state
        float32 (T, D) from which they come. NaN before a token that nothing predicted.

        Raises `UserError` for a model that is not ours.
        """
        require_learnable(self.model)
        parts = [self._read_inside(ids[at : at + CHUNK]) for at in range(0, len(ids), CHUNK)]
        return np.concatenate([logits for logits, _ in parts]), np.concatenate([hidden for _, hidden in parts])

    def expect(self, logits: np.ndarray, hidden: np.ndarray | None) -> None:
        """Take these logits (V,), and the hidden state (D,) they come from, for those that predict the next token."""
        self.logits, self.hidden = logits, hidden

    def save(self, path: Path, beside: Mapping[str, np.ndarray] | None = None) -> None:
        """Write the state as safetensors, replacing the file."""
        config = require_saveable_state(self.model)
        state = DyadCache() if self.state is None else self.state
        state.save(path, config, identity_of(cast(DyadForCausalLM, self.model)), beside)

    def load(self, path: Path) -> None:
        """Take up a saved state."""
        config = require_saveable_state(self.model)
        state = DyadCache.load(path, config, self.model.device, identity_of(cast(DyadForCausalLM, self.model)))
        if state.batch_size > 1:
            raise UserError(f"{path} holds {state.batch_size} rows, but a session reads one text.")
        self.state, self.logits, self.hidden = state, None, None

    def skip_slot_write(self) -> None:
        """Let the next token leave the tables of slots as they are."""
        if self._other is None and self.state is not None:
            self.state.skip_slot_write()

    def start_document(self) -> None:
        """Keep the tables of slots alone."""
        require_lasting_slots(vars(require_saveable_state(self.model)))
        if self.state is not None:
            self.state.start_document()
        self.logits = self.hidden = None

    def snapshot(self) -> tuple[Any, np.ndarray | None, np.ndarray | None]:
        """State, logits and hidden state. Of other models, whose states are large and not always copied, the tokens."""
        if self._other is not None:
            return list(self._ids), self.logits, None
        return None if self.state is None else self.state.copy(), self.logits, self.hidden

    def restore(self, snapshot: tuple[Any, np.ndarray | None, np.ndarray | None]) -> None:
        """Stand where `snapshot` was called. Other models read their tokens again."""
        kept, logits, hidden = snapshot
        if self._other is not None:
            self._other, self._ids = Continuation(self.model), []
            self.logits = None
            self.read(np.concatenate(kept or [np.empty(0, np.int64)]))
        else:
            self.state = None if kept is None else kept.copy()
        self.logits, self.hidden = logits, hidden

    @property
    def position(self) -> int:
        """Tokens read so far."""
        if self._other is not None:
            return self._other.seen
        return 0 if self.state is None else int(self.state.get_seq_length())

    @property
    def state_bytes(self) -> int | None:
        """Bytes of all tensors; None for other models."""
        if self._other is not None:
            return None
        return 0 if self.state is None else int(self.state.state_bytes())

    @torch.inference_mode()
    def _read(self, ids: np.ndarray) -> np.ndarray:
        """One forward pass over ids (T,); returns nats float32 (T,)."""
        tokens = torch.as_tensor(ids, dtype=torch.long, device=self.model.device)
        if self._other is None:
            output = self.model(input_ids=tokens[None], past_key_values=self.state, use_cache=True)
            self.state, logits = output.past_key_values, output.logits[0].float()
        else:
            logits = self._other.read(tokens[None])[0].float()
            self._ids.append(np.array(ids))
        first = logits.new_full((1, logits.shape[-1]), torch.nan)
        if self.logits is not None:
            first = torch.as_tensor(self.logits, device=logits.device)[None]
        nats = cross_entropy(torch.cat([first, logits[:-1]]), tokens, reduction="none")
        self.logits, self.hidden = logits[-1].cpu().numpy().copy(), None
        return np.asarray(nats.cpu().numpy())

    @torch.inference_mode()
    def _read_inside(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `read_inside`, in one forward pass."""
        tokens = torch.as_tensor(ids, dtype=torch.long, device=self.model.device)
        output = self.model(
            input_ids=tokens[None], past_key_values=self.state, use_cache=True, output_hidden_states=True
        )
        self.state = output.past_key_values
        logits, hidden = (tensor[0].float().cpu().numpy() for tensor in (output.logits, output.hidden_states[-1]))
        found = before_each(self.logits, logits), before_each(self.hidden, hidden)
        self.logits, self.hidden = logits[-1].copy(), hidden[-1].copy()
        return found
