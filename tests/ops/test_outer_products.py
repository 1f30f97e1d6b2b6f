"""Sums of outer products against their definition: values, states and gradients, however a text is cut and packed."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyadlm.ops import make_clock, reference
from dyadlm.ops.blocks import granularity, tree_nodes
from dyadlm.ops.outer_products import OuterState, ask, outer_numbers, outer_windows
from dyadlm.ops.pyramid import next_position
from dyadlm.ops.segments import segment_plan

EXACT = 1e-11
LONGEST = 16
STACKS = (
    ["sliding", "sliding", "dual", "dual"],
    ["sliding", "dual", "prefix", "block", "sliding"],
    ["block", "block", "dual"],
)


def make_case(time, seed=0, batch=2):
    """Queries, keys, values and weights."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((3,), (3,), (2,))
    drawn = [torch.randn(batch, time, *size, generator=generator, dtype=torch.float64) for size in sizes]
    return [*drawn, torch.rand(batch, time, generator=generator, dtype=torch.float64) + 0.5]


def read(case, alignments, begins, clock, state, count):
    """A chunk, and what the next one goes on from. begins: (B, T, S), none for S = 0."""
    query, key, value, weights = case
    depth = max((granularity(k, a) for k, a in enumerate(alignments) if a != "sliding"), default=-1)
    plan, count = segment_plan(begins, clock, LONGEST, count) if begins.shape[-1] else (None, None)
    entries = (weights[..., None] * key)[..., :, None] * value[..., None, :]
    windows, state = outer_windows(
        entries.flatten(2), weights[..., None], alignments, tree_nodes(clock, depth), plan, clock, state
    )
    return ask(query, windows), state, count


def by_definition(case, alignments, begins):
    """One row (T, ...) that is one document."""
    cut = [[] for _ in range(begins.shape[-1])]
    for own, given_begins in zip(cut, begins.unbind(-1), strict=True):
        for t, here in enumerate(given_begins.tolist()):
            since = t - max((i for i, begun in enumerate(own) if begun), default=0)
            own.append(t == 0 or here or since == LONGEST)
    return reference.outer_products(*case, alignments, cut).flatten(1)


def numbers_of(state):
    return sum(part[0].numel() for group in state for part in group)


@pytest.mark.parametrize("alignments", STACKS)
@pytest.mark.parametrize("time", [1, 2, 7, 21])
def test_values_and_gradients_are_those_of_the_definition(time, alignments):
    begins = torch.rand(2, time, 2, generator=torch.Generator().manual_seed(time)) < 0.2
    found, expected = [], []
    for results, function in (
        (found, lambda *case: read(case, alignments, begins, make_clock(2, time), OuterState(), None)[0]),
        (
            expected,
            lambda *case: torch.stack(
                [by_definition([part[b] for part in case], alignments, begins[b]) for b in range(2)]
            ),
        ),
    ):
        case = [part.requires_grad_() for part in make_case(time)]
        asked = function(*case)
        weights = torch.arange(asked.numel(), dtype=torch.float64).view_as(asked).cos()
        results += [asked, *torch.autograd.grad((asked * weights).sum(), case)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=EXACT)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_documents_that_are_cut_packed_and_padded_equal_each_alone(data):
    time, alignments = data.draw(st.integers(1, 40)), data.draw(st.sampled_from(STACKS))
    case, generator = make_case(time, seed=time), torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    begins = torch.rand(2, time, data.draw(st.integers(0, 2)), generator=generator) < 0.2
    lengths = torch.tensor([data.draw(st.integers(0, time)) for _ in range(2)])
    starts = (torch.rand(2, time, generator=generator) < 0.1) & (torch.arange(time) < lengths[:, None])
    cuts = sorted(data.draw(st.sets(st.integers(1, time - 1), max_size=3))) if time > 1 else []
    parts, state, count, position = [], OuterState(), None, None
    for a, b in pairwise([0, *cuts, time]):
        length = (lengths - a).clamp(0, b - a)
        clock = make_clock(2, b - a, position=position, length=length, starts=starts[:, a:b])
        chunk = [part[:, a:b] for part in case]
        asked, state, count = read(chunk, alignments, begins[:, a:b], clock, state, count)
        assert numbers_of(state) == outer_numbers(alignments, begins.shape[-1], 6)
        parts.append(asked)
        position = next_position(clock)
    asked = torch.cat(parts, 1)
    for row in range(2):
        edges = [0, *(t for t in range(1, time) if starts[row, t]), int(lengths[row])]
        for a, b in pairwise(edges if lengths[row] else [0]):
            own = [part[row, a:b] for part in case]
            alone = by_definition(own, alignments, begins[row, a:b])
            torch.testing.assert_close(asked[row, a:b], alone, rtol=1e-9, atol=EXACT)
            if b == edges[-1]:
                document = [part[None] for part in own]
                _, kept, _ = read(
                    document, alignments, begins[row : row + 1, a:b], make_clock(1, b - a), OuterState(), None
                )
                for carried, fresh in zip(state, kept, strict=True):
                    for one, other in zip(carried, fresh, strict=True):
                        torch.testing.assert_close(one[row], other[0], rtol=1e-9, atol=EXACT)
