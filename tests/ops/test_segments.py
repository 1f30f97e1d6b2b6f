"""Segments against their definition: values, states and gradients; chunks, packing, padding."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyadlm.ops import make_clock, reference
from dyadlm.ops.pyramid import next_position
from dyadlm.ops.segments import SegmentState, segment_ends, segment_plan, segment_sums, segment_windows

EXACT = 1e-10


class Case(NamedTuple):
    """Rows of documents with padding, and segmentations side by side."""

    x: Tensor  # (B, T, sum of widths) float64
    begins: Tensor  # (B, T, S) bool
    starts: Tensor  # (B, T) bool
    lengths: Tensor  # (B,)
    weights: Tensor  # (B, T, S)
    log_keep: Tensor | None  # (B, T, S)
    widths: list[int]
    longest: int


def make_case(batch, time, *, widths=(2, 1, 3), seed=0, longest=2**20, rate=0.2, breaks=0.05, lengths=None, keep=True):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, time, len(widths))
    rates = torch.tensor([rate, 0.0, 1.0])[: len(widths)]  # at random, never, always
    return Case(
        torch.randn(batch, time, sum(widths), generator=generator, dtype=torch.float64),
        torch.rand(shape, generator=generator) < rates,
        torch.rand(batch, time, generator=generator) < breaks,
        torch.full((batch,), time) if lengths is None else torch.tensor(lengths),
        torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1,
        -torch.rand(shape, generator=generator, dtype=torch.float64) if keep else None,
        list(widths),
        longest,
    )


def means(sums: Tensor, widths) -> Tensor:
    parts = sums.split([width + 1 for width in widths], -1)
    return torch.cat([part[..., :-1] / part[..., -1:].clamp(min=1e-6) for part in parts], -1)


def run(case: Case, x=None, weights=None, log_keep=None, cuts=()):
    """Windows (B, T, C) three times, the plan's begins, lengths and counts, and the last state, in chunks."""
    x = case.x if x is None else x
    weights = case.weights if weights is None else weights
    log_keep = case.log_keep if log_keep is None else log_keep
    batch, time, channels = x.shape
    counted = [width + 1 for width in case.widths]
    position = count = None
    nothing = x.new_zeros(batch, channels)
    state = SegmentState(x.new_zeros(batch, sum(counted)), nothing, nothing)
    padded, packed = bool((case.lengths < time).any()), bool(case.starts.any())
    pieces = []
    for a, b in zip([0, *cuts], [*cuts, time], strict=True):
        length = (case.lengths - a).clamp(0, b - a) if padded else None
        starts = case.starts[:, a:b] if packed else None
        clock = make_clock(batch, b - a, position=position, length=length, starts=starts)
        plan, count = segment_plan(case.begins[:, a:b], clock, case.longest, count)
        parts = x[:, a:b].split(case.widths, -1)
        pairs = zip(parts, weights[:, a:b].split(1, -1), strict=True)
        weighed = torch.cat([piece for part, weight in pairs for piece in (part * weight, weight)], -1)
        kept = None if log_keep is None else log_keep[:, a:b]
        sums = segment_sums(weighed, counted, plan, state.running, kept)
        made, before = means(sums, case.widths), means(state.running, case.widths)
        windows, state = segment_windows(made, sums, case.widths, plan, clock, state, before)
        pieces.append((*windows, plan.begins, plan.length, plan.complete))
        position = next_position(clock)
    return [torch.cat(column, 1) for column in zip(*pieces, strict=True)], (*state, *count, position)


def definition(case: Case, row: int, x=None, weights=None, log_keep=None) -> list[reference.Segments]:
    """One row, each segmentation by itself."""
    x = case.x if x is None else x
    weights = case.weights if weights is None else weights
    log_keep = case.log_keep if log_keep is None else log_keep
    real, said = int(case.lengths[row]), []
    for s, part in enumerate(x[row, :real].split(case.widths, -1)):
        said.append(
            reference.segments(
                part,
                case.begins[row, :real, s].tolist(),
                case.starts[row, :real].tolist(),
                case.longest,
                weights=weights[row, :real, s],
                keep=None if log_keep is None else log_keep[row, :real, s].exp(),
            )
        )
    return said


def assert_is_the_definition(case: Case, cuts=()) -> None:
    got, state = run(case, cuts=cuts)
    for row, real in enumerate(case.lengths.tolist()):
        if not real:
            assert all((part[row] == 0).all() for part in state)
            continue
        said = definition(case, row)
        for column, name in enumerate(("current", "last", "earlier")):
            want = torch.cat([getattr(one, name) for one in said], -1)
            assert (got[column][row, :real] - want).abs().max() < EXACT
            if name != "current":  # the state after the last real token is what that token saw
                assert (state[column][row] - want[-1]).abs().max() < EXACT
        assert (means(state[0], case.widths)[row] - got[0][row, real - 1]).abs().max() < EXACT
        for s, one in enumerate(said):
            assert got[3][row, :real, s].tolist() == one.begins
            assert got[4][row, :real, s].tolist() == one.length
            assert got[5][row, :real, s].tolist() == [min(number, 2) for number in one.complete]
            assert (int(state[3][row, s]), int(state[4][row, s])) == (one.length[-1], min(one.complete[-1], 2))


@given(
    seed=st.integers(0, 10**6),
    time=st.integers(1, 70),
    longest=st.sampled_from([1, 2, 5, 16, 2**20]),
    rate=st.sampled_from([0.0, 0.1, 0.5, 0.95]),
    breaks=st.sampled_from([0.0, 0.05, 0.4]),
    keep=st.booleans(),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_every_segmentation_equals_the_definition(seed, time, longest, rate, breaks, keep, data):
    """Random boundaries, documents, lengths with empty rows, and cuts, single tokens among them."""
    lengths = data.draw(st.none() | st.lists(st.integers(0, time), min_size=2, max_size=2))
    cuts = sorted(data.draw(st.sets(st.integers(1, time - 1), max_size=6))) if time > 1 else []
    case = make_case(2, time, seed=seed, longest=longest, rate=rate, breaks=breaks, lengths=lengths, keep=keep)
    assert_is_the_definition(case, cuts)


@pytest.mark.parametrize("time", [32, 33, 1024, 1025, 1100])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.slow
def test_long_chunks_equal_the_definition(time, keep):
    """Over one tile, over one tile of tiles; segments as long as the chunk, and across its tiles."""
    case = make_case(1, time, widths=(1, 1, 1), rate=0.01, breaks=0.002, longest=700, keep=keep)
    assert_is_the_definition(case)
    assert_is_the_definition(case, [1, 12, time // 2])


def test_token_by_token_equals_the_definition():
    assert_is_the_definition(make_case(3, 50, lengths=[50, 0, 17], longest=7), range(1, 50))


@pytest.mark.parametrize(("time", "cuts"), [(9, ()), (9, (1, 4, 5)), (40, (3,))])
def test_gradients_equal_those_of_the_definition(time, cuts):
    case = make_case(1, time, widths=(2, 1), longest=6, breaks=0.1, lengths=[time - 1])
    leaves = [tensor.clone().requires_grad_() for tensor in (case.x, case.weights, case.log_keep)]
    got, _ = run(case, *leaves, cuts=cuts)
    said = definition(case, 0, *leaves)
    generator = torch.Generator().manual_seed(5)
    probes = [torch.randn(time - 1, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    loss = sum((part[0, :-1] * probe).sum() for part, probe in zip(got[:3], probes, strict=True))
    names = ("current", "last", "earlier")
    wanted = (torch.cat([getattr(one, name) for one in said], -1) for name in names)
    expected = sum((part * probe).sum() for part, probe in zip(wanted, probes, strict=True))
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert b.abs().max() > 0
        assert (a - b).abs().max() < 1e-9


def test_gradcheck():
    case = make_case(2, 7, widths=(1, 1), longest=4, breaks=0.1)
    leaves = [tensor.clone().requires_grad_() for tensor in (case.x, case.weights, case.log_keep)]
    assert torch.autograd.gradcheck(lambda *given: tuple(run(case, *given, cuts=(3,))[0][:3]), leaves)


@pytest.mark.parametrize("longest", [64, 2**20])
def test_no_drift_over_a_hundred_thousand_tokens(longest):
    """float32, a mean far from zero, in chunks: one segment without end, and many."""
    case = make_case(1, 100_000, widths=(1, 1), rate=0.05, breaks=0.0, longest=longest, keep=False)
    case = case._replace(x=case.x + 5)
    cuts = range(1000, 100_000, 1000)
    exact, _ = run(case, cuts=cuts)
    single, _ = run(case, case.x.float(), case.weights.float(), cuts=cuts)
    assert single[0].dtype == torch.float32
    for a, b in zip(single[:3], exact[:3], strict=True):
        assert (a - b).abs().max() < 2e-5


def test_strong_forgetting_neither_overflows_nor_fades_to_nothing():
    case = make_case(1, 200, widths=(2, 1))._replace(log_keep=torch.full((1, 200, 2), -60.0, dtype=torch.float64))
    got, state = run(case, case.x.float(), case.weights.float(), case.log_keep.float())
    assert (got[0] - case.x).abs().max() < 1e-5  # all but the token itself is forgotten
    assert all(part.isfinite().all() for part in (*got, *state))


def test_a_segment_ends_before_the_next_one_begins_or_with_the_chunk():
    """A row that begins no segment at first belongs to one that is open."""
    begins = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]]).bool()[..., None]
    assert segment_ends(begins)[..., 0].tolist() == [[2, 2, 2, 3, 5, 5], [1, 1, 5, 5, 5, 5]]
