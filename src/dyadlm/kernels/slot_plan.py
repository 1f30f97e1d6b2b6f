"""The plan of slots that are rings, in two kernels and a sort: which value is read at each token.

A ring gives back the newest entry with a tag if fewer than W entries were put in front of it. So a stable sort brings
the items of each set together, by time, and every item looks back for its tag, past at most W writes: all items at
once, none waits for another. The form in torch is `dyadlm.ops.slots.slot_lookup`; it alone has the other evictions.

Dimension letters: B batch, T time, I = T + 1 items, N tables, A sets, W ways, P parts of a tag.
"""

import logging
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyadlm.ops.clock import Clock
from dyadlm.ops.contexts import Contexts
from dyadlm.ops.slots import PHI, Rules, SlotLookup, SlotState, ring_survivors

ROWS = 128  # items of a program, a thread each

log = logging.getLogger("dyadlm.kernels")
log.info("Slots are planned by Triton kernels.")  # once: when the first plan is about to be made


@triton.jit
def _mix(x):
    """As `dyadlm.ops.contexts.mix`."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _tag(words, pending, row, table, item, part, there, time, tables, parts: tl.constexpr):
    """One part of the tags of items, -1 where not known."""
    place = ((row * time + item - 1) * tables + table) * parts + part
    tag = tl.load(words + place, mask=there & (item >= 1), other=-1)
    if pending is not None:
        tag = tl.where(item == 0, tl.load(pending + (row * tables + table) * parts + part), tag)
    return tag


@triton.jit
def _items_kernel(
    words, pending, index, length, writes, keys, kinds, left, time, tables, tiles, sets,
    phi: tl.constexpr, parts: tl.constexpr, documents: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """Of each item its set, A for one that is neither read nor written, and its kind: 4 d + 2 for one that is written
    + 1 for one that is read, where d tells the documents apart in which entries are found: 0 before the chunk."""
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    row, table = pair // tables, pair % tables
    item = (tl.program_id(0) % tiles) * rows + tl.arange(0, rows)
    there = item <= time
    real = tl.load(length + row)
    known, code = there, tl.zeros((rows,), tl.int64)
    for part in tl.static_range(parts):
        tag = _tag(words, pending, row, table, item, part, there, time, tables, parts)
        tl.store(left + pair * parts + part + (item - real), tag, mask=item == real)
        known = known & (tag >= 0)
        code = _mix((code ^ tag) + phi)
    ended = there & (item >= 1)
    before = tl.load(index + row * time + item - 1, mask=ended, other=0)
    read = known & (before >= 1)
    written = known & (item < real) & (tl.load(index + row * time + item, mask=item < time, other=0) >= 1)
    if writes is not None:
        written = written & tl.load(writes + (row * time + item) * tables + table, mask=item < time, other=False)
    kind = written.to(tl.int32) * 2 + read.to(tl.int32)
    if documents:
        kind += tl.where(ended, tl.maximum(item - before, 0), 0).to(tl.int32) * 4
    tl.store(
        keys + pair * (time + 1) + item, tl.where(read | written, code & (sets - 1), sets).to(tl.int32), mask=there
    )
    tl.store(kinds + pair * (time + 1) + item, kind, mask=there)


@triton.jit
def _plan_kernel(
    words, pending, table_tags, keys, order, kinds, found, column, slot, following, time, tables, tiles, sets,
    ways: tl.constexpr, parts: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """By place: items stand by set and by time within a set."""
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    row, table = pair // tables, pair % tables
    place = (tl.program_id(0) % tiles) * rows + tl.arange(0, rows)
    there = place <= time
    keys += pair * (time + 1)
    order += pair * (time + 1)
    kinds += pair * (time + 1)
    item = tl.load(order + place, mask=there, other=0)
    key = tl.load(keys + place, mask=there, other=0)
    kind = tl.load(kinds + item, mask=there, other=0)
    newest = tl.full((rows,), -1, tl.int64)  # the entry that is read
    latest = tl.full((rows,), -1, tl.int64)  # the item before with this tag, written or not
    passed = tl.zeros((rows,), tl.int32)  # writes in front of what is looked at
    looking = there & (key < sets)
    step = 1
    while tl.max(looking.to(tl.int32), 0) > 0:
        back = place - step
        looking = looking & (back >= 0)
        looking = looking & (tl.load(keys + back, mask=looking, other=0) == key)
        other = tl.load(order + back, mask=looking, other=0)
        their = tl.load(kinds + other, mask=looking, other=0)
        looking = looking & ((their >> 2) == (kind >> 2))
        same = looking
        for part in tl.static_range(parts):
            own = _tag(words, pending, row, table, item, part, same, time, tables, parts)
            same = same & (_tag(words, pending, row, table, other, part, same, time, tables, parts) == own)
        entry = looking & ((their & 2) != 0)
        latest = tl.where(same & (latest < 0), other, latest)
        newest = tl.where(same & entry, other, newest)
        passed += entry.to(tl.int32)
        looking = looking & (newest < 0) & (passed < ways)
        step += 1
    tl.store(following + pair * (time + 1) + latest, item.to(tl.int32), mask=latest >= 0)
    at = (row * time + item - 1) * tables + table
    ended = there & (item >= 1)
    read = ended & ((kind & 1) != 0)
    hit = newest >= 0
    if table_tags is not None:
        # Entries of the state stand behind those of the chunk, the newest first.
        held = tl.full((rows,), -1, tl.int64)
        cell = (pair * sets + key) * ways
        for way in range(ways):
            same = read & (newest < 0) & (held < 0) & (kind < 4) & (passed + way < ways)
            for part in tl.static_range(parts):
                own = _tag(words, pending, row, table, item, part, same, time, tables, parts)
                same = same & (tl.load(table_tags + (cell + way) * parts + part, mask=same, other=-1) == own)
            held = tl.where(same, key.to(tl.int64) * ways + way, held)
        hit = hit | (held >= 0)
        tl.store(slot + at, held, mask=ended)
    tl.store(found + at, hit & read, mask=ended)
    tl.store(column + at, newest, mask=ended)


@torch.library.custom_op("dyadlm::ring_plan", mutates_args=())
def ring_plan(
    words: Tensor,
    index: Tensor,
    length: Tensor,
    writes: Tensor | None,
    pending: Tensor | None,
    tags: Tensor | None,
    sets: int,
    ways: int,
    documents: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `ring_lookup` is made of.

    Args:
        words: (B, T, N, P) int64, of `Contexts`.
        index, length: (B, T) and (B,) int64, of `Clock`.
        writes: (B, T, N) bool; None: all.
        pending, tags: (B, N, P) and (B, N, A, W, P) int64, of `SlotState`; None at the start.
        documents: whether entries of earlier documents are not found.

    Returns:
        found (B, T, N) bool, column and slot (B, T, N) int64 (slot without elements at the start), following
        (B, N, T + 1) int32, all of `SlotLookup`, and pending of the new state.
    """
    batch, time, tables, parts = words.shape
    words, index = words.contiguous(), index.contiguous()
    writes, pending, tags = (part if part is None else part.contiguous() for part in (writes, pending, tags))
    keys = words.new_empty(batch, tables, time + 1, dtype=torch.int32)
    kinds, left = torch.empty_like(keys), words.new_empty(batch, tables, parts)
    found, column = words.new_empty(batch, time, tables, dtype=torch.bool), words.new_empty(batch, time, tables)
    slot = column.new_empty(0) if tags is None else torch.empty_like(column)
    following = torch.full_like(keys, -1)
    tiles = triton.cdiv(time + 1, ROWS)
    grid = (batch * tables * tiles,)
    with torch.cuda.device_of(words):
        _items_kernel[grid](
            words, pending, index, length, writes, keys, kinds, left, time, tables, tiles, sets, PHI, parts, documents,
            ROWS,
        )  # fmt: skip
        keys, order = keys.sort(dim=-1, stable=True)
        _plan_kernel[grid](
            words, pending, tags, keys, order, kinds, found, column, slot, following, time, tables, tiles, sets, ways,
            parts, ROWS,
        )  # fmt: skip
    return found, column, slot, following, left


@ring_plan.register_fake
def _shapes(words, index, length, writes, pending, tags, sets, ways, documents):
    batch, time, tables, parts = words.shape
    column = words.new_empty(batch, time, tables)
    return (
        column.new_empty(column.shape, dtype=torch.bool),
        column,
        column.new_empty(0) if tags is None else torch.empty_like(column),
        words.new_empty(batch, tables, time + 1, dtype=torch.int32),
        words.new_empty(batch, tables, parts),
    )


def ring_lookup(
    contexts: Contexts,
    clock: Clock,
    *,
    sets: int,
    ways: int,
    scope: str,
    writes: Tensor | None,
    state: SlotState | None,
) -> SlotLookup:
    """What `slot_lookup` gives of a ring, for chunks of more than one token. Arguments as there."""
    pending, tags = (None, None) if state is None else (state.pending, state.tags)
    found, column, slot, following, left = ring_plan(
        contexts.words, clock.index, clock.length, writes, pending, tags, sets, ways, scope == "document"
    )
    survive = partial(ring_survivors, contexts, clock, writes, state, Rules(sets, ways, "ring", scope))
    return SlotLookup(found, column, None if state is None else slot, left, survive, following)
