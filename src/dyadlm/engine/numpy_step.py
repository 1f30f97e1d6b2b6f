"""One token for each of some rows through the whole model in numpy: one matrix product for all rows.

It is the readable form of the step, the form for many rows, and the one that runs where numba is missing. With other
loops between the products the rows are the tokens of one text (`dyadlm.engine.compiled_tokens`).

Dimension letters: B rows, D width, L layers, K levels that change at every token, R rank, S semantic levels, N tables
of slots, W ways, P parts of a tag, M numbers that a slot keeps, V vocabulary, G numbers that all tables of n-grams say.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dyadlm.engine.layout import (
    ENDS,
    HEAD,
    LARGEST_HALF,
    MIX_0,
    MIX_1,
    PHI,
    SEED_0,
    SEED_1,
    STARTS,
    STICKS,
    TAIL,
    Shape,
    log2_longest,
)
from dyadlm.engine.pack import Weights
from dyadlm.engine.state import EngineState

Array = np.ndarray


class Text(NamedTuple):
    """What is read off the tokens, once for all layers: where segments begin, where slots are written and read, what
    the tables of n-grams say."""

    position: Array  # (B,)
    counts: Array  # (B, 2, S): the length of the open segment of each level, and complete ones
    begins: Array  # (B, S) bool
    written: Array  # (B, N): what each table writes, set * W + the way whose entry goes; -1: none
    found: Array  # (B, N, 2): the set and the way that are read; -1: none
    ngrams: Array  # (B, G) float32


class Loops:
    """What is done row by row between the matrix products, here for all rows at once.

    `dyadlm.engine.compiled_rows` has the same in compiled loops.
    """

    def read_text(self, s: Shape, w: Weights, tokens: Array, state: EngineState) -> Text:
        """The rules of segments, the addresses of slots and the n-grams, for tokens (B,)."""
        begins, word_begins = read_text(s, w.marks[tokens], state)
        if s.remembers:
            read_word(tokens, word_begins, state)
        recent = [tokens, *state.history.T[::-1]]  # the newest first
        slots, ngrams = find_slots(s, recent, state), read_ngrams(s, w.ngram_tables, recent, state)
        text = Text(state.counter, state.counts, begins, *slots, ngrams)
        state.history[:] = np.concatenate([state.history, tokens[:, None]], 1)[:, 1:]
        return text

    def read_levels(self, s: Shape, layer: int, z: Array, importance: Array, text: Text, state: EngineState) -> Array:
        """The features (B, 3 K R) of the levels that change at every token. z: (B, K R and more)."""
        return read_levels(s, layer, z, importance, text.begins, state)

    def read_nodes(
        self, s: Shape, w: Weights, layer: int, x: Array, weight: Array, text: Text, state: EngineState
    ) -> Array:
        """What the dual levels add, (B, D), after tokens x (B, D) that count by their weights (B, 1)."""
        return read_nodes(s, w, layer, x, weight, state)

    def normed(self, hidden: Array, identity: Array, norm: Array, share: Array, eps: float) -> Array:
        """What a part of a block reads (B, D): the normalised hidden state, and a share (D,) of the identity."""
        return np.asarray(hidden * scale_of(hidden, eps) * norm + share * identity)

    def recall(self, s: Shape, table: int, value: Array, text: Text, state: EngineState) -> Array:
        """Write values (B, M) into the tables of a layer with slots; returns what is found, (B, N (M + 1))."""
        return recall(state.values[:, table], value, text)


def step(shape: Shape, weights: Weights, state: EngineState, tokens: Array, loops: Loops | None = None) -> Array:
    """Read tokens (B,); the state moves on. Returns logits (B, V) float32."""
    s, w, loops = shape, weights, loops or Loops()
    text = loops.read_text(s, w, tokens, state)
    ages = age_features(s, text.position, text.counts)

    hidden = w.embedding[tokens]
    if s.ngrams:
        hidden += text.ngrams @ w.wide("ngram_project").T
    identity = hidden * scale_of(hidden, s.eps)
    end_levels = s.token_levels * s.rank
    end_weights = end_levels + w.bias.shape[1]
    end_gate = end_weights + s.width
    for layer in range(s.layers):
        x = loops.normed(hidden, identity, w.norms[layer, 0], w.identities[layer, 0], s.eps)
        z = x @ w.wide("read")[layer].T
        importance = np.exp(3 * np.tanh((z[:, end_levels:end_weights] + w.bias[layer]) / 3))
        mix = loops.read_levels(s, layer, z, importance, text, state) @ w.wide("up")[layer].T
        if s.dual:
            mix += loops.read_nodes(s, w, layer, x, importance[:, s.sliding, None], text, state)
        hidden += mix * silu(z[:, end_weights:end_gate] + ages @ w.age[layer].T)
        if layer in s.slot_layers:
            q = s.slot_layers.index(layer)
            hidden += loops.recall(s, q, z[:, end_gate:], text, state) @ w.wide("recall")[q].T
        x = loops.normed(hidden, identity, w.norms[layer, 1], w.identities[layer, 1], s.eps)
        z = x @ w.wide("gates")[layer].T
        hidden += (silu(z[:, : s.inner]) * z[:, s.inner :]) @ w.wide("down")[layer].T
    state.counter += len(tokens) // state.rows
    return np.asarray((hidden * scale_of(hidden, s.eps) * w.norm) @ w.wide("head").T)


def scale_of(x: Array, eps: float) -> Array:
    """One over the root mean square of each row of x (B, D), (B, 1)."""
    return np.asarray(1 / np.sqrt(np.einsum("bd,bd->b", x, x)[:, None] / np.float32(x.shape[1]) + np.float32(eps)))


def silu(x: Array) -> Array:
    """x times its sigmoid."""
    with np.errstate(over="ignore"):  # exp of a large number is infinite, and the quotient zero
        below = np.exp(-x)
    below += 1
    return np.asarray(np.divide(x, below, out=below))


def age_features(s: Shape, t: Array, counts: Array) -> Array:
    """Where each dual level stands between two nodes, and how long each segment is. Returns (B, ages) float32."""
    periods = 1 << (s.sliding + np.arange(s.dual) - 1)
    angles = (t[:, None] + 1) % periods * (2 * np.pi / periods)
    lengths = np.log2(np.maximum(counts[:, 0], 1)) / log2_longest(s)
    return np.concatenate([np.sin(angles), np.cos(angles), lengths], 1).astype(np.float32)


def read_text(s: Shape, mark: Array, state: EngineState) -> tuple[Array, Array]:
    """The rules of segments, for the marks (B, rules) of the tokens.

    Returns whether each semantic level begins a segment, bool (B, S), and whether a word begins, bool (B,).
    """
    goes_on = (state.counter > 0)[:, None]
    tail_before, ended_before = state.marks[:, 0].copy(), state.marks[:, 1].copy()
    sticks, tail = (mark & STICKS != 0) & goes_on, mark & TAIL != 0
    ended = (mark & ENDS != 0) | ((mark & HEAD != 0) & tail_before & goes_on)
    begin = (mark & STARTS != 0) | (ended_before & (mark & STICKS == 0)) | ~goes_on
    state.marks[:, 0] = np.where(tail | ~sticks, tail, tail_before)
    state.marks[:, 1] = np.where(ended | ~sticks, ended, ended_before)
    length = np.where(begin[:, : s.semantic], 0, state.counts[:, 0]) % s.longest
    begins = length == 0
    state.counts[:, 0] = length + 1
    state.counts[:, 1] = np.where(goes_on, np.minimum(2, state.counts[:, 1] + begins), 0)
    word = begin[:, s.rules.index("word")] if "word" in s.rules else np.zeros(len(mark), bool)
    return begins, word


def read_word(tokens: Array, word_begins: Array, state: EngineState) -> None:
    """Both sums over the open word, and its tokens so far."""
    word = state.word.view(np.uint64)
    word[word_begins] = 0
    letter = (tokens.astype(np.uint64) << np.uint64(32)) + word[:, 2]
    word[:, 0] += mixed(letter ^ SEED_0)
    word[:, 1] += mixed(letter ^ SEED_1)
    word[:, 2] += np.uint64(1)


def read_ngrams(s: Shape, tables: Array, recent: Sequence[Array], state: EngineState) -> Array:
    """What the tables say of the n-grams that end here: (B, G). recent: tokens (B,), the newest first."""
    said = np.zeros((state.rows, len(s.ngrams), s.ngram_width), np.float32)
    for n, size in enumerate(s.ngrams):
        hashed = state.word[:, 0].view(np.uint64)
        if size:
            letters = [
                (token.astype(np.uint64) << np.uint64(32)) + np.uint64(j) for j, token in enumerate(recent[:size])
            ]
            hashed = np.sum([mixed(letter ^ SEED_0) for letter in letters], 0, np.uint64)
        row = (hashed >> np.uint64(1)) % np.uint64(s.ngram_entries)
        known = state.counter >= size - 1
        said[known, n] = tables[row[known].astype(np.int64) + n * s.ngram_entries]
    return said.reshape(state.rows, -1)


def find_slots(s: Shape, recent: Sequence[Array], state: EngineState) -> tuple[Array, Array]:
    """Write the pending tags, make those of the contexts that end here, look them up: `Text.written`, `Text.found`.

    recent: tokens (B,), the newest first.
    """
    tokens, word, goes_on = recent[0], state.word.view(np.uint64), state.counter > 0
    rows, shape = np.arange(len(tokens)), (len(tokens), len(s.contexts))
    written, found = np.full(shape, -1), np.full((*shape, 2), -1)
    for n, length in enumerate(s.contexts):
        tags, pending = state.tags[:, n], state.pending[:, n]
        some = rows[goes_on & (pending[:, 0] >= 0)]
        place = set_of(pending[some], s.sets)
        last = np.full(len(some), s.ways - 1)
        if s.lru:
            same = (tags[some, place] == pending[some, None]).all(-1)
            last = np.where(same.any(1), same.argmax(1), last)
        written[some, n] = place * s.ways + last
        put_first(tags, (some,), written[some, n], pending[some])
        if length == 0:
            pending[:] = 0
            pending[:, :2] = (word[:, :2] >> np.uint64(1)).astype(np.int64)
        else:
            for part in range(s.tag_parts):
                number = np.zeros(len(tokens), np.int64)
                for digit in recent[part * s.fits : min(length, (part + 1) * s.fits)][::-1]:
                    number = number * max(s.vocabulary, 2) + digit
                pending[:, part] = number
            pending[state.counter < length - 1] = -1
        some = rows[goes_on & (pending[:, 0] >= 0)]
        place = set_of(pending[some], s.sets)
        same = (tags[some, place] == pending[some, None]).all(-1)
        found[some, n, 0] = np.where(same.any(1), place, -1)
        found[some, n, 1] = same.argmax(1)
    return written, found


def put_first(tables: Array, where: tuple[Array, ...], written: Array, entries: Array) -> None:
    """Put entries (n, X) in front of sets of tables (..., sets, W, X), which `where` picks by n indices for each axis
    before the sets. written (n,): as in `Text`; the entries before the one that goes move back by one."""
    place, last = np.divmod(written, tables.shape[-2])
    way = np.arange(tables.shape[-2])
    source = np.where((way > 0) & (way <= last[:, None]), way - 1, way)
    at: tuple[Array, ...] = (*where, place)
    moved = np.take_along_axis(tables[at], source[..., None], 1)
    moved[:, 0] = entries
    tables[at] = moved


def mixed(x: Array) -> Array:
    """The finaliser of SplitMix64, as `dyadlm.ops.contexts.mix`, of uint64."""
    x = (x ^ (x >> np.uint64(30))) * MIX_0
    x = (x ^ (x >> np.uint64(27))) * MIX_1
    return np.asarray(x ^ (x >> np.uint64(31)))


def set_of(tags: Array, sets: int) -> Array:
    """The set of each tag (..., P) int64."""
    parts = tags.astype(np.uint64)
    code = mixed(parts[..., 0] + PHI)
    for part in range(1, tags.shape[-1]):
        code = mixed((code ^ parts[..., part]) + PHI)
    return (code & np.uint64(sets - 1)).astype(np.int64)


def read_levels(s: Shape, layer: int, z: Array, importance: Array, begins: Array, state: EngineState) -> Array:
    """The features (B, 3 K R) of the sliding and semantic levels. z: (B, K R and more). importance: (B, weights)."""
    values = z[:, : s.token_levels * s.rank].reshape(len(z), s.token_levels, s.rank)
    rows, t = np.arange(len(values)), state.counter
    sums = np.empty((len(values), s.token_levels, s.rank + 1), np.float32)
    sums[:, : s.sliding, -1] = importance[:, : s.sliding]
    sums[:, s.sliding :, -1] = importance[:, importance.shape[1] - s.semantic :]
    np.multiply(values, sums[:, :, -1:], out=sums[:, :, :-1])
    sums[:, : s.sliding, -1] -= 1
    now, before = np.empty((2, len(values), s.token_levels, s.rank), np.float32)
    for j in range(s.sliding):
        ring = state.ring(layer, j)
        old = ring[rows, t % 2**j]
        ring[rows, t % 2**j] = sums[:, j : s.sliding]
        now[:, j] = sums[:, j, :-1] / (sums[:, j, -1:] + 2**j)
        before[:, j] = old[:, 0, :-1] / (old[:, 0, -1:] + 2**j)
        sums[:, j + 1 : s.sliding] += old[:, 1:]
    if s.semantic:
        running, last, earlier = state.running[:, layer], state.complete[:, 0, layer], state.complete[:, 1, layer]
        begin, closed = begins[:, :, None], state.counts[:, 1, :, None]
        mean = running[:, :, :-1] / np.maximum(running[:, :, -1:], 1e-6)
        earlier[:] = np.where(begin, np.where(closed >= 2, last, 0), earlier)
        last[:] = np.where(begin, np.where(closed >= 1, mean, 0), last)
        running[:] = np.where(begin, 0, running) + sums[:, s.sliding :]
        now[:, s.sliding :] = running[:, :, :-1] / np.maximum(running[:, :, -1:], 1e-6)
        before[:, s.sliding :] = last
    return np.stack([now * before, now, before], 2).reshape(len(values), -1)


def read_nodes(s: Shape, w: Weights, layer: int, x: Array, weight: Array, state: EngineState) -> Array:
    """What the dual levels add, (B, D), after a token x (B, D) that counts by its weight (B, 1)."""
    rows, block = np.arange(len(x)), np.concatenate([x * weight, weight - 1], 1)
    for j in range(s.depth):
        ready = (state.counter[rows] + 1) % 2**j == 0
        rows, block = rows[ready], block[ready]
        if not len(rows):
            break
        tree = state.blocks[:, layer, j]
        tree[rows] = np.concatenate([tree[rows, 1:], block[:, None]], 1)
        level, n = j + 1, j + 1 - s.sliding
        if n >= 0:
            read, up = w.wide("node_read")[layer, n], w.wide("node_up")[layer, n]
            state.nodes[rows, layer, n] = node_feature(tree[rows], level, read) @ up.T
        block = tree[rows, 2] + tree[rows, 3]
    state.summed[:, layer] = state.nodes[:, layer].sum(1)
    return state.summed[:, layer]


def node_feature(blocks: Array, level: int, read: Array) -> Array:
    """The features (B, 3 R) of the newest node of a level. blocks: (B, 4, D + 1). read: (R, D)."""
    pairs = np.stack([blocks[:, 2] + blocks[:, 3], blocks[:, 0] + blocks[:, 1]]) / np.float32(2**level)
    now, before = (pairs[..., :-1] @ read.T) / (1 + pairs[..., -1:])
    return np.concatenate([now * before, now, before], 1)


def recall(tables: Array, value: Array, text: Text) -> Array:
    """Write values (B, M) into the tables (B, N, sets, W, M) of a layer; returns what is found, (B, N (M + 1))."""
    rows, columns = np.nonzero(text.written >= 0)
    if tables.dtype == np.float16:
        value = np.clip(value, -LARGEST_HALF, LARGEST_HALF)
    put_first(tables, (rows, columns), text.written[rows, columns], value[rows])
    entries = np.zeros((*text.written.shape, value.shape[1] + 1), np.float32)
    rows, columns = np.nonzero(text.found[..., 0] >= 0)
    place, way = text.found[rows, columns].T
    entries[rows, columns, :-1] = tables[rows, columns, place, way]
    entries[rows, columns, -1] = 1
    return entries.reshape(len(entries), -1)
