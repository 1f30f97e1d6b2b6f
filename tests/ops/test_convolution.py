"""The short convolution against its definition: values, states and gradients, however a text is cut and packed."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyadlm.ops import make_clock, reference
from dyadlm.ops.convolution import short_convolution
from dyadlm.ops.pyramid import next_position

EXACT = 1e-12


def make_case(time, taps=4, seed=0, batch=2, channels=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, time, channels, generator=generator, dtype=torch.float64)
    return x, torch.randn(taps, channels, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("time", [1, 2, 3, 4, 5, 67])
@pytest.mark.parametrize("taps", [1, 4])
def test_values_and_gradients_are_those_of_the_definition(time, taps):
    found, expected = [], []
    for results, function in (
        (found, lambda x, weight: short_convolution(x, weight, make_clock(2, time))[0]),
        (expected, lambda x, weight: torch.stack([reference.short_convolution(row, weight) for row in x])),
    ):
        case = [part.requires_grad_() for part in make_case(time, taps)]
        mixed = function(*case)
        weights = torch.arange(mixed.numel(), dtype=torch.float64).view_as(mixed).cos()
        results += [mixed, *torch.autograd.grad((mixed * weights).sum(), case)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=EXACT)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_documents_that_are_cut_packed_and_padded_equal_each_alone(data):
    time = data.draw(st.integers(1, 25))
    (x, weight), generator = make_case(time, seed=time), torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    lengths = torch.tensor([data.draw(st.integers(0, time)) for _ in range(2)])
    starts = (torch.rand(2, time, generator=generator) < 0.15) & (torch.arange(time) < lengths[:, None])
    cuts = sorted(data.draw(st.sets(st.integers(1, time - 1), max_size=5))) if time > 1 else []
    parts, state, position = [], None, None
    for a, b in zip([0, *cuts], [*cuts, time], strict=True):
        length = (lengths - a).clamp(0, b - a)
        clock = make_clock(2, b - a, position=position, length=length, starts=starts[:, a:b])
        mixed, state = short_convolution(x[:, a:b], weight, clock, state)
        parts.append(mixed)
        position = next_position(clock)
    mixed = torch.cat(parts, 1)
    for row in range(2):
        begins = [0, *(t for t in range(1, time) if starts[row, t]), int(lengths[row])]
        for a, b in pairwise(begins if lengths[row] else [0]):
            alone = reference.short_convolution(x[row, a:b], weight)
            torch.testing.assert_close(mixed[row, a:b], alone, rtol=0, atol=EXACT)
        last = x[row, begins[-2] : begins[-1]][-3:]
        kept = torch.cat([x.new_zeros(3 - len(last), 3), last])
        assert torch.equal(state[row], kept)


def test_what_stands_in_float16_is_summed_in_float32():
    x, weight = (part.half() for part in make_case(9))
    mixed, state = short_convolution(x, weight, make_clock(2, 9))
    assert mixed.dtype == state.dtype == torch.float32
    torch.testing.assert_close(mixed, short_convolution(x.float(), weight.float(), make_clock(2, 9))[0])
