"""Texts that a model reads at the same time, one row each: how they stand, move on, are copied and saved.

`BatchedRows` reads one token of many rows in one step: states of constant size lie side by side in one block of memory.
`SeparateRows` reads row by row, with any causal language model.

Dimension letters: B rows, T tokens, V vocabulary.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from dyadlm.engine import Engine, EngineState
from dyadlm.errors import UserError
from dyadlm.generate.reader import Reader, before_each, nats_of
from dyadlm.state_file import read_beside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dyadlm.model import DyadCache

# Beside the state in a file: the logits of the next token.
LOGITS = "serve.logits"
# A text of so many tokens is a long one: short requests go before it.
LONG = 128


@dataclass(eq=False)
class Row:
    """One text as a model has read it. state: of the engine, or the reader that holds it; None while the row is seated.
    logits: of the next token, float32 (V,); None where nothing predicts it. tokens: read so far. begins: whether the
    next token is the first of its document. place: among the seated rows of `BatchedRows`.
    """

    state: Any
    logits: np.ndarray | None = None
    tokens: int = 0
    begins: bool = True
    place: int = -1


class Reading(NamedTuple):
    """What was known before each of T tokens. nats: float32 (T,), NaN where nothing predicted the token. logits:
    float32 (T, V) before each, NaN likewise; None where they were not asked for."""

    nats: np.ndarray
    logits: np.ndarray | None


class Rows(Protocol):
    """The rows of one model. All methods but `copy`, `save`, `load` and `nbytes` belong to one thread."""

    def start(self) -> Row:
        """A row that has read nothing."""
        ...

    def copy(self, row: Row) -> Row:
        """A row that goes on by itself, of one that is not seated."""
        ...

    def release(self, row: Row, keep: bool = False) -> None:
        """The row reads no more here. keep: it is used on, elsewhere."""
        ...

    def read(self, row: Row, ids: np.ndarray, inside: bool) -> Reading:
        """Read ids int64 (T,). inside: give the logits before each."""
        ...

    def step(self, rows: Sequence[Row], tokens: Sequence[int]) -> None:
        """Read one token in each of B rows."""
        ...

    def skip_slot_write(self, row: Row) -> None:
        """Let the next token of a row leave its tables of slots as they are."""
        ...

    def room(self, row: Row) -> int | None:
        """How many more tokens a row can read; None where there is no limit."""
        ...

    def nbytes(self, row: Row) -> int:
        """Bytes of the row's state and logits."""
        ...

    def cache(self, row: Row) -> "DyadCache":
        """A copy of the state of a row of ours that is not seated, as torch has it."""
        ...

    def taken(self, cache: "DyadCache", logits: np.ndarray | None, tokens: int) -> Row:
        """A row of ours that stands where torch does, tokens read, with the logits of the next."""
        ...

    def save(self, row: Row, path: Path, beside: Mapping[str, np.ndarray]) -> None:
        """Write a row that is not seated, with its logits and numbers beside it, atomically."""
        ...

    def load(self, path: Path) -> Row:
        """Take up a saved state; raises `UserError` if it is damaged or of another model."""
        ...


class BatchedRows:
    """Rows of the engine. Those that step are seated: they are the first rows of one state of many rows."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._seats = engine.start(1)
        self._seated: list[Row] = []
        self._views: dict[int, EngineState] = {}

    def start(self) -> Row:
        return Row(self.engine.start())

    def copy(self, row: Row) -> Row:
        return Row(row.state.copy(), row.logits, row.tokens, row.begins)

    def release(self, row: Row, keep: bool = False) -> None:
        if row.place >= 0:
            self._unseat(row, keep)

    def read(self, row: Row, ids: np.ndarray, inside: bool) -> Reading:
        if row.place >= 0:
            self._unseat(row, True)
        before = row.logits
        logits = self.engine.read(row.state, ids)
        row.logits, row.tokens, row.begins = logits[-1].copy(), row.tokens + len(ids), False
        nats = nats_of(before, logits, ids)
        return Reading(nats, before_each(before, logits) if inside else None)

    def step(self, rows: Sequence[Row], tokens: Sequence[int]) -> None:
        self._seat(rows)
        ordered = [0] * len(rows)
        for row, token in zip(rows, tokens, strict=True):
            ordered[row.place] = token
        logits = self.engine.step_rows(self._view(len(rows)), ordered)
        for row in rows:
            row.logits, row.tokens, row.begins = logits[row.place], row.tokens + 1, False

    def skip_slot_write(self, row: Row) -> None:
        if row.place >= 0:
            self._seats.skip_slot_write([row.place])
        else:
            row.state.skip_slot_write()

    def room(self, row: Row) -> None:
        return None

    def nbytes(self, row: Row) -> int:
        held = () if row.logits is None else (row.logits,)
        return sum(array.nbytes for array in (*row.state.arrays().values(), *held))

    def cache(self, row: Row) -> "DyadCache":
        from dyadlm.engine.bridge import cache_of

        return cache_of(row.state.copy())

    def taken(self, cache: "DyadCache", logits: np.ndarray | None, tokens: int) -> Row:
        tensors = {name: tensor.numpy() for name, tensor in cache.tensors().items()}
        return Row(self.engine.state_from(tensors, cache.columns_seen), logits, tokens, begins=not tokens)

    def save(self, row: Row, path: Path, beside: Mapping[str, np.ndarray]) -> None:
        self.engine.save_state(row.state, path, {**beside, **logits_beside(row)})

    def load(self, path: Path) -> Row:
        state = self.engine.load_state(path)
        if state.rows > 1:
            raise UserError(f"The file holds {state.rows} rows, but a session reads one text.")
        logits = logits_of(path, self.engine.vocab_size)
        return Row(state, logits, state.columns_seen, begins=state.is_empty)

    def _seat(self, rows: Sequence[Row]) -> None:
        """Let exactly these rows be seated."""
        wanted = set(map(id, rows))
        for row in [row for row in self._seated if id(row) not in wanted]:
            self._unseat(row, True)
        for row in rows:
            if row.place < 0:
                self._grow(len(self._seated) + 1)
                row.place = len(self._seated)
                self._seats.put(row.place, row.state)
                row.state = None
                self._seated.append(row)

    def _unseat(self, row: Row, keep: bool) -> None:
        """Take a row out; the last one moves to its seat. keep: it goes on."""
        place = row.place
        if keep:
            row.state = self._seats.select([place])  # first: without memory for it, nothing has changed
            row.state.columns_seen = row.tokens
            row.logits = None if row.logits is None else row.logits.copy()  # of all rows, else
        last = self._seated.pop()
        if last is not row:
            self._seats.put(place, self._seats, last.place)
            last.place = place
            self._seated[place] = last
        row.place = -1

    def _grow(self, rows: int) -> None:
        if rows > self._seats.rows:
            grown = self.engine.start(2 * self._seats.rows)
            for name, array in self._seats.arrays().items():
                getattr(grown, name)[: len(array)] = array
            self._seats, self._views = grown, {}

    def _view(self, rows: int) -> EngineState:
        if rows not in self._views:
            self._views[rows] = self._seats.first(rows)
        return self._views[rows]


class SeparateRows:
    """Rows of any causal language model, each with its own reader; they step one after the other."""

    def __init__(self, model: "PreTrainedModel", vocabulary: int):
        self._model, self._vocabulary = model, vocabulary

    def start(self) -> Row:
        from dyadlm.generate.torch_reader import TorchReader

        return Row(TorchReader(self._model))

    def copy(self, row: Row) -> Row:
        # The model is shared; what it carries is not.
        twin = copy.deepcopy(row.state, {id(self._model): self._model})
        return Row(twin, row.logits, row.tokens, row.begins)

    def release(self, row: Row, keep: bool = False) -> None:
        """Nothing is held here."""

    def read(self, row: Row, ids: np.ndarray, inside: bool) -> Reading:
        reader: Reader = row.state
        if inside:
            before, logits = row.logits, []
            for token in ids:
                reader.read(np.array([token]))
                logits.append(np.asarray(reader.logits))
            after = np.stack(logits)
            reading = Reading(nats_of(before, after, ids), before_each(before, after))
        else:
            reading = Reading(reader.read(ids), None)
        row.logits, row.tokens, row.begins = reader.logits, row.tokens + len(ids), False
        return reading

    def step(self, rows: Sequence[Row], tokens: Sequence[int]) -> None:
        for row, token in zip(rows, tokens, strict=True):
            row.state.read(np.array([token]))
            row.logits, row.tokens, row.begins = row.state.logits, row.tokens + 1, False

    def skip_slot_write(self, row: Row) -> None:
        row.state.skip_slot_write()

    def room(self, row: Row) -> int | None:
        return row.state.room  # type: ignore[no-any-return]

    def nbytes(self, row: Row) -> int:
        cache = row.state.state
        return (0 if cache is None else cache.state_bytes()) + (0 if row.logits is None else row.logits.nbytes)

    def cache(self, row: Row) -> "DyadCache":
        from dyadlm.model import DyadCache

        kept = row.state.state
        return DyadCache() if kept is None else kept.copy()

    def taken(self, cache: "DyadCache", logits: np.ndarray | None, tokens: int) -> Row:
        row = self.start()
        row.state.state = cache
        if logits is not None:
            row.state.expect(logits, None)
        return Row(row.state, logits, tokens, begins=not tokens)

    def save(self, row: Row, path: Path, beside: Mapping[str, np.ndarray]) -> None:
        row.state.save(path, {**beside, **logits_beside(row)})

    def load(self, path: Path) -> Row:
        row = self.start()
        row.state.load(path)
        cache, logits = row.state.state, logits_of(path, self._vocabulary)
        if logits is not None:
            row.state.expect(logits, None)
        return Row(row.state, logits, cache.columns_seen, begins=cache.is_empty)


def logits_beside(row: Row) -> dict[str, np.ndarray]:
    return {} if row.logits is None else {LOGITS: np.ascontiguousarray(row.logits, np.float32)}


def logits_of(path: Path, vocabulary: int) -> np.ndarray | None:
    """The logits beside a state, float32 (V,); None in a file without them. Raises `UserError` if they do not fit."""
    logits = read_beside(path).get(LOGITS)
    if logits is not None and (logits.shape != (vocabulary,) or logits.dtype != np.float32):
        raise UserError("The logits in the file are not of this model.")
    return logits
