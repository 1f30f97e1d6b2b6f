"""Many tokens of one row through the whole model: `dyadlm.engine.numpy_step` with tokens for rows.

What a layer says of a token follows from what the layer has read up to there, and from nothing of the layers above. So
all tokens go through one layer after the other, each layer with one matrix product for all tokens; compiled loops
between the products move the state from token to token.

Dimension letters: T tokens, K levels that change at every token, R rank, M numbers that a slot keeps, N tables of
slots.
"""

import numpy as np

from dyadlm.engine import numba_step
from dyadlm.engine.compiled_rows import CompiledLoops
from dyadlm.engine.layout import Shape
from dyadlm.engine.numpy_step import Text
from dyadlm.engine.pack import Weights
from dyadlm.engine.state import EngineState, bits_of

Array = np.ndarray


class TokenLoops(CompiledLoops):
    """See `Loops`, with the T tokens of one row in place of B rows."""

    def read_text(self, s: Shape, w: Weights, tokens: Array, state: EngineState) -> Text:
        count, tables, first = len(tokens), len(s.contexts), int(state.counter[0])
        counted = np.empty((count, 2, s.semantic), np.int64)
        begins = np.zeros((count, max(s.semantic, 1)), np.bool_)
        written, found = np.full((count, tables), -1, np.int64), np.full((count, tables, 2), -1, np.int64)
        said = np.zeros((count, len(s.ngrams) * s.ngram_width), np.float32)
        numba_step.text_of_tokens(
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
            first,
            state.marks[0],
            state.counts[0],
            state.history[0],
            state.word[0],
            state.pending[0],
            state.tags[0],
            begins,
            written,
            found,
            said,
            counted,
        )
        return Text(first + np.arange(count), counted, begins, written, found, said)

    def read_levels(self, s: Shape, layer: int, z: Array, importance: Array, text: Text, state: EngineState) -> Array:
        features = np.empty((len(z), 3 * s.token_levels * s.rank), np.float32)
        numba_step.levels_of_tokens(
            z,
            importance,
            s.dual,
            int(text.position[0]),
            text.begins,
            text.counts,
            state.rings[0, layer],
            state.running[0, layer],
            state.complete[0, :, layer],
            s.rank,
            s.sliding,
            s.semantic,
            features,
        )
        return features

    def read_nodes(
        self, s: Shape, w: Weights, layer: int, x: Array, weight: Array, text: Text, state: EngineState
    ) -> Array:
        added = np.empty_like(x)
        numba_step.nodes_of_tokens(
            x,
            weight[:, 0],
            int(text.position[0]),
            s.sliding,
            state.blocks[0, layer],
            w.node_read.numbers[layer],
            w.node_read.scales[layer],
            w.node_up.numbers[layer],
            w.node_up.scales[layer],
            state.nodes[0, layer],
            state.summed[0, layer],
            added,
        )
        return added

    def recall(self, s: Shape, table: int, value: Array, text: Text, state: EngineState) -> Array:
        recalled = np.empty((len(value), len(s.contexts) * (s.slot_width + 1)), np.float32)
        numba_step.recall_of_tokens(bits_of(state.values)[0, table], value, text.written, text.found, recalled)
        return recalled
