"""A model that has read some text: it reads on, tells its surprise, and continues, from one state."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dyadlm.errors import RunFailed, UserError
from dyadlm.files import require_new
from dyadlm.generate.decoding import IncrementalDecoder
from dyadlm.generate.sampling import Sampler, Sampling
from dyadlm.generate.speculation import Drafts, Speculation, require_proposals
from dyadlm.model import DyadCache, DyadConfig

# Tokens read in one forward pass; longer texts go through in pieces, at constant memory.
CHUNK = 512


class Session:
    """The state of a model after all it has read and written so far.

    With a dyadlm model the state has constant size, and can be saved and taken up again; other models keep
    their own growing cache. begins: whether the next token is the first of its document.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self._model = model
        self._tokenizer = tokenizer
        self.begins = True
        self._state: Any = None
        self._logits: torch.Tensor | None = None  # float32 (V,), of the next token

    @property
    def predicts(self) -> bool:
        """Whether the next token will be predicted; it is not at the beginning, nor after loading a state."""
        return self._logits is not None

    def read(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read token ids (T,); returns the surprise at each, nats float32 (T,).

        It is NaN for a first token that nothing predicted (nothing was read before, or the state was loaded).
        """
        ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64), device=self._model.device)
        return np.concatenate([np.empty(0, np.float32), *(self._read(chunk) for chunk in torch.split(ids, CHUNK))])

    def read_prompt(self, text: str) -> None:
        """Read a text as `generate` is given it: where a document begins with the specials its tokenizer adds."""
        self.read(self._tokenizer(text, add_special_tokens=self.begins)["input_ids"])

    def write(
        self, max_new_tokens: int, sampling: Sampling, stop: Sequence[str] = (), drafts: Drafts | None = None
    ) -> Iterator[str]:
        """Continue, yielding text as it comes. What is written has been read, too: the state includes it.

        Ends after `max_new_tokens`, at an end of text (which is not read), or with the token that completes
        one of the `stop` strings in what is written (it is yielded, as in Hugging Face, where the end of the
        prompt may be part of it). drafts: speculate (`dyadlm.generate.speculation`), and count in it how that goes.
        Raises `UserError` if there is nothing to continue from, and `RunFailed` if
        the model's logits are not numbers.
        """
        if self._logits is None:
            raise UserError("There is nothing to continue from; give a prompt of at least one character.")
        if max_new_tokens < 1:
            raise UserError(f"Ask for at least 1 new token, not {max_new_tokens}.")
        if not all(stop):
            raise UserError("A stop string has at least one character.")
        guess = None
        if drafts is not None:
            guess = Speculation(require_proposals(self._model, sampling), self._state, self._logits, drafts)
        sampler, decoder = Sampler(sampling, self._model.device), IncrementalDecoder(self._tokenizer)
        ends, tail = self._end_tokens(), ""
        try:
            for _ in range(max_new_tokens):
                logits = self._logits if guess is None else guess.logits
                if not torch.isfinite(logits.max()):
                    raise RunFailed("The model's logits are not numbers; its weights are damaged or diverged.")
                token = sampler(logits) if guess is None else guess.next()
                if token in ends:
                    break
                if guess is None:
                    self._read(torch.tensor([token], device=self._model.device))
                else:
                    guess.take()
                if piece := decoder.push(token):
                    yield piece
                    tail += piece
                    if any(text in tail for text in stop):
                        return
                    tail = tail[-max(map(len, stop), default=1) :]
            if rest := decoder.finish():
                yield rest
        finally:
            if guess is not None:
                guess.settle()
                self._state, self._logits = guess.state, guess.logits

    def save(self, path: Path) -> None:
        """Write the state as safetensors, replacing the file. Raises `UserError` if the model has none."""
        self._state.save(path, require_saveable_state(self._model))

    def load(self, path: Path) -> None:
        """Take up a saved state: reading on then equals having read the whole text.

        Raises `UserError` if the file is no state of a model of this shape.
        """
        config = require_saveable_state(self._model)
        self._state = DyadCache.load(path, config, device=self._model.device)
        self._logits, self.begins = None, False

    def start_document(self) -> None:
        """Begin a new document; what the slots remember of those before can be recalled in it, nothing else.

        Raises `UserError` for a model whose slots are empty where a document starts, or that has none.
        """
        require_lasting_slots(self._model)
        if self._state is not None:
            self._state.start_document()
        self._logits, self.begins = None, True

    @torch.no_grad()
    def _read(self, ids: torch.Tensor) -> np.ndarray:
        """One forward pass over ids (T,); returns nats float32 (T,)."""
        if not len(ids):
            return np.empty(0, np.float32)
        output = self._model(input_ids=ids[None], past_key_values=self._state, use_cache=True)
        logits = output.logits[0].float()
        before = logits.new_full((1, logits.shape[-1]), torch.nan) if self._logits is None else self._logits[None]
        self._state, self._logits, self.begins = output.past_key_values, logits[-1].clone(), False
        return cross_entropy(torch.cat([before, logits[:-1]]), ids, reduction="none").cpu().numpy()

    def _end_tokens(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def require_saveable_state(model: PreTrainedModel) -> DyadConfig:
    """The configuration of one of our models; raises `UserError` for others, whose state fits no file."""
    if not isinstance(model.config, DyadConfig):
        raise UserError(
            f"A {model.config.model_type} model keeps no state that can be saved; leave out --state-in and --state-out."
        )
    return model.config


def require_lasting_slots(model: PreTrainedModel) -> None:
    """Raise `UserError` unless the model remembers something from one document to the next."""
    config = require_saveable_state(model)
    if not config.slot_contexts:
        raise UserError(
            "This model has no slots (slot_contexts), so a new document would recall nothing of the saved state; "
            "leave out --new-document to continue the old one, or --state-in to begin anew."
        )
    if config.slot_scope != "stream":
        raise UserError(
            f"The slots of this model are emptied where a document starts (slot_scope={config.slot_scope}); "
            "add --set slot_scope=stream to keep them."
        )


def open_session(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state_in: Path | None = None,
    new_document: bool = False,
    state_out: Path | None = None,
) -> Session:
    """A session at its beginning, or after a saved state.

    new_document: begin a new document, which recalls what the slots of the saved state hold.
    state_out: where the state is to be saved in the end: a new file, or `state_in` again.
    Raises `UserError` for what does not fit together, before anything is read.
    """
    if new_document and state_in is None:
        raise UserError("A new document recalls a saved state; give one with --state-in, or leave out --new-document.")
    if state_out is not None:
        require_saveable_state(model)
        if state_out != state_in:
            require_new(state_out, "the state")
    session = Session(model, tokenizer)
    if state_in is not None:
        session.load(state_in)
    if new_document:
        session.start_document()
    return session


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    state_in: Path | None = None,
    new_document: bool = False,
    state_out: Path | None = None,
    drafts: Drafts | None = None,
) -> Iterator[str]:
    """Continue a prompt, yielding text as it comes: what Hugging Face `generate` writes with these options.

    state_in: a saved state that the prompt continues. new_document: the prompt begins a new document instead, which
    recalls what the slots of the saved state hold. state_out: where the state after prompt and
    continuation goes when the text has ended; a new file, or `state_in` again. drafts: speculate, greedily, and count.
    Raises `UserError` for an empty prompt, an option out of range, and a state that does not fit.
    """
    if not prompt:
        raise UserError("The prompt is empty; give at least one character.")
    if drafts is not None:
        require_proposals(model, sampling or Sampling())
    session = open_session(model, tokenizer, state_in, new_document, state_out)
    session.read_prompt(prompt)
    yield from session.write(max_new_tokens, sampling or Sampling(), stop, drafts)
    if state_out is not None:
        session.save(state_out)
