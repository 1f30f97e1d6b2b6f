"""Decoding without torch: one token through the whole model, near the time that reading its weights takes.

An `Engine` has the weights of one model, an `EngineState` what one row carries. `unsupported` says which models the
engine cannot run; torch runs those.

Nothing here imports torch or transformers.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dyadlm.engine.layout import Shape, log2_longest, shape_of, unsupported
from dyadlm.engine.pack import FORMATS, Weights
from dyadlm.engine.state import EngineState
from dyadlm.errors import UserError

__all__ = ["Engine", "EngineState", "unsupported"]


class Engine:
    """The weights of one model, packed, and the step that reads a token.

    fields: of the configuration. vocab_size: V. weight_bytes: bytes of weights that a token reads.
    """

    def __init__(self, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, weights: str = "float32"):
        """tensors: by the names of the model's parameters; copied. weights: how matrices are stored, one of
        float32 | bfloat16 | int8; products are in float32 all the same.

        Raises:
            UserError: the engine does not support the model, or weights are missing or of another shape.
        """
        if weights not in FORMATS:
            raise UserError(f"There is no format {weights!r} of weights; choose one of {', '.join(FORMATS)}.")
        reason = unsupported(fields)
        if reason is not None:
            raise UserError(f"The engine cannot run this model, since {reason}; use the model in torch.")
        from dyadlm.engine import numba_step  # takes a while to load

        self.fields, self.shape = fields, shape_of(fields)
        self.weights = Weights(self.shape, tensors, weights)
        self.vocab_size, self.weight_bytes = self.shape.vocabulary, self.weights.bytes_per_token
        self._module = numba_step
        self._constants = self._arguments()
        self._scratch = np.zeros(scratch_size(self.shape), np.float32)
        self._integers = np.zeros(104, np.int64)

    @classmethod
    def from_folder(cls, folder: str | Path, *, weights: str = "float32") -> "Engine":
        """The engine of a saved model: config.json and safetensors. weights: as above.

        Raises:
            UserError: no such model, or one that the engine does not support.
        """
        from safetensors.numpy import load_file

        folder = Path(folder)
        try:
            fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            index = folder / "model.safetensors.index.json"
            names = ["model.safetensors"]
            if index.is_file():
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if any(Path(name).name != name for name in names):
                raise UserError(f"{index} names files outside the folder; the folder is damaged.")
            tensors: dict[str, np.ndarray] = {}
            for name in names:
                tensors |= load_file(folder / name)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder} is no model folder ({error}); give one that `dyadlm train` wrote.") from error
        if not isinstance(fields, dict) or fields.get("model_type") != "dyadlm":
            raise UserError(f"{folder} holds no dyadlm model; give a folder that `dyadlm train` wrote.")
        return cls(fields, tensors, weights=weights)

    def start(self) -> EngineState:
        """An empty state."""
        return EngineState(self.shape)

    def step(self, state: EngineState, token: int) -> np.ndarray:
        """Read one token, 0 <= token < V; the state moves on. Returns logits (V,) float32.

        Raises:
            IndexError: a token outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise IndexError(f"The vocabulary has {self.vocab_size} tokens; this is token {token}.")
        s = state
        if s.counter[0] == 0 and not self.shape.keeps_slots:  # a document begins with empty tables
            s.tags[:], s.values[:] = -1, 0
        logits = np.empty(self.vocab_size, np.float32)
        self._module.step(
            token,
            *self._constants,
            s.counter,
            s.marks,
            s.counts,
            s.history,
            s.word,
            s.pending,
            s.tags,
            s.values,
            s.rings,
            s.blocks,
            s.running,
            s.complete,
            s.nodes,
            s.summed,
            self._scratch,
            self._integers,
            logits,
        )
        s.columns_seen += 1
        return logits

    def step_rows(self, states: Sequence[EngineState], tokens: Sequence[int]) -> np.ndarray:
        """Read one token in each of B rows. Returns logits (B, V) float32."""
        return np.stack([self.step(state, token) for state, token in zip(states, tokens, strict=True)])

    def state_from(self, tensors: Mapping[str, np.ndarray], columns_seen: int) -> EngineState:
        """The state that `DyadCache.tensors` describe, one row.

        Raises:
            UserError: names or shapes are not those of this model's state.
        """
        state, weights, shape = EngineState.from_named(self.shape, tensors, columns_seen), self.weights, self.shape
        mean, feature = np.zeros(shape.width, np.float32), np.zeros(3 * shape.rank, np.float32)
        both = np.zeros((2, shape.rank), np.float32)
        for layer in range(shape.layers):
            for n in range(shape.dual):
                level = shape.sliding + n
                self._module.node_feature(
                    state.blocks[layer, level - 1],
                    level,
                    *(part[layer, n] for part in (*weights.node_read, *weights.node_up)),
                    mean,
                    feature,
                    both,
                    state.nodes[layer, n],
                )
        state.summed[:] = state.nodes.sum(1)
        return state

    def _arguments(self) -> tuple[Any, ...]:
        """What a step is given besides token and state."""
        s, w = self.shape, self.weights
        word = s.rules.index("word") if "word" in s.rules else -1
        sizes = (s.sliding, s.semantic, s.rank, s.slot_width, word, s.longest, s.fits, max(s.vocabulary, 2))
        slots = np.array([s.slot_layers.index(i) if i in s.slot_layers else -1 for i in range(s.layers)], np.int64)
        contexts = np.array(s.contexts, np.int64)
        first = (w.embedding, *w.head, w.norm, w.norms, w.identities, *w.read, w.bias, *w.up, w.age)
        rest = (*w.gates, *w.down, *w.recall, *w.node_read, *w.node_up, w.marks)
        return (sizes, np.float32(s.eps), np.float32(log2_longest(s)), contexts, slots, *first, *rest)


def scratch_size(shape: Shape) -> int:
    """Numbers that a step needs to work with."""
    s = shape
    rows = s.token_levels * s.rank + s.sliding + 1 + s.semantic + s.width + s.slot_width
    levels = s.token_levels * (4 * s.rank + 1) + 2 * s.sliding * (s.rank + 1) + 5 * s.rank
    tables = len(s.contexts) * (s.slot_width + 1)
    return 4 * s.width + max(rows, 2 * s.inner) + levels + max(s.inner, s.width + 1) + tables + 128 + s.width + 1
