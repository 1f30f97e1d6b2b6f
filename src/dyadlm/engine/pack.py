"""The weights of a model in the order in which a step reads them, once for each layer.

What is multiplied with the same vector stands in one matrix: bottlenecks, salience, gate and slot value; gate and up of
the SwiGLU.

Dimension letters: D width, L layers, V vocabulary, I inner width of the SwiGLU, R rank, G numbers that all tables of
n-grams say of a token.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dyadlm.engine.layout import Shape
from dyadlm.errors import RunFailed, UserError

Array = np.ndarray


FORMATS = ("float32", "bfloat16", "int8")


class Matrix(NamedTuple):
    """Stored numbers (..., rows, columns), and what each row is multiplied by (..., rows) float32."""

    numbers: Array  # float32; uint16, the upper half of the bits of float32; or int8
    scales: Array

    @property
    def nbytes(self) -> int:
        """Bytes that one product with everything reads."""
        return int(self.numbers.nbytes + self.scales.nbytes)

    def wide(self) -> Array:
        """The matrix in float32, (..., rows, columns)."""
        if self.numbers.dtype == np.float32:
            return self.numbers
        if self.numbers.dtype == np.uint16:
            return (self.numbers.astype(np.uint32) << 16).view(np.float32)
        return self.numbers.astype(np.float32) * self.scales[..., None]


def stored(matrix: Array, form: str) -> Matrix:
    """A float32 matrix in one of `FORMATS`, rounded to nearest; int8 by the largest number of each row."""
    ones = np.ones(matrix.shape[:-1], np.float32)
    if form == "bfloat16":
        bits = matrix.view(np.uint32)
        return Matrix(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), ones)
    if form == "int8":
        scales = np.abs(matrix).max(-1, initial=0.0) / 127
        scales = np.where(scales > 0, scales, 1).astype(np.float32)
        return Matrix(np.rint(matrix / scales[..., None]).astype(np.int8), scales)
    return Matrix(matrix, ones)


class Weights:
    """Float32 arrays and matrices in one of `FORMATS`, each with the layers first; copies of what they are made of.

    read: (L, rows, D); a layer without slots has zeros in the rows of the slot value. up: (L, D, token features).
    age: (L, D, ages). gates: (L, 2 I, D). down: (L, D, I). recall: (slot layers, D, N (M + 1)).
    node_read: (L, dual, R, D). node_up: (L, dual, D, 3 R). norms, identities: (L, 2, D).
    ngram_tables: (rows, numbers of a row), of all tables one after another. ngram_project: (D, G).
    """

    head: Any
    read: Any
    up: Any
    gates: Any
    down: Any
    recall: Any
    node_read: Any
    node_up: Any
    ngram_project: Any

    def __init__(self, shape: Shape, tensors: Mapping[str, Array], form: str = "float32"):
        s, self._sliding = shape, shape.sliding
        self._tensors: Mapping[str, Array] = tensors  # let go at the end, so that nothing is held twice
        self._wide: dict[str, Array] = {}
        sliding, dual = range(s.sliding), range(s.sliding, s.levels)
        token_levels = [*sliding, *range(s.levels, s.levels + s.semantic)]
        weighed = s.sliding + (s.dual > 0) + s.semantic
        aged = 2 * s.dual + s.semantic
        layer = [f"model.layers.{index}." for index in range(s.layers)]

        self.embedding = self._take("model.embed_tokens.weight", s.vocabulary, s.width).copy()
        name = "lm_head.weight"
        self.head = self.embedding if s.tied and name not in tensors else self._take(name, s.vocabulary, s.width).copy()
        self.norm = self._take("model.norm.weight", s.width).copy()
        self.ngram_tables, self.ngram_project = np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32)
        if s.ngrams:
            entries, said = len(s.ngrams) * s.ngram_entries, len(s.ngrams) * s.ngram_width
            self.ngram_tables = self._take("model.ngrams.tables.weight", entries, s.ngram_width).copy()
            self.ngram_project = self._take("model.ngrams.project.weight", s.width, said).copy()
        self.norms = np.stack(
            [np.stack([self._take(at + f"{part}_norm.weight", s.width) for part in ("tower", "mlp")]) for at in layer]
        )
        self.identities = np.stack(
            [np.stack([self._take(at + f"{part}_identity", s.width) for part in ("tower", "mlp")]) for at in layer]
        )
        read = []
        for index, at in enumerate(layer):
            rows = [self._take(at + f"tower.bottlenecks.{k}.weight", s.rank, s.width) for k in token_levels]
            rows.append(self._take(at + "tower.salience.weight", weighed, s.width))
            rows.append(self._take(at + "tower.gate.weight", s.width, s.width))
            if index in s.slot_layers:
                rows.append(self._take(at + "slots.value.weight", s.slot_width, s.width))
            elif s.slot_layers:
                rows.append(np.zeros((s.slot_width, s.width), np.float32))
            read.append(np.concatenate(rows))
        self.read = np.stack(read)
        self.bias = np.stack([self._take(at + "tower.salience.bias", weighed) for at in layer])
        features = 3 * s.rank * s.token_levels
        self.up = np.stack([self._take(at + "tower.up_tokens.weight", s.width, features) for at in layer])
        self.age = np.zeros((s.layers, s.width, 0), np.float32)
        if aged:
            self.age = self._stack([at + "tower.age.weight" for at in layer], s.width, aged)
        self.gates = np.stack(
            [
                np.concatenate([self._take(at + f"mlp.{part}.weight", s.inner, s.width) for part in ("gate", "up")])
                for at in layer
            ]
        )
        self.down = self._stack([at + "mlp.down.weight" for at in layer], s.width, s.inner)
        recalled = len(s.contexts) * (s.slot_width + 1)
        self.recall = self._stack([layer[q] + "slots.read.weight" for q in s.slot_layers], s.width, recalled)
        names = [[at + f"tower.bottlenecks.{k}.weight" for k in dual] for at in layer]
        self.node_read = np.stack([self._stack(row, s.rank, s.width) for row in names])
        names = [[at + f"tower.up_nodes.{k}.weight" for k in dual] for at in layer]
        self.node_up = np.stack([self._stack(row, s.width, 3 * s.rank) for row in names])
        for name in ("head", "read", "up", "gates", "down", "recall", "node_read", "node_up", "ngram_project"):
            setattr(self, name, stored(getattr(self, name), form))
        self.marks = np.zeros((s.vocabulary, 0), np.uint8)
        if s.rules:
            self.marks = self._found("model.boundaries.marks", (s.vocabulary, len(s.rules))).copy()
            if self.marks.dtype != np.uint8:
                raise UserError(f"The marks of tokens are {self.marks.dtype}, not uint8; the folder is damaged.")
            if not self.marks.any():
                raise UserError(
                    f"The rules of {', '.join(s.rules)} need the text of each token; call "
                    "model.use_tokenizer(tokenizer) once and save the model again."
                )
        del self._tensors

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a step reads, on average: dual level k is read every 2^(k - 1) tokens."""
        parts = (self.read, self.up, self.age, self.gates, self.down, self.recall, self.head, self.ngram_project)
        rows = 4 * self.ngram_project.numbers.shape[1]  # of the tables of n-grams, a row each
        dual = self.node_read.numbers.shape[1]
        nodes = sum(
            part.numbers[:, n].nbytes / 2 ** (self._sliding + n - 1)
            for part in (self.node_read, self.node_up)
            for n in range(dual)
        )
        return int(sum(part.nbytes for part in parts) + rows + nodes)

    def wide(self, name: str) -> Array:
        """A matrix in float32; kept, as the form for many rows needs it at every token."""
        if name not in self._wide:
            self._wide[name] = getattr(self, name).wide()
        return self._wide[name]

    def _found(self, name: str, shape: tuple[int, ...]) -> Array:
        if name not in self._tensors:
            raise UserError(f"The weights lack {name}; the folder is damaged or of another configuration.")
        tensor = self._tensors[name]
        if tensor.shape != shape:
            raise UserError(
                f"The weight {name} has the shape {tensor.shape}, not {shape}; the folder is damaged or of another "
                "configuration."
            )
        return tensor

    def _take(self, name: str, *shape: int) -> Array:
        tensor = self._found(name, shape)
        if tensor.dtype.kind != "f":
            raise UserError(f"The weight {name} is {tensor.dtype}, no floating-point numbers; the folder is damaged.")
        taken = np.ascontiguousarray(tensor, dtype=np.float32)
        if not np.isfinite(taken).all():
            raise RunFailed(f"The weight {name} holds values that are not numbers; it is damaged or diverged.")
        return taken

    def _stack(self, names: Sequence[str], *shape: int) -> Array:
        if not names:
            return np.zeros((0, *shape), np.float32)
        return np.stack([self._take(name, *shape) for name in names])
