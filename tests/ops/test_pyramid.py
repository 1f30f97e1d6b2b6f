"""The pyramid against its loop definition: values, states and gradients, whole, chunked, padded and packed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyadlm.ops import Pyramid, PyramidState, make_clock, pyramid, reference
from dyadlm.ops.blocks import HISTORY, hand_down, tree_nodes
from dyadlm.ops.pyramid import EARLY, accumulator, next_position

STACKS = {
    "sliding": ["sliding"] * 7,
    "dual": ["sliding", *["dual"] * 7],
    "block": ["block"] * 7,
    "prefix": ["prefix"] * 7,
    "hybrid": ["sliding"] * 4 + ["dual"] * 4,
    "mixed": ["sliding", "dual", "block", "prefix", "dual", "sliding", "dual"],
}
LENGTHS = (1, 2, 3, 63, 64, 65, 257, 1000)


def signal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definition(x: torch.Tensor, alignments: list[str], early: str) -> Pyramid:
    rows = [reference.pyramid(row, alignments, early) for row in x]
    return Pyramid(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def assert_equal(a: Pyramid, b: Pyramid, tolerance: float = 0.0) -> None:
    assert (a.current - b.current).abs().max() <= tolerance
    assert (a.previous - b.previous).abs().max() <= tolerance
    assert torch.equal(a.paired, b.paired)


def assert_same_state(a: PyramidState, b: PyramidState) -> None:
    for x, y in zip((a.position, *a.rings, *a.blocks), (b.position, *b.rings, *b.blocks), strict=True):
        assert torch.equal(x, y)


def in_chunks(x: torch.Tensor, cuts: list[int], alignments: list[str], early: str) -> tuple[Pyramid, PyramidState]:
    state, parts = None, []
    for start, stop in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        part, state = pyramid(x[:, start:stop], alignments, early=early, state=state)
        parts.append(part)
    return Pyramid(*(torch.cat(columns, 1) for columns in zip(*parts, strict=True))), state


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("stack", STACKS)
def test_equals_the_definition(stack, early):
    for length in (n for n in LENGTHS if n <= 257):
        x = signal(2, length, 2, seed=length)
        assert_equal(pyramid(x, STACKS[stack], early=early)[0], definition(x, STACKS[stack], early), 1e-13)


def test_equals_the_definition_at_a_thousand():
    x = signal(1, 1000, 1)
    for stack in ("hybrid", "mixed"):
        assert_equal(pyramid(x, STACKS[stack])[0], definition(x, STACKS[stack], "zero"), 1e-13)


@pytest.mark.parametrize("stack", STACKS)
def test_gradients_equal_those_of_the_definition(stack):
    for early in EARLY:
        x = signal(1, 37, 2)
        weights = signal(2, 1, 37, len(STACKS[stack]), 2, seed=1)
        gradients = []
        for function in (
            lambda v, e=early: pyramid(v, STACKS[stack], early=e)[0],
            lambda v, e=early: definition(v, STACKS[stack], e),
        ):
            leaf = x.clone().requires_grad_()
            out = function(leaf)
            gradients.append(torch.autograd.grad((weights[0] * out.current + weights[1] * out.previous).sum(), leaf)[0])
        assert (gradients[0] - gradients[1]).abs().max() < 1e-12


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_chunks_with_a_state_equal_the_whole_bit_for_bit(data):
    """Any cuts, float32: the trees are the same, so the bits are."""
    alignments = STACKS[data.draw(st.sampled_from(sorted(STACKS)))]
    early = data.draw(st.sampled_from(EARLY))
    length = data.draw(st.integers(2, 150))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=12)))
    x = signal(2, length, 3, seed=length).float()
    whole, state = pyramid(x, alignments, early=early)
    parts, carried = in_chunks(x, cuts, alignments, early)
    assert_equal(parts, whole)
    assert_same_state(carried, state)


@pytest.mark.parametrize("stack", STACKS)
def test_token_by_token_equals_the_whole_bit_for_bit(stack):
    x = signal(1, 130, 2).float()
    whole, state = pyramid(x, STACKS[stack])
    parts, carried = in_chunks(x, list(range(1, 130)), STACKS[stack], "zero")
    assert_equal(parts, whole)
    assert_same_state(carried, state)


@pytest.mark.parametrize("stack", STACKS)
def test_gradients_flow_through_the_state(stack):
    x = signal(1, 40, 2).requires_grad_()
    whole, _ = pyramid(x, STACKS[stack])
    parts, _ = in_chunks(x, [7, 8, 23], STACKS[stack], "zero")
    gradients = [torch.autograd.grad((out.current * 2 + out.previous).square().sum(), x)[0] for out in (whole, parts)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_padding_and_packing_equal_each_document_alone_bit_for_bit(data):
    """Rows of several documents and right padding, cut into chunks: every token sees its own document only."""
    alignments = STACKS[data.draw(st.sampled_from(sorted(STACKS)))]
    early = data.draw(st.sampled_from(EARLY))
    rows = [data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)) for _ in range(2)]
    time = max(sum(row) for row in rows) + 2
    x = signal(2, time, 2, seed=time).float()
    starts = torch.zeros(2, time, dtype=torch.bool)
    for b, row in enumerate(rows):
        for i in range(1, len(row)):
            starts[b, sum(row[:i])] = True
    lengths = torch.tensor([sum(row) for row in rows])
    cut = data.draw(st.integers(1, time - 1))
    state, parts = None, []
    for a, b in ((0, cut), (cut, time)):
        clock = make_clock(
            2,
            b - a,
            position=None if state is None else state.position,
            length=(lengths - a).clamp(0, b - a),
            starts=starts[:, a:b],
        )
        part, state = pyramid(x[:, a:b], alignments, early=early, state=state, clock=clock)
        parts.append(part)
    packed = Pyramid(*(torch.cat(columns, 1) for columns in zip(*parts, strict=True)))
    for b, row in enumerate(rows):
        at = 0
        for size in row:
            alone, final = pyramid(x[b : b + 1, at : at + size], alignments, early=early)
            assert_equal(Pyramid(*(part[b : b + 1, at : at + size] for part in packed)), alone)
            at += size
        assert state.position[b] == row[-1] == final.position
        own = PyramidState(
            state.position[b : b + 1],
            tuple(r[b : b + 1] for r in state.rings),
            tuple(r[b : b + 1] for r in state.blocks),
        )
        assert_same_state(own, final)  # nothing of an earlier document is left in it


@pytest.mark.parametrize("stack", STACKS)
def test_packing_without_padding_leaves_the_state_of_the_last_document(stack):
    x, starts = signal(2, 41, 2).float(), torch.zeros(2, 41, dtype=torch.bool)
    starts[:, 22] = starts[1, 37] = True
    packed, state = pyramid(x, STACKS[stack], clock=make_clock(2, 41, starts=starts))
    for row, begin in enumerate((22, 37)):
        alone, final = pyramid(x[row : row + 1, begin:], STACKS[stack])
        assert_equal(Pyramid(*(part[row : row + 1, begin:] for part in packed)), alone)
        parts = (state.position, *state.rings, *state.blocks)
        own = [part[row : row + 1] for part in parts]
        assert all(map(torch.equal, own, (final.position, *final.rings, *final.blocks)))


@pytest.mark.parametrize("stack", STACKS)
def test_is_causal(stack):
    """The centroids at t have no gradient from any later token; dual and block do have one from each past block."""
    x = signal(1, 70, 1).requires_grad_()
    out, _ = pyramid(x, STACKS[stack])
    for t in (0, 1, 7, 31, 62):
        gradient = torch.autograd.grad(out.current[0, t].sum() + out.previous[0, t].sum(), x, retain_graph=True)[0][
            0, :, 0
        ]
        assert (gradient[t + 1 :] == 0).all()
        assert (gradient[: t + 1] != 0).any()


def test_state_is_float32_and_of_constant_size():
    sizes = []
    for length in (1, 40, 700):
        _, state = pyramid(torch.randn(1, length, 4).bfloat16(), STACKS["hybrid"])
        assert all(part.dtype == torch.float32 for part in (*state.rings, *state.blocks))
        sizes.append([part.shape for part in (*state.rings, *state.blocks)])
    assert sizes[0] == sizes[1] == sizes[2]
    assert accumulator(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


def test_pads_alone_change_nothing():
    _, state = pyramid(signal(2, 13, 2), STACKS["mixed"])
    clock = make_clock(2, 3, position=state.position, length=torch.tensor([0, 0]))
    _, after = pyramid(signal(2, 3, 2), STACKS["mixed"], state=state, clock=clock)
    assert_same_state(state, after)
    assert torch.equal(next_position(clock), state.position)


def test_nodes_of_a_fresh_start_are_those_of_any_other():
    """Where a chunk begins a document, blocks stand as they do for a clock that was told the position 0."""
    for time in (1, 2, 7, 16, 37):
        fresh = tree_nodes(make_clock(1, time), 4)
        told = tree_nodes(make_clock(1, time, position=torch.zeros(1, dtype=torch.int64)), 4)
        for one, other in zip(fresh, told, strict=True):
            complete = int(other.done[0, -1])
            assert torch.equal(one.done, other.done)
            assert torch.equal(one.ordinal, other.ordinal[:, : HISTORY + complete])


def handed_down(values, coarse: int, fine: int, position: int, starts) -> list[float]:
    """By walking over the tokens: at each fine node, the value of the last coarse node of its document, or 0."""
    seen = [values[0] if position >= 2**fine and position >> fine << fine >= 2**coarse else 0.0]
    index, done, own = position - 1, 0, int(position >= 2**coarse)
    for begins in starts:
        index, own = (0, 0) if begins else (index + 1, own)
        if (index + 1) % 2**coarse == 0:
            done, own = done + 1, own + 1
        if (index + 1) % 2**fine == 0:
            seen.append(values[done] if own else 0.0)
    return seen


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("position", [None, 0, 13, 16])
@pytest.mark.parametrize("packed", [False, True])
def test_nodes_see_the_last_wider_node(steps, position, packed):
    time, fine = 45, 1
    starts = torch.zeros(1, time, dtype=torch.bool)
    if packed:
        starts[0, [3, 20, 29]] = True
    clock = make_clock(
        1, time, position=None if position is None else torch.tensor([position]), starts=starts if packed else None
    )
    nodes = tree_nodes(clock, fine + steps)
    wide, narrow = nodes[fine + steps], nodes[fine]
    values = torch.rand(1, wide.ordinal.shape[1] - HISTORY + 1, 1, dtype=torch.float64)
    values[:, 0] *= (position or 0) >= 2 ** (fine + steps)  # a node before the chunk that is of no document is zero
    seen = hand_down(values, wide, narrow, steps, clock)
    expected = handed_down(values[0, :, 0].tolist(), fine + steps, fine, position or 0, starts[0].tolist())
    assert seen.shape == (1, narrow.ordinal.shape[1] - HISTORY + 1, 1)
    assert seen[0, : len(expected), 0].tolist() == expected


@pytest.mark.slow
def test_a_million_streamed_positions_do_not_drift():
    """float32 chunks with a carried state against the O(1)-per-level float64 stream, around powers of two.

    The signal has a mean of 5, where a cumulative sum in float32 errs by 0.25 at 2^20.
    """
    total, chunk = 2**20 + 64, 4096
    alignments = ["sliding"] * 4 + ["dual"] * 13 + ["block", "prefix", "dual"]
    x = (torch.randn(total, generator=torch.Generator().manual_seed(0)) + 5.0).float()
    watched = {n + d for n in (2**10, 2**15, 2**18, 2**19, 2**20) for d in range(-3, 4)}
    expected = {}
    truth = reference.stream((float(v) for v in x.tolist()), alignments)
    for index, row in enumerate(truth):
        if index in watched:
            expected[index] = torch.tensor(row, dtype=torch.float64)
    state, worst = None, 0.0
    for start in range(0, total, chunk):
        out, state = pyramid(x[None, start : start + chunk, None], alignments, state=state)
        for index in watched & set(range(start, start + chunk)):
            got = torch.stack([out.current[0, index - start, :, 0], out.previous[0, index - start, :, 0]], -1)
            worst = max(worst, (got.double() - expected[index]).abs().max().item())
    assert len(expected) == len(watched)
    assert worst < 5e-6
    assert math.isfinite(worst)
