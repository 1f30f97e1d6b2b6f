"""A reader whose predictions a memory of what followed each context is mixed into.

Dimension letters: T tokens, V vocabulary.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dyadlm.errors import UserError
from dyadlm.generate.reader import Reader
from dyadlm.generate.sampling import Sampling
from dyadlm.memory import ContextMemory
from dyadlm.memory.context_memory import nats_under
from dyadlm.state_file import memory_beside, read_memory

log = logging.getLogger("dyadlm")


class MemoryReader:
    """Another reader with a memory. See `dyadlm.generate.reader.Reader`."""

    def __init__(self, reader: Reader, memory: ContextMemory):
        self._reader, self.memory = reader, memory
        self.end_tokens = reader.end_tokens
        self._mixed: np.ndarray | None = None

    @property
    def room(self) -> int | None:
        """That of the model."""
        return self._reader.room

    @property
    def state(self) -> Any:
        """That of the model."""
        return self._reader.state

    @property
    def logits(self) -> np.ndarray | None:
        """Log-probabilities of the next token, float32 (V,)."""
        if self._mixed is None and self._reader.logits is not None:
            self._mixed = self.memory.mix(self._reader.logits)
        return self._mixed

    @property
    def alone(self) -> np.ndarray | None:
        """Logits (V,) of the model alone, as `expect` takes them."""
        return self._reader.logits

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Read ids int64 (T,); returns nats float32 (T,)."""
        self._mixed = None
        return self.memory.read(ids, self._reader.read(ids))

    def read_next(self, token: int, first: bool) -> None:
        """Read one token of a continuation."""
        nats = nats_under(self._reader.logits, token)
        self._reader.read_next(token, first)
        self.memory.read(np.array([token]), np.array([nats]))
        self._mixed = None

    def speculation(self, sampling: Sampling, drafts: Any) -> Any:
        """Raises `UserError`: proposals are made without the memory."""
        raise UserError("Speculation cannot use a memory; leave out --speculate or --memory.")

    def take_over(self, speculation: Any) -> None:
        """Never called: there is no speculation."""
        raise NotImplementedError

    @property
    def hidden(self) -> np.ndarray | None:
        """That of the model."""
        return self._reader.hidden

    def read_inside(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the model has before each token; the memory has not read them before it is told what they cost
        (`remember`)."""
        self._mixed = None
        return self._reader.read_inside(ids)

    def remember(self, ids: np.ndarray, nats: np.ndarray) -> np.ndarray:
        """Let the memory read ids (T,) that cost nats (T,), after `read_inside`; returns the nats of the mixture."""
        self._mixed = None
        return self.memory.read(ids, nats)

    def expect(self, logits: np.ndarray, hidden: np.ndarray | None) -> None:
        """Take these logits (V,) of the model for those that predict the next token."""
        self._reader.expect(logits, hidden)
        self._mixed = None

    def save(self, path: Path, beside: Mapping[str, np.ndarray] | None = None) -> None:
        """Write the state of the model and the memory into one file, replacing it."""
        self._reader.save(path, {**(beside or {}), **memory_beside(self.memory.to_dict(), self.memory.tensors())})

    def load(self, path: Path) -> None:
        """Take up a saved state; the memory is empty where the file holds none."""
        self._reader.load(path)
        kept = read_memory(path)
        if kept is None:
            log.warning("%s holds no memory; it begins empty.", path)
            self.memory = ContextMemory(self.memory.options)
        else:
            self.memory = ContextMemory.from_tensors(*kept)
        self._mixed = None

    def skip_slot_write(self) -> None:
        """That of the model."""
        self._reader.skip_slot_write()

    def start_document(self) -> None:
        """Begin a new document, which recalls what is remembered."""
        self._reader.start_document()
        self.memory.start_document()
        self._mixed = None

    def snapshot(self) -> tuple[Any, ContextMemory]:
        """That of the model, and a copy of the memory."""
        return self._reader.snapshot(), self.memory.copy()

    def restore(self, snapshot: tuple[Any, ContextMemory]) -> None:
        """Stand where `snapshot` was called."""
        kept, memory = snapshot
        self._reader.restore(kept)
        self.memory, self._mixed = memory.copy(), None

    @property
    def position(self) -> int:
        """That of the model."""
        return self._reader.position

    @property
    def state_bytes(self) -> int | None:
        """Of the model and the memory."""
        own = self._reader.state_bytes
        return None if own is None else own + self.memory.state_bytes
