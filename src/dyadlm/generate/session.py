"""A model and the state of all it has read: it reads on, gives the surprise of each token, and continues the text."""

import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from dyadlm.data.encoding import AnyTokenizer
from dyadlm.errors import RunFailed, UserError
from dyadlm.generate.decoding import IncrementalDecoder
from dyadlm.generate.engine_reader import EngineModel
from dyadlm.generate.reader import Reader
from dyadlm.generate.sampling import Sampler, Sampling
from dyadlm.generate.states import require_saveable_state, require_slots, require_state_files
from dyadlm.state_file import holds_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dyadlm.generate.speculation import Drafts
    from dyadlm.memory import ContextMemory

log = logging.getLogger("dyadlm")

Model: TypeAlias = "PreTrainedModel | EngineModel"
Slots: TypeAlias = Literal["all", "prompt"]


class Session:
    """The state of a model after all it has read and written so far.

    With a dyadlm model the state has constant size, and can be saved and taken up again; other models keep
    their own growing cache. begins: whether the next token is the first of its document. end_tokens: the ids at which
    `write` ends.
    """

    def __init__(
        self, model: Model, tokenizer: AnyTokenizer, memory: "ContextMemory | None" = None, slots: Slots = "all"
    ):
        """model: any causal language model of transformers, or the engine's form of one of ours. memory: of what
        followed each context, mixed into its predictions. slots: what they take in: all, or the prompt alone, not what
        the model writes, which then copies itself less and seldom runs in a circle.

        Raises `UserError` where a model without slots is to fill them with the prompt alone.
        """
        if slots == "prompt":
            require_slots(model.fields if isinstance(model, EngineModel) else vars(model.config))
        self._slots = slots
        self._reader = reader_of(model, memory)
        self._tokenizer = tokenizer
        self.begins = True
        self.end_tokens = self._reader.end_tokens

    @property
    def predicts(self) -> bool:
        """Whether the next token will be predicted; it is not at the beginning, nor after loading a state."""
        return self._reader.logits is not None

    @property
    def logits(self) -> np.ndarray | None:
        """Of the next token, float32 (V,); None where nothing predicts it."""
        return self._reader.logits

    @property
    def expected(self) -> np.ndarray | None:
        """What `expect` takes, float32 (V,): the logits of the model alone, before a memory is mixed in."""
        return self._reader.logits if self.memory is None else self._reader.alone  # type: ignore[attr-defined]

    @property
    def state(self) -> Any:
        """What the model carries: `past_key_values` in torch, an `EngineState` in the engine."""
        return self._reader.state

    @property
    def memory(self) -> "ContextMemory | None":
        """What is mixed into the predictions, if anything is."""
        return getattr(self._reader, "memory", None)

    def read(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read token ids (T,); returns the surprise at each, nats float32 (T,).

        It is NaN for a first token that nothing predicted (nothing was read before, or the state was loaded). Raises
        `RunFailed` if the model's logits are not numbers.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        self.begins = self.begins and not len(ids)
        unpredicted = int(self._reader.logits is None)
        nats = self._reader.read(ids)
        if np.isnan(nats[unpredicted:]).any():
            raise RunFailed("The model's logits are not numbers; its weights are damaged or diverged.")
        return nats

    def read_inside(self, tokens: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read token ids (T,), T > 0; what the model had before each: logits float32 (T, V), and the last hidden state
        float32 (T, D). NaN before a token that nothing predicted.

        A memory has not read them before `remember` is called. Raises `UserError` for a model that is not ours.
        """
        self.begins = False
        return self._reader.read_inside(np.asarray(tokens, dtype=np.int64))

    def remember(self, tokens: np.ndarray, nats: np.ndarray) -> np.ndarray:
        """Nats (T,) of tokens (T,) that `read_inside` has read, and that cost nats (T,) without the memory."""
        return nats if self.memory is None else self._reader.remember(tokens, nats)  # type: ignore[attr-defined]

    @property
    def hidden(self) -> np.ndarray | None:
        """The last hidden state float32 (D,), after `read_inside`."""
        return self._reader.hidden

    def read_prompt(self, text: str) -> None:
        """Read a text as `generate` is given it: where a document begins with the specials its tokenizer adds."""
        self.read(self._tokenizer(text, add_special_tokens=self.begins)["input_ids"])

    def write(
        self,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        drafts: "Drafts | None" = None,
        decoder: IncrementalDecoder | None = None,
    ) -> Generator[str]:
        """Continue, yielding text as it comes. What is written has been read, too: the state includes it.

        Ends after `max_new_tokens`, at an end of text (which is not read), or with the token that completes
        one of the `stop` strings in what is written (it is yielded, as in Hugging Face, where the end of the
        prompt may be part of it). drafts: speculate (`dyadlm.generate.speculation`), and count in it how that goes.
        decoder: holds back an unfinished character at the end, for the next continuation; without one it is written as
        far as it can be read.
        Raises `UserError` if there is nothing to continue from, and `RunFailed` if
        the model's logits are not numbers.
        """
        if self._reader.logits is None:
            raise UserError("There is nothing to continue from; give a prompt of at least one character.")
        if max_new_tokens < 1:
            raise UserError(f"Ask for at least 1 new token, not {max_new_tokens}.")
        if not all(stop):
            raise UserError("A stop string has at least one character.")
        if drafts is None:
            tokens = self._next_tokens(max_new_tokens, sampling)
        else:
            tokens = self._foreseen_tokens(max_new_tokens, sampling, drafts)
        finishes = decoder is None
        decoder, tail = decoder or IncrementalDecoder(self._tokenizer), ""
        with closing(tokens):
            for token in tokens:
                if piece := decoder.push(token):
                    yield piece
                    tail += piece
                    if any(text in tail for text in stop):
                        return
                    tail = tail[-max(map(len, stop), default=1) :]
            if finishes and (rest := decoder.finish()):
                yield rest

    def expect(self, logits: np.ndarray, hidden: np.ndarray | None = None) -> None:
        """Take saved logits (V,), and the hidden state (D,) they come from, for those that predict the next token."""
        self._reader.expect(logits, hidden)

    def save(self, path: Path, beside: Mapping[str, np.ndarray] | None = None) -> None:
        """Write the state as safetensors, replacing the file. Raises `UserError` if the model has none.

        beside: other numbers that are kept in the file (`dyadlm.state_file.read_beside`).
        """
        self._reader.save(path, beside)

    def saving(self, path: Path | None) -> Callable[[], None] | None:
        """What saves the state to a path, as it is then; None without one."""
        return None if path is None else partial(self.save, path)

    def load(self, path: Path) -> None:
        """Load a saved state: reading on then equals having read the whole text.

        Raises `UserError` if the file is no state of a model of this shape, or holds a memory where there is none.
        """
        if self.memory is None and holds_memory(path):
            raise UserError(f"{path} holds a memory, which would be lost; add --memory.")
        self._reader.load(path)
        self.begins = False

    def start_document(self) -> None:
        """Begin a new document; what the slots remember of those before can be recalled in it, nothing else.

        Raises `UserError` for a model whose slots are empty where a document starts, or that has none.
        """
        self._reader.start_document()
        self.begins = True

    def snapshot(self) -> Any:
        """Where the session stands, for `restore`. Of our models it has the size of the state; of others it holds the
        tokens, which `restore` reads again."""
        return self._reader.snapshot(), self.begins

    def restore(self, snapshot: Any) -> None:
        """Stand where `snapshot` was called on this session; as often as wanted."""
        kept, self.begins = snapshot
        self._reader.restore(kept)

    @property
    def position(self) -> int:
        """Tokens read and written so far, those before a loaded state included."""
        return self._reader.position

    @property
    def state_bytes(self) -> int | None:
        """Bytes of the state, and of the memory; None for models of others, whose state grows."""
        return self._reader.state_bytes

    def _next_tokens(self, most: int, sampling: Sampling) -> Generator[int]:
        """Tokens drawn one by one; each has been read when it is handed out."""
        sampler = Sampler(sampling)
        for number in range(most):
            if self._reader.room == 0:
                log.warning("The text ends here: the model has no positions for more tokens.")
                return
            token = sampler(require_numbers(self._reader.logits))
            if token in self.end_tokens:
                return
            if self._slots == "prompt":
                self._reader.skip_slot_write()
            self._reader.read_next(token, first=number == 0)
            yield token

    def _foreseen_tokens(self, most: int, sampling: Sampling, drafts: "Drafts") -> Generator[int]:
        """Greedy tokens, two for one pass where the second was foreseen."""
        if self._slots == "prompt":
            raise UserError("Speculation fills the slots with what it writes; leave out --speculate or --slots prompt.")
        speculation = self._reader.speculation(sampling, drafts)
        try:
            for _ in range(most):
                require_numbers(speculation.logits)
                token = speculation.next()
                if token in self.end_tokens:
                    return
                speculation.take()
                yield token
        finally:
            speculation.settle()
            self._reader.take_over(speculation)


def require_numbers(logits: Any) -> Any:
    """The logits (V,), if they are numbers; else raises `RunFailed`."""
    if not math.isfinite(float(logits.max())):
        raise RunFailed("The model's logits are not numbers; its weights are damaged or diverged.")
    return logits


def require_speculation(model: Model, sampling: Sampling) -> None:
    """Raise `UserError` if the model foresees nothing, or tokens are to be drawn."""
    if isinstance(model, EngineModel):
        model.reader().speculation(sampling, None)
    else:
        from dyadlm.generate.speculation import require_proposals

        require_proposals(model, sampling)


def reader_of(model: Model, memory: "ContextMemory | None" = None) -> Reader:
    """What a session reads with."""
    if memory is not None:
        from dyadlm.generate.memory_reader import MemoryReader

        return MemoryReader(reader_of(model), memory)
    if isinstance(model, EngineModel):
        return model.reader()
    from dyadlm.generate.torch_reader import TorchReader

    return TorchReader(model)


def open_session(
    model: Model,
    tokenizer: AnyTokenizer,
    state_in: Path | None = None,
    new_document: bool = False,
    state_out: Path | None = None,
    memory: "ContextMemory | None" = None,
    slots: Slots = "all",
) -> Session:
    """A session at its beginning, or after a saved state.

    slots: as in `Session`. memory: mixed into the predictions, saved with the state and loaded with it.
    new_document: begin a new document, which recalls what the slots of the saved state hold.
    state_out: where the state is to be saved in the end: a new file, or `state_in` again.
    Raises `UserError` for what does not fit together, before anything is read.
    """
    require_state_files(state_in, new_document, state_out)
    if state_out is not None and not isinstance(model, EngineModel):
        require_saveable_state(model)
    session = Session(model, tokenizer, memory, slots)
    if state_in is not None:
        session.load(state_in)
    if new_document:
        session.start_document()
    return session


def generate_text(
    model: Model,
    tokenizer: AnyTokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    state_in: Path | None = None,
    new_document: bool = False,
    state_out: Path | None = None,
    drafts: "Drafts | None" = None,
    memory: "ContextMemory | None" = None,
    slots: Slots = "all",
) -> Iterator[str]:
    """Continue a prompt, yielding text as it comes: what Hugging Face `generate` writes with these options.

    state_in: a saved state that the prompt continues. new_document: the prompt begins a new document instead, which
    recalls what the slots of the saved state hold. state_out: where the state after prompt and continuation goes when
    the text has ended, or is read no further; a new file, or `state_in` again. drafts: speculate, greedily, and count.
    memory, slots: as in `open_session`.
    Raises `UserError` for an empty prompt, an option out of range, and a state that does not fit.
    """
    if not prompt:
        raise UserError("The prompt is empty; give at least one character.")
    if drafts is not None:
        require_speculation(model, sampling or Sampling())
    session = open_session(model, tokenizer, state_in, new_document, state_out, memory, slots)
    session.read_prompt(prompt)
    try:
        yield from session.write(max_new_tokens, sampling or Sampling(), stop, drafts)
    except GeneratorExit:  # whoever reads has had enough; what was read until then is not lost
        if state_out is not None:
            session.save(state_out)
        raise
    if state_out is not None:
        session.save(state_out)
