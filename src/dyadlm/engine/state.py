"""The state of some rows: the arrays of `DyadCache` in the order in which a step uses them.

Dimension letters: B rows, L layers, D width, R rank, S semantic levels, Q layers with slots, N tables, W ways, P parts
of a tag, M numbers that a slot keeps. Ring j holds 2^j sums.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from dyadlm.engine.layout import Shape
from dyadlm.errors import UserError
from dyadlm.state_file import require_fitting

Array = np.ndarray


class EngineState:
    """What a model carries from token to token in each of B rows. `Engine.step` changes it in place.

    rows: B. columns_seen: tokens read so far. Every array has the rows first.
    """

    def __init__(self, shape: Shape, rows: int = 1):
        s, tables = shape, len(shape.contexts)
        self.shape, self.rows, self.columns_seen = shape, rows, 0
        self.owner: object = None  # the engine whose weights `nodes` and `summed` follow from
        self._views: dict[int, tuple[Array, ...]] = {}
        self.tags = np.full((rows, tables, s.sets, s.ways, s.tag_parts), -1, np.int64)
        self.values = np.zeros((rows, len(s.slot_layers), tables, s.sets, s.ways, s.slot_width), s.slot_values)
        # Tags and values. A copy and what it was made of share theirs, until one of them is written to.
        self._owns_tables = True
        self.pending = np.full((rows, tables, s.tag_parts), -1, np.int64)
        self.counter = np.zeros(rows, np.int64)  # tokens of the open document
        # Whether a TAIL stands last, and whether a segment has ended.
        self.marks = np.zeros((rows, 2, len(s.rules)), np.bool_)
        self.counts = np.zeros((rows, 2, s.semantic), np.int64)  # length and complete segments
        self.history = np.full((rows, s.history if s.remembers else 0), -1, np.int64)  # the oldest first
        self.word = np.zeros((rows, 3), np.int64)
        self.rings = np.zeros((rows, s.layers, ring_offset(s, s.sliding)), np.float32)
        self.blocks = np.zeros((rows, s.layers, s.depth, 4, s.width + 1), np.float32)  # the newest last
        self.running = np.zeros((rows, s.layers, s.semantic, s.rank + 1), np.float32)
        # Means of the last segment and of the one before.
        self.complete = np.zeros((rows, 2, s.layers, s.semantic, s.rank), np.float32)
        # What each dual level adds since its last node, and all of them together.
        self.nodes = np.zeros((rows, s.layers, s.dual, s.width), np.float32)
        self.summed = np.zeros((rows, s.layers, s.width), np.float32)

    def __getstate__(self) -> dict[str, object]:
        """For copies and pickles, which have views of their own and belong to no engine yet."""
        return {**vars(self), "_views": {}, "owner": None}

    def arrays(self) -> dict[str, Array]:
        """All arrays by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}

    def own_tables(self) -> None:
        """Have tags and values that no other state has, before they are written to."""
        if not self._owns_tables:
            self.tags, self.values = self.tags.copy(), self.values.copy()
            self._owns_tables, self._views = True, {}

    def row(self, row: int) -> tuple[Array, ...]:
        """What the compiled step changes in one row; views."""
        if row not in self._views:
            own = slice(row, row + 1)
            texts = (self.marks, self.counts, self.history, self.word, self.pending, self.tags, bits_of(self.values))
            levels = (self.rings, self.blocks, self.running, self.complete, self.nodes, self.summed)
            self._views[row] = (self.counter[own], *(array[row] for array in (*texts, *levels)))
        return self._views[row]

    @property
    def position(self) -> int:
        """Tokens of the open document, of the first row."""
        return int(self.counter[0])

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been read, nor is remembered."""
        return not self.counter.any() and not (self.tags >= 0).any()

    def copy(self) -> "EngineState":
        """A state that goes on by itself. The tables of slots are copied when one of the two reads on."""
        self._owns_tables = False
        twin = object.__new__(EngineState)
        own = {name: value.copy() for name, value in self.arrays().items() if name not in ("tags", "values")}
        twin.__dict__.update({**vars(self), **own, "_views": {}})
        return twin

    __copy__ = copy  # else both would write to the same tables

    def select(self, rows: Sequence[int]) -> "EngineState":
        """A state of the given rows in that order; rows may repeat."""
        chosen = object.__new__(EngineState)
        chosen.shape, chosen.rows, chosen.columns_seen = self.shape, len(rows), self.columns_seen
        chosen.owner = self.owner
        chosen._views, chosen._owns_tables, index = {}, True, list(rows)
        for name, array in self.arrays().items():
            setattr(chosen, name, array[index])
        return chosen

    def first(self, rows: int) -> "EngineState":
        """The first rows, as a state that shares their memory, so that what one writes the other reads."""
        self.own_tables()
        part = object.__new__(EngineState)
        part.shape, part.rows, part.columns_seen, part.owner = self.shape, rows, 0, self.owner
        part._views, part._owns_tables = {}, True
        for name, array in self.arrays().items():
            setattr(part, name, array[:rows])
        return part

    def put(self, row: int, other: "EngineState", other_row: int = 0) -> None:
        """Let a row stand where a row of another state of the same engine stands."""
        self.own_tables()
        for name, array in self.arrays().items():
            array[row] = getattr(other, name)[other_row]

    def skip_slot_write(self, rows: Sequence[int] | None = None) -> None:
        """Let the next token leave the tables of slots as they are, of some rows or of all."""
        self.pending[slice(None) if rows is None else list(rows)] = -1

    def start_document(self) -> None:
        """Let the next token start a new document: of the open one only the tables of slots are kept."""
        empty = EngineState(self.shape, self.rows)
        for name, array in self.arrays().items():
            if name not in ("tags", "values", "pending"):
                array[:] = getattr(empty, name)
        self.columns_seen = 0

    def ring(self, layer: int, j: int) -> Array:
        """Ring j of a layer, (B, 2^j, levels >= j, R + 1); a view. The sums of token t stand at t modulo 2^j."""
        s, begin = self.shape, ring_offset(self.shape, j)
        part = self.rings[:, layer, begin : ring_offset(s, j + 1)]
        return part.reshape(self.rows, 2**j, s.sliding - j, s.rank + 1)

    def tensors(self) -> dict[str, Array]:
        """The state as `DyadCache.tensors` names it. Arrays are copies."""
        s = self.shape
        named: dict[str, Array] = {"position": self.counter}
        if s.rules:
            named |= {f"text.marks.{part}": self.marks[:, part] for part in (0, 1)}
        if s.semantic:
            named |= {f"text.counts.{part}": self.counts[:, part] for part in (0, 1)}
        if s.remembers:
            named |= {"text.contexts.0": self.history, "text.contexts.1": self.word[:, : 3 * s.needs_word]}
        for index in range(s.layers):
            at = f"layers.{index}."
            for j in range(s.sliding):
                ring = self.ring(index, j).reshape(self.rows, 2**j, -1)
                named[at + f"rings.{j}"] = ring[_turned(self.counter, 2**j)]
            for j in range(s.depth):
                named[at + f"blocks.{j}"] = self.blocks[:, index, j]
            if s.semantic:
                named[at + "segments.0"] = self.running[:, index].reshape(self.rows, -1)
                for part in (0, 1):
                    named[at + f"segments.{part + 1}"] = self.complete[:, part, index].reshape(self.rows, -1)
            if index in s.slot_layers:
                named[at + "slots.0"] = self.tags
                named[at + "slots.1"] = self.values[:, s.slot_layers.index(index)]
                named[at + "slots.2"] = self.pending
        copies = {id(array): array.copy() for array in named.values()}  # one of the tags, which blocks share
        return {name: copies[id(array)] for name, array in named.items()}

    @classmethod
    def from_named(cls, shape: Shape, tensors: Mapping[str, Array], columns_seen: int) -> "EngineState":
        """The state that `tensors` describe, but for `nodes` and `summed`, which follow from the weights.

        Raises:
            UserError: names, shapes or numbers are not those of a state of this model.
        """
        rows = max(1, len(tensors["position"])) if "position" in tensors and tensors["position"].ndim == 1 else 1
        state, s = cls(shape, rows), shape
        state.columns_seen = columns_seen
        if not tensors:
            return state
        template = state.tensors()
        require_fitting(tensors, template)
        tensors = {**template, **tensors}  # between two documents, slots alone are kept
        state.counter[:] = tensors["position"]
        if s.rules:
            state.marks[:] = np.stack([tensors["text.marks.0"], tensors["text.marks.1"]], 1)
        if s.semantic:
            state.counts[:] = np.stack([tensors["text.counts.0"], tensors["text.counts.1"]], 1)
        if s.remembers:
            state.history[:] = tensors["text.contexts.0"]
            if s.needs_word:
                state.word[:] = tensors["text.contexts.1"]
        for index in range(s.layers):
            at = f"layers.{index}."
            for j in range(s.sliding):
                own = state.ring(index, j)
                own[_turned(state.counter, 2**j)] = tensors[at + f"rings.{j}"].reshape(own.shape)
            for j in range(s.depth):
                state.blocks[:, index, j] = tensors[at + f"blocks.{j}"]
            if s.semantic:
                state.running[:, index] = tensors[at + "segments.0"].reshape(rows, s.semantic, -1)
                for part in (0, 1):
                    own = tensors[at + f"segments.{part + 1}"].reshape(rows, s.semantic, -1)
                    state.complete[:, part, index] = own
            if index in s.slot_layers:
                first = f"layers.{s.slot_layers[0]}."
                if any(np.any(tensors[at + part] != tensors[first + part]) for part in ("slots.0", "slots.2")):
                    raise UserError(
                        "The slots of the state differ from block to block; it is damaged, write a new one."
                    )
                state.tags[:] = tensors[at + "slots.0"]
                state.values[:, s.slot_layers.index(index)] = tensors[at + "slots.1"]
                state.pending[:] = tensors[at + "slots.2"]
        return state


def bits_of(values: Array) -> Array:
    """Values as the compiled step takes them, which knows no float16: the same bits as uint16. A view."""
    return values.view(np.uint16) if values.dtype == np.float16 else values


def _turned(counter: Array, size: int) -> tuple[Array, Array]:
    """The index (B, size) by which rings begin with their oldest sums."""
    return np.arange(len(counter))[:, None], (counter[:, None] + np.arange(size)) % size


def ring_offset(shape: Shape, j: int) -> int:
    """Where ring j begins among the rings of a layer."""
    return sum(2**i * (shape.sliding - i) * (shape.rank + 1) for i in range(j))
