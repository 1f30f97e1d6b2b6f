"""Identity slots against their definition: what is found, values, gradients and the final state."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dyadlm.ops import make_clock, reference
from dyadlm.ops.contexts import Contexts, context_tags, tag_words
from dyadlm.ops.pyramid import next_position
from dyadlm.ops.slots import EVICTIONS, SCOPES, SlotState, slot_lookup, slot_read, slot_store


class Case(NamedTuple):
    """Rows of documents with padding, their contexts, and what is to be written."""

    ids: torch.Tensor  # (B, T)
    lengths: torch.Tensor  # (B,)
    starts: torch.Tensor  # (B, T)
    writes: torch.Tensor | None  # (B, T, N)
    contexts: list
    vocab_size: int
    options: dict  # sets, ways, evict, scope


def make_case(batch, time, contexts, vocab_size, *, seed=0, lengths=None, breaks=0.1, gate=None, **options) -> Case:
    generator = torch.Generator().manual_seed(seed)
    return Case(
        torch.randint(0, vocab_size, (batch, time), generator=generator),
        torch.full((batch,), time) if lengths is None else torch.tensor(lengths),
        torch.rand(batch, time, generator=generator) < breaks,
        None if gate is None else torch.rand(batch, time, len(contexts), generator=generator) < gate,
        contexts,
        vocab_size,
        {"sets": 2, "ways": 2, "evict": "ring", "scope": "document", **options},
    )


def written_values(case: Case, width=2, own=True) -> torch.Tensor:
    """Values that are all different from each other and from zero."""
    batch, time = case.ids.shape
    shape = (batch, time, len(case.contexts) if own else 1, width)
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def run(case: Case, values, cuts=()) -> tuple[torch.Tensor, torch.Tensor, SlotState]:
    """Found, reads and the final state, in chunks that end at `cuts`."""
    batch, time = case.ids.shape
    found, reads, position, tags, state = [], [], None, None, None
    for a, b in zip([0, *cuts], [*cuts, time], strict=True):
        length, starts = (case.lengths - a).clamp(0, b - a), case.starts[:, a:b]
        clock = make_clock(batch, b - a, position=position, length=length, starts=starts)
        begins = case.ids[:, a:b] == 0
        contexts, tags = context_tags(
            case.ids[:, a:b], case.contexts, case.vocab_size, clock, word_begins=begins, state=tags
        )
        writes = None if case.writes is None else case.writes[:, a:b]
        lookup = slot_lookup(contexts, clock, writes=writes, state=state, **case.options)
        found.append(lookup.found)
        reads.append(slot_read(values[:, a:b], lookup, state))
        state = slot_store(values[:, a:b], lookup, state)
        position = next_position(clock)
    return torch.cat(found, 1), torch.cat(reads, 1), state


def definition(case: Case, values) -> tuple[torch.Tensor, torch.Tensor, SlotState]:
    """The same, from the reference."""
    batch, time = case.ids.shape
    tables, width = len(case.contexts), values.shape[-1]
    sets, ways = case.options["sets"], case.options["ways"]
    parts = tag_words(case.contexts, case.vocab_size)
    found = torch.zeros(batch, time, tables, dtype=torch.bool)
    reads = [[torch.zeros(time, width, dtype=values.dtype)] * tables for _ in range(batch)]
    tags = torch.full((batch, tables, sets, ways, parts), -1)
    stored = [[[[values.new_zeros(width)] * ways for _ in range(sets)] for _ in range(tables)] for _ in range(batch)]
    pending = torch.full((batch, tables, parts), -1)
    for b in range(batch):
        length = int(case.lengths[b])
        starts = [t == 0 or bool(case.starts[b, t]) for t in range(length)]
        for n, context in enumerate(case.contexts):
            own, document = [], []
            for token, start in zip(case.ids[b, :length].tolist(), starts, strict=True):
                document = [token] if start else [*document, token]
                tag = reference.context_at(document, [x == 0 for x in document], context, case.vocab_size)
                own.append(None if tag is None else tag + (0,) * (parts - len(tag)))
            if not own:
                continue
            hits, out, left = reference.slot_reads(
                own,
                values[b, :length, n if values.shape[2] > 1 else 0],
                starts,
                ways=ways,
                evict=case.options["evict"],
                scope=case.options["scope"],
                set_of=partial(reference.slot_set, sets=sets),
                writes=None if case.writes is None else case.writes[b, :length, n].tolist(),
            )
            found[b, :length, n] = torch.tensor(hits)
            reads[b][n] = torch.nn.functional.pad(out, (0, 0, 0, time - length))
            for which, entries in left.items():
                for way, (tag, value) in enumerate(entries):
                    tags[b, n, which, way] = torch.tensor(tag)
                    stored[b][n][which][way] = value
            if own[-1] is not None:
                pending[b, n] = torch.tensor(own[-1])
    kept = torch.stack([torch.stack([torch.stack([torch.stack(s) for s in n]) for n in b]) for b in stored])
    return found, torch.stack([torch.stack(row, 1) for row in reads]), SlotState(tags, kept, pending)


def assert_same(a, b) -> None:
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert all(torch.equal(x, y) for x, y in zip(a[2], b[2], strict=True))


@st.composite
def cases(draw) -> tuple[Case, list[int], bool]:
    batch, time = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    case = make_case(
        batch,
        time,
        draw(st.lists(st.sampled_from([1, 2, 3, 9, "word"]), min_size=1, max_size=3)),
        draw(st.sampled_from([1, 2, 3, 5, 2**17])),
        seed=draw(st.integers(0, 2**30)),
        lengths=[draw(st.integers(0, time)) for _ in range(batch)],
        breaks=draw(st.sampled_from([0.0, 0.1, 0.4])),
        gate=draw(st.sampled_from([None, 0.0, 0.5, 1.0])),
        sets=draw(st.sampled_from([1, 2, 4, 16])),
        ways=draw(st.integers(1, 5)),
        evict=draw(st.sampled_from(EVICTIONS)),
        scope=draw(st.sampled_from(SCOPES)),
    )
    cuts = sorted(draw(st.sets(st.integers(1, time - 1), max_size=time))) if time > 1 else []
    return case, cuts, draw(st.booleans())


@settings(max_examples=100, deadline=None)
@given(cases())
@example((make_case(2, 37, [1, 2, "word"], 3, lengths=[37, 20]), list(range(1, 37)), True))
@example((make_case(2, 37, [1, 2], 3, evict="lru", scope="stream", ways=3, sets=1), list(range(1, 37)), True))
@pytest.mark.slow
def test_equal_the_definition_however_cut_packed_and_padded(drawn):
    """Collisions throughout: all values differ, so one read under a wrong tag would show."""
    case, cuts, own = drawn
    values = written_values(case, own=own)
    wanted = definition(case, values)
    assert_same(run(case, values), wanted)
    assert_same(run(case, values, cuts), wanted)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_gradients_equal_those_of_the_definition(drawn):
    case, cuts, own = drawn
    values = written_values(case, own=own).requires_grad_()
    results = [definition(case, values), run(case, values), run(case, values, cuts)]
    generator = torch.Generator().manual_seed(0)
    to_read = torch.randn(results[0][1].shape, generator=generator, dtype=torch.float64)
    to_keep = torch.randn(results[0][2].values.shape, generator=generator, dtype=torch.float64)
    sums = [(reads * to_read).sum() + (state.values * to_keep).sum() for _, reads, state in results]
    # Anchored, for a case in which nothing is read or kept depends on no value.
    first, *others = [torch.autograd.grad(total + 0 * values.sum(), values)[0] for total in sums]
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-12)


@pytest.mark.parametrize("evict", EVICTIONS)
@pytest.mark.parametrize("cuts", [(), (5,), (3, 4, 5, 6)])
def test_gradcheck(evict, cuts):
    case = make_case(1, 9, [1, 2], 3, evict=evict, breaks=0.0)
    values = written_values(case).requires_grad_()
    assert run(case, values)[0].any()

    def everything(v):
        _, reads, state = run(case, v, cuts)
        return reads, state.values

    assert torch.autograd.gradcheck(everything, values)


@pytest.mark.parametrize("evict", EVICTIONS)
def test_equal_the_definition_at_length(evict):
    case = make_case(2, 700, [1, 2, 3], 9, evict=evict, sets=16, ways=8, breaks=0.004, gate=0.9)
    values = written_values(case)
    wanted = definition(case, values)
    assert 0.2 < wanted[0].double().mean() < 0.9
    assert_same(run(case, values), wanted)
    assert_same(run(case, values, (300, 301, 512)), wanted)


@pytest.mark.parametrize("evict", EVICTIONS)
def test_contexts_of_eight_from_a_vocabulary_of_131072(evict):
    """Tags of three words that differ in a single token, of any place, are told apart: one set, one table."""
    vocab_size, generator = 2**17, torch.Generator().manual_seed(0)
    base = torch.randint(0, vocab_size, (8,), generator=generator)
    phrases = [base]
    for place in range(8):
        other = base.clone()
        other[place] = (other[place] + 1) % vocab_size
        phrases.append(other)
    followed = torch.cat([torch.cat([phrase, torch.tensor([i])]) for i, phrase in enumerate(phrases)])
    ids = torch.cat([followed, followed])[None]
    case = make_case(1, ids.shape[1], [8], vocab_size, sets=1, ways=128, evict=evict, breaks=0.0)._replace(ids=ids)
    # What is written is the token itself: after each phrase, its number must be read.
    values = ids[..., None, None].double()
    found, reads, state = run(case, values)
    half = len(followed)
    ends = torch.arange(len(phrases)) * 9 + 7
    assert not found[0, ends].any()
    assert found[0, half + ends].all()
    assert reads[0, half + ends, 0, 0].tolist() == list(range(len(phrases)))
    assert_same((found, reads, state), definition(case, values))


def follow(tags: list[int], *, evict: str, ways: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Found and read at each token of one table of one set; the value written for the context of t - 1 is t."""
    words = torch.tensor(tags).view(1, -1, 1, 1)
    contexts = Contexts(words, torch.ones(1, len(tags), 1, dtype=torch.bool))
    lookup = slot_lookup(contexts, make_clock(1, len(tags)), sets=1, ways=ways, evict=evict)
    values = torch.arange(len(tags), dtype=torch.float32).view(1, -1, 1, 1)
    return lookup.found.flatten(), slot_read(values, lookup).flatten()


@pytest.mark.parametrize("ways", [1, 2, 5])
def test_an_entry_of_a_ring_survives_fewer_than_w_writes(ways):
    for between in range(2 * ways + 1):
        # The same tag over and over fills a ring as well as different ones.
        for filler in ([9] * between, list(range(10, 10 + between))):
            found, read = follow([7, *filler, 7], evict="ring", ways=ways)
            assert found[-1] == (between < ways)
            assert read[-1] == (1 if between < ways else 0)


@pytest.mark.parametrize("ways", [1, 2, 5])
def test_an_entry_of_an_lru_set_survives_fewer_than_w_distinct_tags(ways):
    for distinct in range(2 * ways + 1):
        filler = [10 + i for i in range(distinct)] * 3
        found, read = follow([7, *filler, 7], evict="lru", ways=ways)
        assert found[-1] == (distinct < ways)
        assert read[-1] == (1 if distinct < ways else 0)


@pytest.mark.parametrize("evict", EVICTIONS)
def test_the_newest_entry_of_a_context_is_read(evict):
    found, read = follow([7, 1, 7, 2, 7], evict=evict, ways=8)
    assert found.tolist() == [False, False, True, False, True]
    assert read.tolist() == [0, 0, 1, 0, 3]


def test_a_write_happens_before_the_read_of_its_token():
    """A run of one token reads at once what followed its first: position 1, at position 1."""
    found, read = follow([7, 7, 7], evict="ring", ways=1)
    assert found.tolist() == [False, True, True]
    assert read.tolist() == [0, 1, 2]


@pytest.mark.parametrize("scope", SCOPES)
def test_the_scope_decides_whether_tables_outlive_a_document(scope):
    ids = torch.tensor([[3, 4, 3, 4, 5, 3]])
    starts = torch.tensor([[False, False, True, False, False, False]])
    case = make_case(1, 6, [1], 8, scope=scope, ways=8)._replace(ids=ids, starts=starts)
    found, reads, _ = run(case, written_values(case, width=1))
    # The 3 that starts the second document is not read; the last 3 finds the newest that followed one.
    assert found[0, :, 0].tolist() == [False, False, False, False, False, True]
    assert reads[0, -1, 0, 0] == 4
    later = case._replace(ids=torch.tensor([[3, 4, 7, 3, 6, 6]]))
    assert bool(run(later, written_values(later))[0][0, 3, 0]) == (scope == "stream")


@pytest.mark.parametrize("evict", EVICTIONS)
def test_the_state_has_the_size_of_the_tables_whatever_the_length(evict):
    shapes = set()
    for time in (1, 7, 200):
        case = make_case(2, time, [1, 9], 2**17, sets=4, ways=3, evict=evict)
        state = run(case, written_values(case, width=5))[2]
        shapes.add(tuple(tuple(part.shape) for part in state))
    assert shapes == {((2, 2, 4, 3, 3), (2, 2, 4, 3, 5), (2, 2, 3))}


def test_layers_share_a_plan_and_pay_for_a_state_only_where_they_ask_for_one():
    case = make_case(1, 20, [1, 2], 3)
    clock = make_clock(1, 20)
    contexts, _ = context_tags(case.ids, case.contexts, case.vocab_size, clock)
    lookup = slot_lookup(contexts, clock, **case.options)
    one, other = written_values(case), written_values(case, width=7)
    slot_read(one, lookup)
    assert "survivors" not in vars(lookup)
    assert slot_store(one, lookup).tags is slot_store(other, lookup).tags


def test_half_precision_reads_the_same_from_the_chunk_and_from_the_state():
    case = make_case(2, 30, [1, 2], 3, ways=4)
    values = torch.randn(2, 30, 2, 3).bfloat16()
    whole, cut = run(case, values), run(case, values, (1, 2, 17))
    assert whole[1].dtype == torch.bfloat16
    assert whole[2].values.dtype == torch.float32
    assert_same(whole, cut)


def test_what_is_not_found_reads_zero_beside_values_that_are_no_numbers():
    """What stands in the padding or in an entry not read touches neither values nor gradients."""
    case = make_case(1, 6, [2], 97, breaks=0.0, lengths=[4])
    values = torch.full((1, 6, 1, 2), float("nan"), requires_grad=True)
    found, reads, _ = run(case, values, (3,))
    assert not found.any()
    assert torch.equal(reads, torch.zeros(1, 6, 1, 2))
    assert torch.equal(torch.autograd.grad(reads.sum(), values)[0], torch.zeros_like(values))
