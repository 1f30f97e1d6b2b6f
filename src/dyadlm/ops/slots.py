"""Identity slots: small exact memories of what followed a context, set-associative, N tables side by side.

At token t (not the first of its document) the context that ended at t - 1 is written with the value of position t; then
the context that ends at t is read: the newest entry with exactly its tag (docs/architecture.md, Slots). The tag picks
one of A sets; a set is a list of its last entries, newest first, cut at W. `evict`: a write is put in front even if its
tag is in the list (ring), or removes it first (lru). The tag decides, so a collision is a miss, never a wrong value.

`slot_lookup` plans which value is read where, from the contexts alone; `slot_read` and `slot_store` move values by such
a plan, as many layers as share it. Nothing is simulated: an entry is read if fewer than W entries were put in front of
it in the meantime, which is a difference of ranks in a stable sort by set. For lru each tag counts once.

A chunk has T + 1 items per table: item i is the context that ended at column i - 1, is read there, and is written at
column i. Item 0 ended before the chunk.

Dimension letters: B batch, T time, I = T + 1 items, N tables, A sets, W ways, P parts of a tag, M width of a value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from dyadlm.ops.contexts import Contexts, mix
from dyadlm.ops.pyramid import Clock, accumulator

EVICTIONS = ("ring", "lru")
SCOPES = ("document", "stream")
VALUES = ("float32", "float16")
LARGEST_HALF = 65_504.0
PHI = 0x9E3779B97F4A7C15 - 2**64  # the golden ratio, as 64 bits: sets the parts of a tag apart


class SlotState(NamedTuple):
    """The tables after a chunk, newest entry of a set first; sized by the configuration alone."""

    tags: Tensor  # (B, N, S, W, P) int64, -1 where empty
    values: Tensor  # (B, N, S, W, M), 0 where empty; float32 or wider, or float16
    pending: Tensor  # (B, N, P) int64: the context that ended at the last token, still to be written; -1 for none


class SlotWrite(NamedTuple):
    """What one token changes in the tables: one set of each, whatever their size."""

    changed: Tensor  # (B, N, 1) int64: which set
    tags: Tensor  # (B, N, 1, W, P) int64, as in `SlotState`
    values: Tensor  # (B, N, 1, W, M)
    pending: Tensor  # (B, N, P) int64


class Survivors(NamedTuple):
    """What stands in the tables after a chunk: from the chunk, from the state, or nothing. U sets: all, or the changed.

    Where an entry comes from neither, both its indices are -1.
    """

    tags: Tensor  # (B, N, U, W, P) int64
    column: Tensor  # (B, N, U, W) int64: the column whose value the entry holds
    slot: Tensor | None  # (B, N, U, W) int64: the entry of the state whose value it holds; None without a state
    changed: Tensor | None  # (B, N, 1) int64: the one set that may have changed; None: U is all sets


@dataclass(frozen=True)
class SlotLookup:
    """A plan: which value is read at each token, and what the tables hold at the end.

    Where nothing is found, `column` and `slot` mean nothing.
    """

    found: Tensor  # (B, T, N) bool
    column: Tensor  # (B, T, N) int64: the column whose value is read; -1 if from the state
    slot: Tensor | None  # (B, T, N) int64: the entry of the state that is read, set * W + way; None without a state
    pending: Tensor  # (B, N, P) int64, of the new state
    survive: Callable[[], Survivors]
    # (B, N, T + 1) int32: the next item with the tag of an item, of all that may read its value; -1 for none. Made by a
    # kernel, for the gradient of what is read; None: not made.
    following: Tensor | None = None

    @cached_property
    def survivors(self) -> Survivors:
        """Worked out when a state is asked for, once for all layers that share the plan."""
        return self.survive()


class Rules(NamedTuple):
    """What the tables are, apart from what they hold."""

    sets: int
    ways: int
    evict: str
    scope: str


class Items(NamedTuple):
    """The contexts of a chunk, as they are read and written."""

    tags: Tensor  # (B, N, I, P) int64, -1 where not known
    sets: Tensor  # (B, N, I) int64
    written: Tensor  # (B, N, I) bool
    read: Tensor  # (B, N, I) bool
    began: Tensor  # (B, 1, I) int64: the column at which the item's document began, negative if before the chunk


class Ranking(NamedTuple):
    """The items by set, and by time within a set."""

    order: Tensor  # (B, N, I) int64: the item at each place
    place: Tensor  # (B, N, I) int64: the place of each item
    heads: Tensor  # (B, N, I) bool, by place: the first of its set
    begin: Tensor  # (B, N, I) int64, by place: the place of the first of its set


def slot_sets(tags: Tensor, sets: int) -> Tensor:
    """The set of each tag: (..., P) int64 -> (...) int64 in 0 .. sets - 1, a power of two."""
    code = mix(tags[..., 0] + PHI)
    for part in range(1, tags.shape[-1]):
        code = mix((code ^ tags[..., part]) + PHI)
    return code & (sets - 1)


# ---- Planning


@torch.no_grad()
def slot_lookup(
    contexts: Contexts,
    clock: Clock,
    *,
    sets: int,
    ways: int,
    evict: str = "ring",
    scope: str = "document",
    writes: Tensor | None = None,
    state: SlotState | None = None,
) -> SlotLookup:
    """Which value is read at each token of a chunk, and what the tables hold after it. O(T log T), no gradients.

    Args:
        contexts: as `context_tags` returns them, of N tables.
        sets: a power of two.
        evict: ring | lru.
        scope: document: tables are empty at a document's start; stream: they live on from document to document.
        writes: (B, T, N) bool, which writes take place: at t, that of the value of position t; None: all.
        state: as `slot_store` returned it for the chunk before; None at the start.
    """
    assert sets.bit_count() == 1, "sets are a power of two"
    assert ways >= 1
    assert evict in EVICTIONS
    assert scope in SCOPES
    rules = Rules(sets, ways, evict, scope)
    items = _items(contexts, clock, sets, writes, state)
    index = clock.length[:, None, None, None].expand(-1, items.tags.shape[1], 1, items.tags.shape[3])
    pending = items.tags.gather(2, index).squeeze(2)
    alone = state is not None and clock.index.shape[1] == 1
    # Within a document one token touches two sets; the start of one may empty whole tables.
    if alone and (scope == "stream" or not clock.begins):
        assert state is not None
        return _lookup_token(items, pending, state, rules)
    return _lookup_chunk(items, pending, clock, state, rules)


def _items(contexts: Contexts, clock: Clock, sets: int, writes: Tensor | None, state: SlotState | None) -> Items:
    words = torch.where(contexts.known[..., None], contexts.words, -1)
    first = torch.full_like(words[:, 0], -1) if state is None else state.pending
    tags = torch.cat([first[:, None], words], 1).transpose(1, 2)
    known = tags[..., 0] >= 0
    column = torch.arange(clock.index.shape[1], device=words.device)
    follows = ((clock.index >= 1) & (column < clock.length[:, None]))[:, None]
    write = follows if writes is None else follows & writes.transpose(1, 2)
    began = (column - clock.index)[:, None]
    return Items(
        tags,
        slot_sets(tags, sets),
        known & torch.nn.functional.pad(write, (0, 1)),
        known & torch.nn.functional.pad(follows, (1, 0)),
        torch.cat([began[..., :1], began], -1),
    )


def _lookup_chunk(items: Items, pending: Tensor, clock: Clock, state: SlotState | None, rules: Rules) -> SlotLookup:
    """The plan of any chunk."""
    previous = _previous(items.tags, items.written)
    held = 0 if state is None else rules.ways
    way = torch.zeros_like(previous) if state is None else _ways(state.tags, items.tags, items.sets)

    # By place, an entry is as deep as entries were put in front of it since. Those of the state lie before the first
    # item of their set, the newest nearest; beyond the last stands "none".
    ranking = _ranking(items.sets)
    order, place, heads, begin = ranking
    written = items.written.gather(-1, order)
    before = written.cumsum(-1) - written.long()
    former = previous.gather(-1, order)
    inside = former >= 0
    former_place = place.gather(-1, former.clamp(min=0))
    outside = way.gather(-1, order)
    in_front = before
    if rules.evict == "lru":
        # Of the writes after an entry, those count whose tag was last written before it: each tag once.
        coordinate = torch.arange(order.shape[-1], device=order.device) + (held + 1) * heads.cumsum(-1)
        limit = order.shape[-1] + (held + 1) * min(rules.sets, order.shape[-1]) + 1
        at = torch.where(inside, coordinate.gather(-1, former_place), coordinate.gather(-1, begin) - 1 - outside)
        in_front = _count_smaller(torch.where(written, at, limit - 1), at, limit)
    behind = torch.where(inside, before.gather(-1, former_place) + 1, before.gather(-1, begin) - outside)
    depth = (in_front - behind).gather(-1, place)

    inside = previous >= 0
    found = items.read & (inside | (way < held)) & (depth < rules.ways)
    if rules.scope == "document":
        written_in = items.began.expand_as(previous).gather(-1, previous.clamp(min=0))
        found = found & torch.where(inside, written_in == items.began, items.began < 0)
    slot = None
    if state is not None:
        slot = torch.where(inside, -1, items.sets * rules.ways + way)[..., 1:].transpose(1, 2)
    stood = (previous, way) if rules.evict == "lru" else None
    survive = partial(_survivors, items, ranking, stood, clock, state, rules)
    return SlotLookup(found[..., 1:].transpose(1, 2), previous[..., 1:].transpose(1, 2), slot, pending, survive)


def _ranking(sets: Tensor) -> Ranking:
    """The items by set (B, N, I)."""
    ordered, order = sets.sort(dim=-1, stable=True)
    position = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    heads = _run_heads(ordered[..., None])
    begin = torch.where(heads, position, 0).cummax(-1).values
    return Ranking(order, torch.empty_like(order).scatter_(-1, order, position), heads, begin)


def _run_heads(rows: Tensor) -> Tensor:
    """Where a row differs from the one before: (..., I, P) -> (..., I) bool, True for the first."""
    return torch.nn.functional.pad((rows[..., 1:, :] != rows[..., :-1, :]).any(-1), (1, 0), value=True)


def _previous(tags: Tensor, written: Tensor) -> Tensor:
    """The last earlier item that was written and has the same tag, -1 if none: (..., I, P), (..., I) -> (..., I)."""
    order = tags[..., -1].sort(dim=-1, stable=True).indices
    for part in range(tags.shape[-1] - 2, -1, -1):
        order = order.gather(-1, tags[..., part].gather(-1, order).sort(dim=-1, stable=True).indices)
    position = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    heads = _run_heads(tags.gather(-2, order[..., None].expand_as(tags)))
    begin = torch.where(heads, position, 0).cummax(-1).values
    latest = torch.where(written.gather(-1, order), position, -1).cummax(-1).values
    latest = torch.nn.functional.pad(latest[..., :-1], (1, 0), value=-1)
    previous = torch.where(latest >= begin, order.gather(-1, latest.clamp(min=0)), -1)
    return torch.empty_like(order).scatter_(-1, order, previous)


def _ways(table: Tensor, tags: Tensor, sets: Tensor) -> Tensor:
    """The newest way of its set that holds each tag, W if none.

    table (B, N, S, W, P), tags (B, N, I, P), sets (B, N, I) -> (B, N, I).
    """
    ways = table.shape[3]
    way = torch.arange(ways, device=table.device)[:, None]
    cells = (sets[:, :, None] * ways + way).flatten(2)  # ways before items: reductions run along memory
    same = torch.ones((), dtype=torch.bool, device=table.device)
    for part in range(table.shape[4]):
        entries = table[..., part].flatten(2).gather(-1, cells).unflatten(-1, (ways, -1))
        same = same & (entries == tags[:, :, None, :, part])
    return torch.where(same, way, ways).amin(2)


def _count_smaller(values: Tensor, bounds: Tensor, limit: int) -> Tensor:
    """For each position the earlier values below its bound: (..., I) and (..., I) int64 in 0 .. limit - 1 -> (..., I).

    A wavelet matrix (Claude, Navarro, Ordóñez 2015): values are parted bit by bit, the highest first, and each range of
    positions is followed into the half where its bound lies.
    """
    position = torch.arange(values.shape[-1], device=values.device).expand_as(values)
    low, high, count = torch.zeros_like(position), position, torch.zeros_like(position)
    for bit in range((limit - 1).bit_length() - 1, -1, -1):
        one = (values >> bit) & 1
        ones = torch.nn.functional.pad(one.cumsum(-1), (1, 0))
        zeros = values.shape[-1] - ones[..., -1:]
        ones_low, ones_high = ones.gather(-1, low), ones.gather(-1, high)
        upper = ((bounds >> bit) & 1).bool()
        count = count + torch.where(upper, (high - ones_high) - (low - ones_low), 0)
        low = torch.where(upper, zeros + ones_low, low - ones_low)
        high = torch.where(upper, zeros + ones_high, high - ones_high)
        goes = torch.where(one.bool(), zeros + ones[..., :-1], position - ones[..., :-1])
        values = torch.empty_like(values).scatter_(-1, goes, values)
    return count


@torch.no_grad()
def ring_survivors(
    contexts: Contexts, clock: Clock, writes: Tensor | None, state: SlotState | None, rules: Rules
) -> Survivors:
    """What rings hold after a chunk, without a plan of what is read."""
    items = _items(contexts, clock, rules.sets, writes, state)
    return _survivors(items, _ranking(items.sets), None, clock, state, rules)


@torch.no_grad()
def _survivors(
    items: Items,
    ranking: Ranking,
    stood: tuple[Tensor, Tensor] | None,
    clock: Clock,
    state: SlotState | None,
    rules: Rules,
) -> Survivors:
    """What is in the tables after a chunk: the last entries of it in each set, then those of the state, cut at W.

    stood: of lru, the item and the way (B, N, I) in which the tag of each item stood before.
    """
    batch, tables, count = items.sets.shape
    sets, ways = rules.sets, rules.ways
    cells = sets * ways  # and one more, for what is dropped
    entered, lasting = items.written, clock.length >= 0
    if rules.scope == "document":
        open_began = items.began.gather(-1, clock.length[:, None, None])
        entered = entered & (items.began == open_began)
        lasting = (clock.length == 0) | (open_began[:, 0, 0] < 0)
    if stood is not None:  # a write that is followed by one of the same tag has been removed
        previous, way = stood
        removed = previous.new_zeros(batch, tables, count + 1, dtype=torch.bool)
        removed.scatter_(-1, torch.where(items.written & (previous >= 0), previous, count), True)
        entered = entered & ~removed[..., :count]

    entries = items.sets.new_zeros(batch, tables, sets).scatter_add_(-1, items.sets, entered.long())
    own = entered.gather(-1, ranking.order).long()
    until = own.cumsum(-1)
    rank = (until - (until - own).gather(-1, ranking.begin)).gather(-1, ranking.place)
    depth = entries.gather(-1, items.sets) - rank
    cell = torch.where(entered & (depth < ways), items.sets * ways + depth, cells)
    column = items.sets.new_full((batch, tables, cells + 1), -1)
    column = column.scatter_(-1, cell, torch.arange(count, device=cell.device).expand_as(cell))[..., :cells]
    tags = items.tags.gather(2, column.clamp(min=0)[..., None].expand(-1, -1, -1, items.tags.shape[-1]))
    tags = torch.where(column[..., None] >= 0, tags, -1)

    shape, slot = (sets, ways), None
    if state is not None:
        old = state.tags.flatten(2, 3)
        kept = (old[..., 0] >= 0) & lasting[:, None, None]
        if stood is not None:
            rewritten = previous.new_zeros(batch, tables, cells + 1, dtype=torch.bool)
            rewritten.scatter_(-1, torch.where(entered & (way < ways), items.sets * ways + way, cells), True)
            kept = kept & ~rewritten[..., :cells]
        newer = kept.unflatten(-1, shape).long()
        depth = entries[..., None] + newer.cumsum(-1) - newer
        here = torch.arange(cells, device=old.device)
        goes = (here[::ways, None] + depth).flatten(2)
        goes = torch.where(kept & (depth < ways).flatten(2), goes, cells)
        slot = items.sets.new_full((batch, tables, cells + 1), -1)
        slot = slot.scatter_(-1, goes, here.expand_as(goes))[..., :cells]
        stays = old.gather(2, slot.clamp(min=0)[..., None].expand_as(old))
        tags = torch.where(slot[..., None] >= 0, stays, tags)

        slot = slot.unflatten(-1, shape)
    return Survivors(tags.unflatten(2, shape), column.unflatten(-1, shape), slot, None)


def _lookup_token(items: Items, pending: Tensor, state: SlotState, rules: Rules) -> SlotLookup:
    """The plan of a single token that continues each row: the same as `_lookup_chunk`, from the two sets it touches."""
    ways = rules.ways
    way = _ways(state.tags, items.tags, items.sets)
    written, same_set = items.written[..., 0], items.sets[..., 0] == items.sets[..., 1]
    again = written & (items.tags[:, :, 0] == items.tags[:, :, 1]).all(-1)
    pushed = written & same_set
    if rules.evict == "lru":  # an entry that comes to the front from before another one pushes nothing
        pushed = pushed & (way[..., 0] > way[..., 1])
    found = items.read[..., 1] & (again | (way[..., 1] + pushed.long() < ways))
    column = torch.where(again, 0, -1)
    slot = torch.where(again, -1, items.sets[..., 1] * ways + way[..., 1])
    survive = partial(_survivors_of_token, items, way[..., 0], state, rules)
    return SlotLookup(found[:, None], column[:, None], slot[:, None], pending, survive)


@torch.no_grad()
def _survivors_of_token(items: Items, way: Tensor, state: SlotState, rules: Rules) -> Survivors:
    """What is in the one set to which a token wrote: its entry, then the others less the one removed or pushed out."""
    ways = rules.ways
    changed, written = items.sets[..., :1], items.written[..., :1]
    here = torch.arange(ways, device=way.device)
    removed = way.clamp(max=ways - 1)[..., None] if rules.evict == "lru" else ways - 1
    source = torch.where(written & (here <= removed), here - 1, here)
    own = source < 0
    tags = state.tags.gather(2, changed[..., None, None].expand(-1, -1, 1, *state.tags.shape[3:])).squeeze(2)
    tags = tags.gather(2, source.clamp(min=0)[..., None].expand_as(tags))
    tags = torch.where(own[..., None], items.tags[:, :, :1], tags)
    column, slot = torch.where(own, 0, -1), torch.where(own, -1, changed * ways + source)
    return Survivors(tags[:, :, None], column[:, :, None], slot[:, :, None], changed)


# ---- Moving values


def _gathered(values: Tensor, column: Tensor, state: SlotState | None, slot: Tensor | None, there: Tensor) -> Tensor:
    """The values of entries: from the state where its slot is not negative, else from the chunk; 0 where not `there`.

    values (B, T, N or 1, M); column, slot, there (B, N, ...) -> (B, N, ..., M). Negative indices mean nothing.
    """
    batch, time, own, width = values.shape
    tables = column.shape[1]
    beside = (1,) * (column.dim() - 2)
    row = torch.arange(batch, device=column.device).view(-1, 1, *beside)
    table = torch.arange(tables, device=column.device).view(1, -1, *beside)
    place = (row * time + column.clamp(min=0)) * own + (table if own > 1 else 0)
    rows = values.flatten(0, 2).index_select(0, place.flatten()).view(*column.shape, width)
    if slot is not None:
        assert state is not None, "what was planned with a state is read and stored with it"
        cells = state.values.shape[2] * state.values.shape[3]
        place = (row * tables + table) * cells + slot.clamp(0, cells - 1)
        old = state.values.flatten(0, 3).index_select(0, place.flatten()).view(*column.shape, width)
        rows = torch.where(slot[..., None] >= 0, old.to(rows.dtype), rows)
    return rows.masked_fill_(~there[..., None], 0)


def slot_values(values: Tensor, kept_as: str) -> Tensor:
    """Values as slots give them back: as they are, or rounded to the nearest float16, beyond its range to its largest.

    The dtype stays. Gradients pass as if nothing were rounded.
    """
    if kept_as == "float32":
        return values
    rounded = values.detach().clamp(-LARGEST_HALF, LARGEST_HALF).half().to(values.dtype)
    return rounded + (values - values.detach()) if values.requires_grad else rounded


def slot_read(values: Tensor, lookup: SlotLookup, state: SlotState | None = None) -> Tensor:
    """The value read at every token, exactly zero where nothing is found.

    Args:
        values: (B, T, N, M), or (B, T, 1, M) for a value shared by all tables: what is written at each position.
        state: as given to `slot_lookup`.

    Returns:
        (B, T, N, M) of the dtype of `values`; gradients flow to `values` and to those of the state.
    """
    slot = None if lookup.slot is None else lookup.slot.transpose(1, 2)
    read = _gathered(values, lookup.column.transpose(1, 2), state, slot, lookup.found.transpose(1, 2))
    return read.transpose(1, 2)


def slot_store(
    values: Tensor, lookup: SlotLookup, state: SlotState | None = None, kept_as: str = "float32"
) -> SlotState:
    """The state after the chunk. Arguments as in `slot_read`.

    kept_as: float32: values are kept in float32 at least; float16: in half precision, which is exact for what
    `slot_values` gives.
    """
    stored = slot_change(values, lookup, state, kept_as)
    if isinstance(stored, SlotState):
        return stored
    assert state is not None, "a single token that continues something"
    return slot_put(state, stored)


def slot_change(
    values: Tensor, lookup: SlotLookup, state: SlotState | None = None, kept_as: str = "float32"
) -> SlotState | SlotWrite:
    """What `slot_store` gives, or of a single token only what it changes, for `slot_put`. Arguments as there."""
    tags, column, slot, changed = lookup.survivors
    there = column >= 0 if slot is None else (column >= 0) | (slot >= 0)
    values = values.half() if kept_as == "float16" else accumulator(values)
    kept = _gathered(values, column, state, slot, there)
    if changed is None:
        return SlotState(tags, kept, lookup.pending)
    return SlotWrite(changed, tags, kept, lookup.pending)


def slot_put(state: SlotState, write: SlotWrite, owned: bool = False) -> SlotState:
    """The state with what one token changed.

    owned: nobody else holds the tables, so that they may be written to: O(W), whatever their size. Where gradients are
    on, they are copied all the same.
    """

    def put(table: Tensor, rows: Tensor) -> Tensor:
        index = write.changed.reshape(*write.changed.shape, *[1] * (table.dim() - 3)).expand_as(rows)
        rows = rows.to(table.dtype)
        # A tensor made in inference mode may be written to only there.
        free = not torch.is_grad_enabled() and not (table.is_inference() and not torch.is_inference_mode_enabled())
        if owned and free and not table.requires_grad:
            return table.scatter_(2, index, rows)
        return table.scatter(2, index, rows)

    return SlotState(put(state.tags, write.tags), put(state.values, write.values), write.pending)
