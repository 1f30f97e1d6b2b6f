"""One token through the whole model, compiled by numba.

Rows of matrices are taken as slices before the inner loops: only then is the loop over them vectorised.

Letters of the arguments: D width, I inner width of the SwiGLU, R rank, J sliding levels, S semantic levels, N tables,
W ways, P parts of a tag, M numbers that a slot keeps, G numbers that all tables of n-grams say. Marks are those of
`dyadlm.model.boundaries`.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from dyadlm.engine.layout import ENDS, HEAD, LARGEST_HALF, MIX_0, MIX_1, PHI, SEED_0, SEED_1, STARTS, STICKS, TAIL

# Sums may be taken in any order, for vectors; infinities stay what they are: silu of -100 passes one on its way to 0.
FAST = {"reassoc", "contract", "nsz"}
OPTIONS: Any = {"cache": True, "fastmath": FAST, "boundscheck": False, "error_model": "numpy", "nogil": True}


@intrinsic
def _as_float32(context, bits):
    """The float32 of the same 32 bits."""
    signature = types.float32(types.uint32)
    return signature, lambda _, builder, __, arguments: builder.bitcast(arguments[0], ir.FloatType())


def widened(number):
    """A stored number as float32: bfloat16 is stored as the upper half of its bits, int8 without its scale."""
    return np.float32(number)


@overload(widened, inline="always")
def _widened(number):
    if number == types.uint16:
        return lambda number: _as_float32(np.uint32(number) << np.uint32(16))
    return lambda number: np.float32(number)


@intrinsic
def _half_of(context, number):
    """The bits of the float16 that is nearest to a float32."""
    signature = types.uint16(types.float32)
    half, bits = ir.HalfType(), ir.IntType(16)
    return signature, lambda _, builder, __, arguments: builder.bitcast(builder.fptrunc(arguments[0], half), bits)


@intrinsic
def _of_half(context, bits):
    """The float32 of the bits of a float16."""
    signature = types.float32(types.uint16)
    half, wide = ir.HalfType(), ir.FloatType()
    return signature, lambda _, builder, __, arguments: builder.fpext(builder.bitcast(arguments[0], half), wide)


def put_value(entry, i, number):
    """Write a number of a slot: as it is, or as the bits of a float16."""
    entry[i] = number


@overload(put_value, inline="always")
def _put_value(entry, i, number):
    if entry.dtype == types.uint16:
        largest = np.float32(LARGEST_HALF)

        def put_half(entry, i, number):
            entry[i] = _half_of(min(max(number, -largest), largest))

        return put_half

    def put(entry, i, number):
        entry[i] = number

    return put


def value_at(entry, i):
    """A number of a slot as float32."""
    return np.float32(entry[i])


@overload(value_at, inline="always")
def _value_at(entry, i):
    if entry.dtype == types.uint16:
        return lambda entry, i: _of_half(entry[i])
    return lambda entry, i: np.float32(entry[i])


@njit(**OPTIONS)
def product(matrix, scales, x, y):
    """y = scales * (matrix @ x) for a matrix (rows, columns) of stored numbers, four rows at a time."""
    rows, columns = matrix.shape
    x = x[:columns]
    i = 0
    while i + 4 <= rows:
        a, b, c, d = matrix[i], matrix[i + 1], matrix[i + 2], matrix[i + 3]
        sum_a, sum_b, sum_c, sum_d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for j in range(columns):
            value = x[j]
            sum_a += widened(a[j]) * value
            sum_b += widened(b[j]) * value
            sum_c += widened(c[j]) * value
            sum_d += widened(d[j]) * value
        y[i], y[i + 1] = sum_a * scales[i], sum_b * scales[i + 1]
        y[i + 2], y[i + 3] = sum_c * scales[i + 2], sum_d * scales[i + 3]
        i += 4
    while i < rows:
        a = matrix[i]
        total = np.float32(0)
        for j in range(columns):
            total += widened(a[j]) * x[j]
        y[i] = total * scales[i]
        i += 1


@njit(**OPTIONS)
def scale_of(x, eps):
    """One over the root mean square of x."""
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return np.float32(1) / np.sqrt(total / np.float32(x.shape[0]) + eps)


@njit(**OPTIONS)
def silu(x):
    return x / (np.float32(1) + np.exp(-x))


@njit(**OPTIONS)
def mixed(x):
    """The finaliser of SplitMix64, as `dyadlm.ops.contexts.mix`."""
    x = (x ^ (x >> np.uint64(30))) * MIX_0
    x = (x ^ (x >> np.uint64(27))) * MIX_1
    return x ^ (x >> np.uint64(31))


@njit(**OPTIONS)
def read_text(token, row, word_rule, longest, t, marks, counts, begins):
    """Rules: which segments the token begins. Returns whether it begins a word."""
    word_begins = False
    goes_on = t > 0
    for i in range(row.shape[0]):
        mark = row[i]
        sticks = (mark & STICKS) != 0 and goes_on
        tail = (mark & TAIL) != 0
        ended = (mark & ENDS) != 0 or ((mark & HEAD) != 0 and marks[0, i] and goes_on)
        begin = (mark & STARTS) != 0 or (marks[1, i] and (mark & STICKS) == 0) or not goes_on
        if tail or not sticks:
            marks[0, i] = tail
        if ended or not sticks:
            marks[1, i] = ended
        if i == word_rule:
            word_begins = begin
        if i < counts.shape[1]:
            age = 0 if begin else counts[0, i]
            begins[i] = age % longest == 0
            counts[0, i] = age % longest + 1
            counts[1, i] = min(2, counts[1, i] + begins[i]) if goes_on else 0
    return word_begins


@njit(**OPTIONS)
def set_of(tag, sets):
    code = mixed(np.uint64(tag[0]) + PHI)
    for part in range(1, tag.shape[0]):
        code = mixed((code ^ np.uint64(tag[part])) + PHI)
    return np.int64(code & np.uint64(sets - 1))


@njit(**OPTIONS)
def read_word(token, word_begins, word):
    """Both sums over the open word, and its tokens so far."""
    if word_begins:
        word[:] = 0
    letter = (np.uint64(token) << np.uint64(32)) + np.uint64(word[2])
    word[0] = np.int64(np.uint64(word[0]) + mixed(letter ^ SEED_0))
    word[1] = np.int64(np.uint64(word[1]) + mixed(letter ^ SEED_1))
    word[2] += 1


@njit(**OPTIONS)
def read_ngrams(token, sizes, entries, t, history, word, tables, said):
    """What the tables say of the n-grams that end here, one after another; zeros where the document is too short."""
    width, carried = tables.shape[1], history.shape[0]
    for n in range(sizes.shape[0]):
        size, out = sizes[n], said[n * width : (n + 1) * width]
        if t < size - 1:
            for i in range(width):
                out[i] = np.float32(0)
            continue
        hashed = np.uint64(0)
        if size == 0:
            hashed = np.uint64(word[0])
        for place in range(size):
            letter = np.uint64(token) if place == 0 else np.uint64(history[carried - place])
            hashed += mixed(((letter << np.uint64(32)) + np.uint64(place)) ^ SEED_0)
        row = tables[n * entries + np.int64((hashed >> np.uint64(1)) % np.uint64(entries))]
        for i in range(width):
            out[i] = row[i]


@njit(**OPTIONS)
def remember(token, history):
    """Put a token behind those of the history, the oldest of which goes."""
    carried = history.shape[0]
    for i in range(carried - 1):
        history[i] = history[i + 1]
    if carried:
        history[carried - 1] = token


@njit(**OPTIONS)
def way_of(entries, tag):
    """The newest way of a set (W, P) that holds a tag (P,); W: none."""
    for way in range(entries.shape[0]):
        same = True
        for part in range(entries.shape[1]):
            same = same and entries[way, part] == tag[part]
        if same:
            return way
    return entries.shape[0]


@njit(**OPTIONS)
def address(token, contexts, fits, radix, lru, t, history, word, pending, tags, written, found):
    """Contexts: what each table writes and reads. written (N,): set * W + the way whose entry goes, and those before it
    move back by one; -1: none. found (N, 2): set and way; -1: none."""
    carried = history.shape[0]
    sets, ways, parts = tags.shape[1], tags.shape[2], tags.shape[3]
    for n in range(contexts.shape[0]):
        written[n] = -1
        found[n, 0] = -1
        if t > 0 and pending[n, 0] >= 0:
            place = set_of(pending[n], sets)
            last = ways - 1
            if lru:
                last = min(last, way_of(tags[n, place], pending[n]))
            for way in range(last, 0, -1):
                for part in range(parts):
                    tags[n, place, way, part] = tags[n, place, way - 1, part]
            for part in range(parts):
                tags[n, place, 0, part] = pending[n, part]
            written[n] = place * ways + last
        length = contexts[n]
        if length == 0:
            pending[n, 0] = np.int64(np.uint64(word[0]) >> np.uint64(1))
            pending[n, 1] = np.int64(np.uint64(word[1]) >> np.uint64(1))
            for part in range(2, parts):
                pending[n, part] = 0
        elif t < length - 1:
            for part in range(parts):
                pending[n, part] = -1
        else:
            for part in range(parts):
                number = np.int64(0)
                for back in range(min(length, (part + 1) * fits) - 1, part * fits - 1, -1):
                    digit = token if back == 0 else history[carried - back]
                    number = number * radix + digit
                pending[n, part] = number
        if t > 0 and pending[n, 0] >= 0:
            place = set_of(pending[n], sets)
            way = way_of(tags[n, place], pending[n])
            if way < ways:
                found[n, 0] = place
                found[n, 1] = way


@njit(**OPTIONS)
def node_feature(blocks, level, read, read_scales, up, up_scales, mean, feature, both, out):
    """What a dual level adds at a node that has just become complete. blocks: (4, D + 1), the newest last."""
    width, rank = blocks.shape[1] - 1, read.shape[0]
    share = np.float32(1) / np.float32(1 << level)
    for window in range(2):
        older, newer = blocks[2 - 2 * window], blocks[3 - 2 * window]
        for i in range(width):
            mean[i] = (older[i] + newer[i]) * share
        product(read, read_scales, mean, both[window])
        excess = np.float32(1) + (older[width] + newer[width]) * share
        for i in range(rank):
            feature[(1 + window) * rank + i] = both[window, i] / excess
    for i in range(rank):
        feature[i] = feature[rank + i] * feature[2 * rank + i]
    product(up, up_scales, feature, out)


@njit(**OPTIONS)
def read_nodes(
    x, weight, t, sliding, blocks, read, read_scales, up, up_scales, nodes, summed, block, mean, feature, both
):
    """What the dual levels of one row in one layer add (`summed`), after a token x (D,) that counts by its weight."""
    width, depth, dual = x.shape[0], blocks.shape[0], nodes.shape[0]
    for i in range(width):
        block[i] = x[i] * weight
    block[width] = weight - np.float32(1)
    changed = False
    for j in range(depth):
        if (t + 1) % (1 << j):
            break
        own_blocks = blocks[j]
        for b in range(3):
            for i in range(width + 1):
                own_blocks[b, i] = own_blocks[b + 1, i]
        for i in range(width + 1):
            own_blocks[3, i] = block[i]
        level = j + 1
        if level >= sliding:
            n = level - sliding
            node_feature(
                own_blocks, level, read[n], read_scales[n], up[n], up_scales[n], mean, feature, both, nodes[n]
            )  # fmt: skip
            changed = True
        for i in range(width + 1):
            block[i] = own_blocks[2, i] + own_blocks[3, i]
    if changed:
        for i in range(width):
            summed[i] = np.float32(0)
        for n in range(dual):
            own = nodes[n]
            for i in range(width):
                summed[i] += own[i]


@njit(**OPTIONS)
def read_levels(
    z, weights, dual, t, begins, counts, rings, running, complete, sliding, semantic, rank, sums, now, before, features
):
    """The features of the sliding and semantic levels of one row in one layer, from what the bottlenecks say (z)."""
    channels = rank + 1
    token_levels = sliding + semantic
    for k in range(token_levels):
        weight = weights[k] if k < sliding else weights[k + (dual > 0)]
        for i in range(rank):
            sums[k * channels + i] = z[k * rank + i] * weight
        sums[k * channels + rank] = weight - np.float32(1) if k < sliding else weight

    at_ring = 0
    for j in range(sliding):
        wide = (sliding - j) * channels
        begin = at_ring + (t & ((1 << j) - 1)) * wide
        slot, own = rings[begin : begin + wide], sums[j * channels : sliding * channels]
        for i in range(channels):
            now[j * channels + i] = own[i]
            before[j * channels + i] = slot[i]
            slot[i] = own[i]
        for i in range(channels, wide):
            value = own[i]
            own[i] = value + slot[i]
            slot[i] = value
        at_ring += (1 << j) * wide
    for j in range(sliding):
        share = np.float32(1) / (now[j * channels + rank] + np.float32(1 << j))
        share_before = np.float32(1) / (before[j * channels + rank] + np.float32(1 << j))
        at_feature = 3 * j * rank
        for i in range(rank):
            current, previous = now[j * channels + i] * share, before[j * channels + i] * share_before
            features[at_feature + i] = current * previous
            features[at_feature + rank + i] = current
            features[at_feature + 2 * rank + i] = previous
    for s in range(semantic):
        total, last, earlier = running[s], complete[0, s], complete[1, s]
        own = sums[(sliding + s) * channels : (sliding + s + 1) * channels]
        if begins[s]:
            share = np.float32(1) / max(total[rank], np.float32(1e-6))
            for i in range(rank):
                earlier[i] = last[i] if counts[1, s] >= 2 else np.float32(0)
                last[i] = total[i] * share if counts[1, s] >= 1 else np.float32(0)
            for i in range(channels):
                total[i] = own[i]
        else:
            for i in range(channels):
                total[i] += own[i]
        share = np.float32(1) / max(total[rank], np.float32(1e-6))
        at_feature = 3 * (sliding + s) * rank
        for i in range(rank):
            current = total[i] * share
            features[at_feature + i] = current * last[i]
            features[at_feature + rank + i] = current
            features[at_feature + 2 * rank + i] = last[i]


@njit(**OPTIONS)
def recall_slots(values, value, written, found, recalled):
    """Write a value into the tables of one row in one layer and read what is found; whether anything is."""
    tables, ways, slot_width = values.shape[0], values.shape[2], values.shape[3]
    any_found = False
    for n in range(tables):
        if written[n] >= 0:
            own_set = values[n, written[n] // ways]
            for way in range(written[n] % ways, 0, -1):
                for i in range(slot_width):
                    own_set[way, i] = own_set[way - 1, i]
            for i in range(slot_width):
                put_value(own_set[0], i, value[i])
        out = recalled[n * (slot_width + 1) : (n + 1) * (slot_width + 1)]
        if found[n, 0] >= 0:
            any_found = True
            entry = values[n, found[n, 0], found[n, 1]]
            for i in range(slot_width):
                out[i] = value_at(entry, i)
            out[slot_width] = np.float32(1)
        else:
            for i in range(slot_width + 1):
                out[i] = np.float32(0)
    return any_found


@njit(**OPTIONS)
def step(
    token,
    sizes,
    eps,
    log_longest,
    contexts,
    ngrams,
    slot_layer,
    embedding,
    ngram_tables,
    ngram_project,
    ngram_project_scales,
    head,
    head_scales,
    norm,
    norms,
    identities,
    read,
    read_scales,
    bias,
    up,
    up_scales,
    age,
    gates,
    gate_scales,
    down,
    down_scales,
    recall,
    recall_scales,
    node_read,
    node_read_scales,
    node_up,
    node_up_scales,
    vocabulary_marks,
    counter,
    marks,
    counts,
    history,
    word,
    pending,
    tags,
    values,
    rings,
    blocks,
    running,
    complete,
    nodes,
    summed,
    scratch,
    integers,
    logits,
):
    """Reads one token. Arrays of state are changed in place; logits (V,) are written."""
    sliding, semantic, rank, slot_width, word_rule, longest, fits, radix, lru, ngram_entries = sizes
    width, layers, inner = embedding.shape[1], read.shape[0], down.shape[2]
    tables, dual = contexts.shape[0], nodes.shape[1]
    token_levels, channels = sliding + semantic, rank + 1
    t = counter[0]
    begins, written = integers[:8], integers[8:40]
    found = integers[40:104].reshape(32, 2)

    word_begins = read_text(token, vocabulary_marks[token], word_rule, longest, t, marks, counts, begins)
    if tables or ngrams.shape[0]:
        read_word(token, word_begins, word)
    if tables:
        address(token, contexts, fits, radix, lru, t, history, word, pending, tags, written, found)

    at = 0
    hidden = scratch[at : at + width]
    at += width
    identity = scratch[at : at + width]
    at += width
    x = scratch[at : at + width]
    at += width
    mix = scratch[at : at + width]
    at += width
    z = scratch[at : at + max(read.shape[1], 2 * inner)]
    at += max(read.shape[1], 2 * inner)
    sums = scratch[at : at + token_levels * channels]
    at += token_levels * channels
    now = scratch[at : at + sliding * channels]
    at += sliding * channels
    before = scratch[at : at + sliding * channels]
    at += sliding * channels
    features = scratch[at : at + 3 * token_levels * rank]
    at += 3 * token_levels * rank
    gated = scratch[at : at + max(inner, width + 1)]
    at += max(inner, width + 1)
    recalled = scratch[at : at + tables * (slot_width + 1)]
    at += tables * (slot_width + 1)
    weights = scratch[at : at + 64]
    at += 64
    ages = scratch[at : at + 64]
    at += 64
    both = scratch[at : at + 2 * rank].reshape(2, rank)
    at += 2 * rank
    feature = scratch[at : at + 3 * rank]
    at += 3 * rank
    block = scratch[at : at + width + 1]
    at += width + 1
    said = scratch[at : at + ngrams.shape[0] * ngram_tables.shape[1]]

    for n in range(dual):
        period = np.int64(1) << (sliding + n - 1)
        angle = np.float32((t + 1) % period) * np.float32(2 * np.pi / period)
        ages[n], ages[dual + n] = np.sin(angle), np.cos(angle)
    for s in range(semantic):
        ages[2 * dual + s] = np.log2(np.float32(counts[0, s])) / log_longest
    aged = 2 * dual + semantic

    row = embedding[token]
    for i in range(width):
        hidden[i] = row[i]
    if ngrams.shape[0]:
        read_ngrams(token, ngrams, ngram_entries, t, history, word, ngram_tables, said)
        product(ngram_project, ngram_project_scales, said, mix)
        for i in range(width):
            hidden[i] += mix[i]
    remember(token, history)
    scale = scale_of(hidden, eps)
    for i in range(width):
        identity[i] = hidden[i] * scale
    end_read = token_levels * rank
    end_weights = end_read + bias.shape[1]
    end_gate = end_weights + width
    for layer in range(layers):
        slots = slot_layer[layer]
        scale = scale_of(hidden, eps)
        norm_row, identity_row = norms[layer, 0], identities[layer, 0]
        for i in range(width):
            x[i] = hidden[i] * scale * norm_row[i] + identity_row[i] * identity[i]
        rows = read.shape[1] if slots >= 0 else end_gate
        product(read[layer, :rows], read_scales[layer], x, z)
        for i in range(bias.shape[1]):
            weights[i] = np.exp(np.float32(3) * np.tanh((z[end_read + i] + bias[layer, i]) / np.float32(3)))
        read_levels(
            z,
            weights,
            dual,
            t,
            begins,
            counts,
            rings[layer],
            running[layer],
            complete[:, layer],
            sliding,
            semantic,
            rank,
            sums,
            now,
            before,
            features,
        )
        product(up[layer], up_scales[layer], features, mix)
        if dual:
            own = summed[layer]
            read_nodes(
                x, weights[sliding], t, sliding, blocks[layer], node_read[layer], node_read_scales[layer],
                node_up[layer], node_up_scales[layer], nodes[layer], own, block, gated, feature, both,
            )  # fmt: skip
            for i in range(width):
                mix[i] += own[i]
        for i in range(width):
            gate = z[end_weights + i]
            age_row = age[layer, i]
            for a in range(aged):
                gate += age_row[a] * ages[a]
            hidden[i] += mix[i] * silu(gate)
        if slots >= 0:
            value = z[end_gate : end_gate + slot_width]
            any_found = recall_slots(values[slots], value, written, found, recalled)
            if any_found:
                product(recall[slots], recall_scales[slots], recalled, mix)
                for i in range(width):
                    hidden[i] += mix[i]
        scale = scale_of(hidden, eps)
        norm_row, identity_row = norms[layer, 1], identities[layer, 1]
        for i in range(width):
            x[i] = hidden[i] * scale * norm_row[i] + identity_row[i] * identity[i]
        product(gates[layer], gate_scales[layer], x, z)
        for i in range(inner):
            gated[i] = silu(z[i]) * z[inner + i]
        product(down[layer], down_scales[layer], gated, mix)
        for i in range(width):
            hidden[i] += mix[i]
    scale = scale_of(hidden, eps)
    for i in range(width):
        x[i] = hidden[i] * scale * norm[i]
    product(head, head_scales, x, logits)
    counter[0] = t + 1


# ---- Loops over many rows, between the matrix products of `dyadlm.engine.numpy_step`


@njit(**OPTIONS)
def text_of_rows(
    tokens, vocabulary_marks, word_rule, longest, contexts, fits, radix, lru, ngrams, entries, ngram_tables, counter,
    marks, counts, history, word, pending, tags, begins, written, found, said,
):  # fmt: skip
    """`read_text`, `address` and `read_ngrams` for each row. begins: (B, S), written: (B, N), found: (B, N, 2),
    said: (B, G)."""
    for b in range(tokens.shape[0]):
        token, t = tokens[b], counter[b]
        word_begins = read_text(token, vocabulary_marks[token], word_rule, longest, t, marks[b], counts[b], begins[b])
        if contexts.shape[0] or ngrams.shape[0]:
            read_word(token, word_begins, word[b])
        if contexts.shape[0]:
            address(
                token, contexts, fits, radix, lru, t, history[b], word[b], pending[b], tags[b], written[b], found[b]
            )  # fmt: skip
        if ngrams.shape[0]:
            read_ngrams(token, ngrams, entries, t, history[b], word[b], ngram_tables, said[b])
        remember(token, history[b])


@njit(**OPTIONS)
def levels_of_rows(
    z, weights, dual, counter, begins, counts, rings, running, complete, layer, sliding, semantic, features
):
    """`read_levels` for each row. z: (B, at least K R). weights: (B, weights). features: (B, 3 K R)."""
    rank = running.shape[3] - 1 if semantic else features.shape[1] // (3 * sliding)
    sums = np.empty((sliding + semantic) * (rank + 1), np.float32)
    now, before = np.empty_like(sums), np.empty_like(sums)
    for b in range(z.shape[0]):
        read_levels(
            z[b], weights[b], dual, counter[b], begins[b], counts[b], rings[b, layer], running[b, layer],
            complete[b, :, layer], sliding, semantic, rank, sums, now, before, features[b],
        )  # fmt: skip


@njit(**OPTIONS)
def recall_of_rows(values, layer, value, written, found, recalled):
    """`recall_slots` for each row. values: (B, layers with slots, N, sets, W, M). recalled: (B, N (M + 1))."""
    for b in range(value.shape[0]):
        recall_slots(values[b, layer], value[b], written[b], found[b], recalled[b])


@njit(**OPTIONS)
def normed_rows(hidden, identity, norm, share, eps, read):
    """The normalised hidden state beside its share of the identity, for each row (D,)."""
    for b in range(hidden.shape[0]):
        row, own, out = hidden[b], identity[b], read[b]
        scale = scale_of(row, eps)
        for i in range(row.shape[0]):
            out[i] = row[i] * scale * norm[i] + share[i] * own[i]


# ---- Loops over the tokens of one row, between the same products. The arrays of state are those of the row.


@njit(**OPTIONS)
def text_of_tokens(
    tokens, vocabulary_marks, word_rule, longest, contexts, fits, radix, lru, ngrams, entries, ngram_tables, first,
    marks, counts, history, word, pending, tags, begins, written, found, said, counted,
):  # fmt: skip
    """As `text_of_rows`, for T tokens of which the first is at position `first`. counted: (T, 2, S), the counts after
    each token."""
    for at in range(tokens.shape[0]):
        token, t = tokens[at], first + at
        word_begins = read_text(token, vocabulary_marks[token], word_rule, longest, t, marks, counts, begins[at])
        if contexts.shape[0] or ngrams.shape[0]:
            read_word(token, word_begins, word)
        if contexts.shape[0]:
            address(token, contexts, fits, radix, lru, t, history, word, pending, tags, written[at], found[at])
        if ngrams.shape[0]:
            read_ngrams(token, ngrams, entries, t, history, word, ngram_tables, said[at])
        remember(token, history)
        counted[at] = counts


@njit(**OPTIONS)
def levels_of_tokens(
    z, weights, dual, first, begins, counted, rings, running, complete, rank, sliding, semantic, features
):
    """`read_levels` for each token. rings, running, complete: of one layer."""
    sums = np.empty((sliding + semantic) * (rank + 1), np.float32)
    now, before = np.empty_like(sums), np.empty_like(sums)
    for at in range(z.shape[0]):
        read_levels(
            z[at], weights[at], dual, first + at, begins[at], counted[at], rings, running, complete, sliding, semantic,
            rank, sums, now, before, features[at],
        )  # fmt: skip


@njit(**OPTIONS)
def nodes_of_tokens(x, weights, first, sliding, blocks, read, read_scales, up, up_scales, nodes, summed, out):
    """`read_nodes` for each token. out: (T, D), what the dual levels add."""
    width, rank = x.shape[1], read.shape[1]
    block, mean = np.empty(width + 1, np.float32), np.empty(width, np.float32)
    feature, both = np.empty(3 * rank, np.float32), np.empty((2, rank), np.float32)
    for at in range(x.shape[0]):
        read_nodes(
            x[at], weights[at], first + at, sliding, blocks, read, read_scales, up, up_scales, nodes, summed, block,
            mean, feature, both,
        )  # fmt: skip
        out[at] = summed


@njit(**OPTIONS)
def recall_of_tokens(values, value, written, found, recalled):
    """`recall_slots` for each token. values: (N, sets, W, M) of one layer. recalled: (T, N (M + 1))."""
    for at in range(value.shape[0]):
        recall_slots(values, value[at], written[at], found[at], recalled[at])
