"""The gated delta rule against its definition: values, states and gradients, however a text is cut and packed."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyadlm.ops import make_clock, reference
from dyadlm.ops.gated_delta import gated_delta
from dyadlm.ops.pyramid import next_position

EXACT = 1e-11


def make_case(time, seed=0, batch=2, heads=2):
    """Queries, keys, values, strengths and decays; some keys come back, and some strengths are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*sizes):
        return torch.randn(batch, time, heads, *sizes, generator=generator, dtype=torch.float64)

    query, key = (torch.nn.functional.normalize(drawn(3), dim=-1) for _ in range(2))
    key = torch.where((torch.arange(time) % 3 == 1)[:, None, None], key[:, :1], key)
    return query, key, drawn(2), (drawn() + 0.5).clamp(0, 1), -drawn().exp()


def by_definition(*case):
    """Values (B, T, H, M) and memories (B, H, K, M)."""
    batch, _, heads, _ = case[0].shape
    each = [[reference.gated_delta(*(part[b, :, h] for part in case)) for h in range(heads)] for b in range(batch)]
    values, memories = (torch.stack([torch.stack([one[n] for one in row]) for row in each]) for n in range(2))
    return values.transpose(1, 2), memories


@pytest.mark.parametrize("time", [1, 2, 31, 32, 33, 101])
def test_values_memories_and_gradients_are_those_of_the_definition(time):
    found, expected = [], []
    for results, function in (
        (found, lambda *case: gated_delta(*case, make_clock(2, time))),
        (expected, by_definition),
    ):
        case = [part.requires_grad_() for part in make_case(time)]
        recalled, memory = function(*case)
        weights = torch.arange(recalled.numel(), dtype=torch.float64).view_as(recalled).cos()
        results += [recalled, memory, *torch.autograd.grad((recalled * weights).sum() + memory.sin().sum(), case)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=EXACT)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_documents_that_are_cut_packed_and_padded_equal_each_alone(data):
    time = data.draw(st.integers(1, 80))
    case, generator = make_case(time, seed=time), torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    lengths = torch.tensor([data.draw(st.integers(0, time)) for _ in range(2)])
    starts = (torch.rand(2, time, generator=generator) < 0.1) & (torch.arange(time) < lengths[:, None])
    cuts = sorted(data.draw(st.sets(st.integers(1, time - 1), max_size=3))) if time > 1 else []
    parts, state, position = [], None, None
    for a, b in pairwise([0, *cuts, time]):
        length = (lengths - a).clamp(0, b - a)
        clock = make_clock(2, b - a, position=position, length=length, starts=starts[:, a:b])
        recalled, state = gated_delta(*(part[:, a:b] for part in case), clock, state)
        parts.append(recalled)
        position = next_position(clock)
    recalled = torch.cat(parts, 1)
    for row in range(2):
        begins = [0, *(t for t in range(1, time) if starts[row, t]), int(lengths[row])]
        for a, b in pairwise(begins if lengths[row] else [0]):
            alone, memory = by_definition(*(part[row : row + 1, a:b] for part in case))
            torch.testing.assert_close(recalled[row, a:b], alone[0], rtol=1e-9, atol=EXACT)
            if b == begins[-1]:
                torch.testing.assert_close(state[row], memory[0], rtol=1e-9, atol=EXACT)


def test_a_document_is_the_same_to_the_bit_whatever_stands_before_it():
    case, starts = make_case(90), torch.arange(90)[None].expand(2, -1) == 41
    clock = make_clock(2, 90, starts=starts)
    recalled, memory = gated_delta(*case, clock)
    changed = [torch.cat([part[:, :41].flip(1) / 3, part[:, 41:]], 1) for part in case]
    other, again = gated_delta(*changed, clock)
    assert torch.equal(other[:, 41:], recalled[:, 41:])
    assert torch.equal(again, memory)


def test_what_is_stored_again_under_its_key_takes_the_place_of_what_was_there():
    key = torch.eye(3, dtype=torch.float64)[[0, 1, 0, 2]].view(1, 4, 1, 3)
    value = torch.arange(1.0, 5.0, dtype=torch.float64).view(1, 4, 1, 1)
    sure, kept = torch.ones(1, 4, 1, dtype=torch.float64), torch.zeros(1, 4, 1, dtype=torch.float64)
    _, memory = gated_delta(key, key, value, sure, kept, make_clock(1, 4))
    assert memory.flatten().tolist() == [3, 2, 4]


def test_autocast_does_not_narrow_the_sums():
    case = [part.float() for part in make_case(70)]
    expected = gated_delta(*case, make_clock(2, 70))
    with torch.autocast("cpu", torch.bfloat16):
        found = gated_delta(*case, make_clock(2, 70))
    assert all(map(torch.equal, found, expected))
