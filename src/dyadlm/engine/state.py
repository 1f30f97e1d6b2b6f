"""The state of one row: the arrays of `DyadCache` in the order in which a step uses them.

Dimension letters: L layers, D width, R rank, S semantic levels, Q layers with slots, N tables, W ways, P parts of a
tag, M numbers that a slot keeps. Ring j holds 2^j sums.
"""

from collections.abc import Mapping

import numpy as np

from dyadlm.engine.layout import Shape
from dyadlm.errors import UserError

Array = np.ndarray


class EngineState:
    """What a model carries from token to token. `Engine.step` changes it in place.

    columns_seen: tokens read so far. position: tokens of the open document.
    """

    def __init__(self, shape: Shape):
        s, self.shape = shape, shape
        self.columns_seen = 0
        tables = len(s.contexts)
        self.tags = np.full((tables, s.sets, s.ways, s.tag_parts), -1, np.int64)
        self.values = np.zeros((len(s.slot_layers), tables, s.sets, s.ways, s.slot_width), np.float32)
        self.pending = np.full((tables, s.tag_parts), -1, np.int64)
        self._begin()

    def _begin(self) -> None:
        s = self.shape
        self.counter = np.zeros(1, np.int64)  # tokens of the open document
        self.marks = np.zeros(
            (2, len(s.rules)), np.bool_
        )  # whether a TAIL stands last, and whether a segment has ended
        self.counts = np.zeros((2, s.semantic), np.int64)  # length and complete segments
        self.history = np.full(s.history if s.contexts else 0, -1, np.int64)  # the oldest first
        self.word = np.zeros(3, np.int64)
        self.rings = np.zeros((s.layers, ring_offset(s, s.sliding)), np.float32)
        self.blocks = np.zeros((s.layers, s.depth, 4, s.width + 1), np.float32)  # the newest last
        self.running = np.zeros((s.layers, s.semantic, s.rank + 1), np.float32)
        self.complete = np.zeros((2, s.layers, s.semantic, s.rank), np.float32)  # the last segment, the one before
        self.nodes = np.zeros((s.layers, s.dual, s.width), np.float32)  # what each dual level adds since its last node
        self.summed = np.zeros((s.layers, s.width), np.float32)  # all of them together

    @property
    def position(self) -> int:
        """Tokens of the open document."""
        return int(self.counter[0])

    def copy(self) -> "EngineState":
        """A state that goes on by itself."""
        twin = object.__new__(EngineState)
        twin.__dict__.update(
            {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in self.__dict__.items()}
        )
        return twin

    def start_document(self) -> None:
        """Let the next token start a new document: of the open one only the tables of slots are kept."""
        self._begin()
        self.columns_seen = 0

    def tensors(self) -> dict[str, Array]:
        """The state as `DyadCache.tensors` names it, with one row. Arrays are copies."""
        s, t = self.shape, self.position
        named: dict[str, Array] = {"position": self.counter.copy()}
        if s.rules:
            named |= {"text.marks.0": self.marks[0].copy()[None], "text.marks.1": self.marks[1].copy()[None]}
        if s.semantic:
            named |= {"text.counts.0": self.counts[0].copy()[None], "text.counts.1": self.counts[1].copy()[None]}
        if s.contexts:
            word = self.word if 0 in s.contexts else self.word[:0]
            named |= {"text.contexts.0": self.history.copy()[None], "text.contexts.1": word.copy()[None]}
        for index in range(s.layers):
            at = f"layers.{index}."
            for j in range(s.sliding):
                ring = self._ring(index, j)
                named[at + f"rings.{j}"] = np.roll(ring, -(t % 2**j), 0)[None]
            for j in range(s.depth):
                named[at + f"blocks.{j}"] = self.blocks[index, j].copy()[None]
            if s.semantic:
                named[at + "segments.0"] = self.running[index].reshape(1, -1).copy()
                for part in (0, 1):
                    named[at + f"segments.{part + 1}"] = self.complete[part, index].reshape(1, -1).copy()
            if index in s.slot_layers:
                named[at + "slots.0"] = self.tags.copy()[None]
                named[at + "slots.1"] = self.values[s.slot_layers.index(index)].copy()[None]
                named[at + "slots.2"] = self.pending.copy()[None]
        return named

    def _ring(self, layer: int, j: int) -> Array:
        begin, end = ring_offset(self.shape, j), ring_offset(self.shape, j + 1)
        return self.rings[layer, begin:end].reshape(2**j, -1)

    @classmethod
    def from_named(cls, shape: Shape, tensors: Mapping[str, Array], columns_seen: int) -> "EngineState":
        """The state that `tensors` describe, but for `nodes`, which follow from the weights.

        Raises:
            UserError: names or shapes are not those of this model's state.
        """
        state, s = cls(shape), shape
        state.columns_seen = columns_seen
        if not tensors:
            return state
        template = state.tensors()
        if set(tensors) == {"position"} | {name for name in template if ".slots." in name}:
            tensors = {**template, **tensors}  # between two documents, slots alone are kept
        if template.keys() != tensors.keys():
            other = min(template.keys() ^ tensors.keys())
            raise UserError(f"The state does not fit this model ({other}); use it with the model that wrote it.")
        for name, array in template.items():
            if tensors[name].shape != array.shape:
                raise UserError(f"The state does not fit this model ({name}); use it with the model that wrote it.")
        state.counter[:] = tensors["position"]
        t = state.position
        if s.rules:
            state.marks[:] = np.concatenate([tensors["text.marks.0"], tensors["text.marks.1"]])
        if s.semantic:
            state.counts[:] = np.concatenate([tensors["text.counts.0"], tensors["text.counts.1"]])
        if s.contexts:
            state.history[:] = tensors["text.contexts.0"][0]
            if 0 in s.contexts:
                state.word[:] = tensors["text.contexts.1"][0]
        for index in range(s.layers):
            at = f"layers.{index}."
            for j in range(s.sliding):
                state._ring(index, j)[:] = np.roll(tensors[at + f"rings.{j}"][0], t % 2**j, 0)
            for j in range(s.depth):
                state.blocks[index, j] = tensors[at + f"blocks.{j}"][0]
            if s.semantic:
                state.running[index] = tensors[at + "segments.0"].reshape(s.semantic, -1)
                for part in (0, 1):
                    state.complete[part, index] = tensors[at + f"segments.{part + 1}"].reshape(s.semantic, -1)
            if index in s.slot_layers:
                state.tags[:] = tensors[at + "slots.0"][0]
                state.values[s.slot_layers.index(index)] = tensors[at + "slots.1"][0]
                state.pending[:] = tensors[at + "slots.2"][0]
        return state


def ring_offset(shape: Shape, j: int) -> int:
    """Where ring j begins among the rings of a layer."""
    return sum(2**i * (shape.sliding - i) * (shape.rank + 1) for i in range(j))
