"""The loops over rows of `dyadlm.engine.numpy_step`, compiled.

Dimension letters: B rows, K levels that change at every token, R rank, M numbers that a slot keeps, N tables of slots.
"""

import numpy as np

from dyadlm.engine import numba_step
from dyadlm.engine.layout import Shape
from dyadlm.engine.numpy_step import Loops, Text
from dyadlm.engine.pack import Weights
from dyadlm.engine.state import EngineState, bits_of

Array = np.ndarray


class CompiledLoops(Loops):
    """See `Loops`."""

    def read_text(self, s: Shape, w: Weights, tokens: Array, state: EngineState) -> Text:
        rows, tables = len(tokens), len(s.contexts)
        begins = np.zeros((rows, max(s.semantic, 1)), np.bool_)
        written, found = np.full((rows, tables), -1, np.int64), np.full((rows, tables, 2), -1, np.int64)
        said = np.zeros((rows, len(s.ngrams) * s.ngram_width), np.float32)
        numba_step.text_of_rows(
            tokens,
            w.marks,
            s.rules.index("word") if "word" in s.rules else -1,
            s.longest,
            np.array(s.contexts, np.int64),
            s.fits,
            max(s.vocabulary, 2),
            int(s.lru),
            np.array(s.ngrams, np.int64),
            s.ngram_entries,
            w.ngram_tables,
            state.counter,
            state.marks,
            state.counts,
            state.history,
            state.word,
            state.pending,
            state.tags,
            begins,
            written,
            found,
            said,
        )
        return Text(state.counter, state.counts, begins, written, found, said)

    def read_levels(self, s: Shape, layer: int, z: Array, importance: Array, text: Text, state: EngineState) -> Array:
        features = np.empty((len(z), 3 * s.token_levels * s.rank), np.float32)
        numba_step.levels_of_rows(
            z,
            importance,
            s.dual,
            state.counter,
            text.begins,
            state.counts,
            state.rings,
            state.running,
            state.complete,
            layer,
            s.sliding,
            s.semantic,
            features,
        )
        return features

    def normed(self, hidden: Array, identity: Array, norm: Array, share: Array, eps: float) -> Array:
        read = np.empty_like(hidden)
        numba_step.normed_rows(hidden, identity, norm, share, np.float32(eps), read)
        return read

    def recall(self, s: Shape, table: int, value: Array, text: Text, state: EngineState) -> Array:
        recalled = np.empty((len(value), len(s.contexts) * (s.slot_width + 1)), np.float32)
        tables = bits_of(state.values)
        numba_step.recall_of_rows(tables, table, np.ascontiguousarray(value), text.written, text.found, recalled)
        return recalled
